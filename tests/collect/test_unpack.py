"""What a file holds: archives and compressed files that are whole, cut short, too large, or meant to do harm."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.collect.sources import Source
from snakmodel.collect.unpack import contents, understood

TEXT = "".join(f"{random.Random(2).random()} æøå {number}\n" for number in range(5000)).encode()


def source(**keys: Any) -> Source:
    """A source of lines."""
    return Source(url="https://host.invalid/f", format="lines", licence="unknown", **keys)


def read(path: Path, **keys: Any) -> dict[str, bytes]:
    """The names and contents of a file."""
    with understood(path):
        return {name: content.read() for name, content in contents(path, source(**keys))}


def tar(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    """A tar archive of members; one may be a link, which is given by its header."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, member in members.items():
            info = tarfile.TarInfo(name) if isinstance(member, bytes) else member
            info.size = len(member) if isinstance(member, bytes) else 0
            archive.addfile(info, io.BytesIO(member) if isinstance(member, bytes) else None)
    return sink.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip archive of members."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return sink.getvalue()


def link(kind: bytes) -> tarfile.TarInfo:
    """The header of a link to a file outside."""
    info = tarfile.TarInfo("a.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda text: text,
    "gz": gzip.compress,
    "two gz": lambda text: gzip.compress(text[:999]) + gzip.compress(text[999:]),
    "bz2": bz2.compress,
    "two bz2": lambda text: bz2.compress(text[:999]) + bz2.compress(text[999:]),
    "xz": lzma.compress,
    "zip": lambda text: zipped({"d/a.txt": text}),
    "tar": lambda text: tar({"d/a.txt": text}),
    "tar.gz": lambda text: tar({"d/a.txt": text}, "w:gz"),
    "tar.bz2": lambda text: tar({"d/a.txt": text}, "w:bz2"),
    "tar of bz2": lambda text: tar({"d/a.txt.bz2": bz2.compress(text)}),
    "zip of gz": lambda text: zipped({"d/a.txt.gz": gzip.compress(text)}),
}


@pytest.mark.parametrize("way", WAYS)
def test_whole(tmp_path: Path, way: str) -> None:
    """The content is that which was packed; the name of the file does not matter."""
    (tmp_path / "f.dat").write_bytes(WAYS[way](TEXT))
    assert [*read(tmp_path / "f.dat").values()] == [TEXT]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_cut_short(tmp_path: Path, way: str, kept: float) -> None:
    """A file that ends too early is an error, and never a shorter text."""
    packed = WAYS[way](TEXT)
    whole = packed.rstrip(b"\0") if way == "tar" or way == "tar of bz2" else packed
    (tmp_path / "f").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"f: cannot be unpacked .* damaged or was cut short: delete it"):
        read(tmp_path / "f")


def test_a_tar_file_cut_between_members(tmp_path: Path) -> None:
    """The mark of the end is missing, although no member is."""
    whole = tar({"a": b"x" * 512, "b": b"y" * 512})
    (tmp_path / "f").write_bytes(whole[:1024])
    with pytest.raises(UserError, match="the mark of its end is missing"):
        read(tmp_path / "f")


def test_a_damaged_checksum(tmp_path: Path) -> None:
    """A byte that is wrong in the middle is noticed in each form that has checksums."""
    for way in ("gz", "bz2", "xz", "zip", "tar.gz"):
        packed = bytearray(WAYS[way](TEXT))
        packed[len(packed) // 2] ^= 1
        (tmp_path / "f").write_bytes(packed)
        with pytest.raises(UserError, match="cannot be unpacked"):
            read(tmp_path / "f")


@pytest.mark.parametrize("pack", [zipped, tar])
def test_members(tmp_path: Path, pack: Callable[[Any], bytes]) -> None:
    """The patterns of the Danish Gigaword Corpus choose as its description says."""
    names = ["dagw/LICENSE", "dagw/sektioner/a/a_1", "dagw/sektioner/a/README.md", "dagw/sektioner/a/a.json"]
    names += ["dagw/sektioner/b/c/LICENSE", "dagw/sektioner/b/c/b.txt", "dagw/sektioner/b/b.jsonl", "x/sektioner/z"]
    (tmp_path / "f").write_bytes(pack({name: name.encode() for name in names}))
    chosen = read(tmp_path / "f", members=["dagw/sektioner/**"], skip=["*.json", "*.jsonl", "README*", "LICENSE"])
    assert chosen == {name: name.encode() for name in ("dagw/sektioner/a/a_1", "dagw/sektioner/b/c/b.txt")}
    assert [*read(tmp_path / "f", members=["b.txt"])] == ["dagw/sektioner/b/c/b.txt"]
    with pytest.raises(UserError, match=r"no member is \*\.xml, without any; `unzip -l` or `tar tf` show"):
        read(tmp_path / "f", members=["*.xml"])


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "d/../../a.txt", "d\\..\\..\\a.txt"])
@pytest.mark.parametrize("pack", [zipped, tar])
def test_paths_that_leave_the_folder(tmp_path: Path, name: str, pack: Callable[[Any], bytes]) -> None:
    """Such an archive is refused, even if the member is not chosen."""
    (tmp_path / "f").write_bytes(pack({name: TEXT, "good.txt": TEXT}))
    with pytest.raises(UserError, match="has a path that leaves the archive's folder"):
        read(tmp_path / "f", members=["good.txt"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links(tmp_path: Path, kind: bytes) -> None:
    """A member that is no file is refused, unless it is not chosen."""
    (tmp_path / "f").write_bytes(tar({"b.txt": TEXT, "a.txt": link(kind)}))
    with pytest.raises(UserError, match=r"the member 'a\.txt' is a link or a device"):
        read(tmp_path / "f")
    assert read(tmp_path / "f", skip=["a.txt"]) == {"b.txt": TEXT}


def test_links_in_zip_files(tmp_path: Path) -> None:
    """A zip archive marks a link by its mode."""
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link or a device"):
        read(tmp_path / "f")


def test_encrypted(tmp_path: Path) -> None:
    """A member with a password is named."""
    packed = bytearray(zipped({"a.txt": TEXT}))
    packed[6] |= 1  # the flag in the member's header, and in the directory
    packed[packed.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "f").write_bytes(packed)
    with pytest.raises(UserError, match=r"the member 'a\.txt' is encrypted"):
        read(tmp_path / "f")


@pytest.mark.parametrize("way", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("inner", ["zip", "tar", "tar.gz"])
def test_nested_archives(tmp_path: Path, way: str, inner: str) -> None:
    """An archive in an archive is named and refused."""
    (tmp_path / "f").write_bytes(WAYS[way](WAYS[inner](TEXT)))
    with pytest.raises(UserError, match=r"f: the member 'd/a.txt' is a (zip|tar) archive within another one"):
        read(tmp_path / "f")


@pytest.mark.parametrize(
    ("head", "kind"), [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07", "rar"), (b"(\xb5/\xfd", "zstd")]
)
def test_other_archives(tmp_path: Path, head: bytes, kind: str) -> None:
    """Archives that are not read are named, by themselves and as members."""
    for content in (head + TEXT, zipped({"a": head + TEXT})):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(UserError, match=f"is a {kind} file, which is not read. Valid are text, gz"):
            read(tmp_path / "f")


@pytest.mark.parametrize("way", ["gz", "bz2", "xz", "zip", "tar.gz", "zip of gz", "tar of bz2"])
def test_bombs(tmp_path: Path, way: str) -> None:
    """A small file that unpacks to a large one is stopped on the way, unless the source allows it."""
    zeros = bytes(21 * 10**6)
    (tmp_path / "f").write_bytes(WAYS[way](zeros))
    with pytest.raises(UserError, match=r"holds more than 200 times its own .* raise max_ratio of the source"):
        read(tmp_path / "f")
    with pytest.raises(UserError, match=r"holds more than 0\.02 GB when it is unpacked.* raise max_unpacked_gb"):
        read(tmp_path / "f", max_ratio=1e9, max_unpacked_gb=0.02)
    assert [*read(tmp_path / "f", max_ratio=1e9).values()] == [zeros]


def test_many_members_together(tmp_path: Path) -> None:
    """The limit is for all members of an archive together."""
    (tmp_path / "f").write_bytes(zipped({str(number): bytes(1 << 22) for number in range(8)}))
    with pytest.raises(UserError, match="raise max_ratio"):
        read(tmp_path / "f")
