"""Opens what a downloaded file holds: itself, or the members of an archive, unpacked and within limits.

What a file is follows from its first bytes, not from its name. Nothing is ever unpacked to disk, and at no time more
than a buffer is held in memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from run_contract.errors import UserError
from snakmodel.collect.sources import Source

_READ = 1 << 17
_TAR_MAGIC = 257, b"ustar"
_TAR_BLOCK = 512
_FREE = 1 << 24
"""Bytes that a file may unpack to whatever the ratio: short files of equal lines are packed very well."""
_COMPRESSIONS: dict[re.Pattern[bytes], Callable[[Any], Any]] = {
    re.compile(rb"\x1f\x8b"): lambda file: gzip.GzipFile(fileobj=file),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.BZ2File,
    re.compile(rb"\xfd7zXZ\0"): lzma.LZMAFile,
}
"""Maps the first bytes of a compressed file to what opens it."""
_ZIP = b"PK\x03\x04", b"PK\x05\x06"
_REFUSED = {b"(\xb5/\xfd": "zstd", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError)
"""What the libraries raise for a file that cannot be unpacked; an OSError with a number is the system's, though."""


@dataclass(frozen=True)
class Limits:
    """How large the content of a file may be."""

    path: Path
    packed: int
    """The size of the file, in bytes."""
    ratio: float
    most: int
    """In bytes."""

    def check(self, size: int) -> None:
        """Raise UserError if so many unpacked bytes are too many."""
        if size > self.most:
            raise UserError(
                f"{self.path}: holds more than {self.most / 10**9:g} GB when it is unpacked. If this is right, and no "
                "file that was made to fill the disk, raise max_unpacked_gb of the source"
            )
        if size > max(_FREE, self.ratio * self.packed):
            raise UserError(
                f"{self.path}: holds more than {self.ratio:g} times its own {self.packed:,} bytes when it is unpacked. "
                "If this is right, and no file that was made to fill the disk, raise max_ratio of the source"
            )


class _Counted(io.RawIOBase):
    """A stream that counts its bytes against limits, and remembers the last block of them."""

    def __init__(self, inner: Any, limits: Limits) -> None:
        self._inner, self._limits = inner, limits
        self.size = 0
        self.tail = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one read of the stream does. Raises UserError beyond the limits."""
        block = self._inner.read(len(buffer))
        buffer[: len(block)] = block
        self.size += len(block)
        self._limits.check(self.size)
        self.tail = (self.tail + block)[-_TAR_BLOCK:] if len(block) < _TAR_BLOCK else block[-_TAR_BLOCK:]
        return len(block)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn the libraries' errors about a damaged file into a UserError that names it."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path}: cannot be unpacked ({error}). It is damaged or was cut short: delete it, and run this again"
        ) from error


def contents(path: Path, source: Source) -> Iterator[tuple[str, io.BufferedReader]]:
    """Yield the name and the unpacked content of the file, or of each member that the source's patterns choose.

    A content has to be read before the next one is asked for. Raises UserError for a file that holds too much, another
    archive, or members whose paths leave the folder, or of which no member is chosen; and what is in DAMAGED for a file
    that cannot be unpacked, see `understood`.
    """
    limits = Limits(path, path.stat().st_size, source.max_ratio, int(source.max_unpacked_gb * 10**9))
    with path.open("rb") as file:
        head = file.peek(_READ)[:_TAR_BLOCK]
        if head.startswith(_ZIP):
            yield from _members(path, _zip_members(file, source, limits), source)
            return
        _refuse(head, str(path))
        content, counted = _unpacked(file, limits)
        if _is_tar(content):
            yield from _members(path, _tar_members(content, source, limits), source)
            while content.read(_READ):
                pass
            if counted.tail.strip(b"\0"):
                raise EOFError("the mark of its end is missing")
        else:
            _refuse_archive(content, str(path), path.name)
            yield path.name, content
            while content.read(_READ):  # the checksum is at the end
                pass


def _members(
    path: Path, members: Iterator[tuple[str, io.BufferedReader]], source: Source
) -> Iterator[tuple[str, io.BufferedReader]]:
    """Pass on the chosen members. Raises UserError if there is none."""
    found = False
    for name, content in members:
        found = True
        yield name, content
    if not found:
        raise UserError(
            f"{path}: no member is {' or '.join(source.members) or '*'}, without {', '.join(source.skip) or 'any'}; "
            "`unzip -l` or `tar tf` show its members; correct `members` and `skip` of the source"
        )


def _zip_members(file: BinaryIO, source: Source, limits: Limits) -> Iterator[tuple[str, io.BufferedReader]]:
    path, size = limits.path, 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not _is_chosen(path, name, source) or member.is_dir():
                continue
            if kind == stat.S_IFLNK:
                raise _link(path, name)
            if member.flag_bits & 1:
                raise UserError(f"{path}: the member {name!r} is encrypted; unpack it and pack it without a password")
            with archive.open(member) as raw:
                yield name, _member(raw, limits, name)
            size += member.file_size
            limits.check(size)


def _tar_members(content: BinaryIO, source: Source, limits: Limits) -> Iterator[tuple[str, io.BufferedReader]]:
    path = limits.path
    with tarfile.open(fileobj=content, mode="r|", bufsize=_READ - _READ % _TAR_BLOCK) as archive:
        for member in archive:
            if not _is_chosen(path, member.name, source) or member.isdir():
                continue
            if not member.isreg():
                raise _link(path, member.name)
            raw = archive.extractfile(member)
            assert raw is not None
            yield member.name, _member(raw, limits, member.name)


def _member(raw: Any, limits: Limits, name: str) -> io.BufferedReader:
    """The content of a member, unpacked if it is a compressed file. Raises UserError if it is an archive itself."""
    buffered = io.BufferedReader(_Counted(raw, limits), _READ)
    where = f"{limits.path}: the member {name!r}"
    _refuse_archive(buffered, where, name)
    content, _ = _unpacked(buffered, limits)
    _refuse_archive(content, where, name)
    return content


def _unpacked(file: Any, limits: Limits) -> tuple[io.BufferedReader, _Counted]:
    """The content of a file that may be compressed, and what counts its bytes."""
    head = file.peek(_READ)[:_TAR_BLOCK]
    opener = next((opener for magic, opener in _COMPRESSIONS.items() if magic.match(head)), None)
    counted = _Counted(opener(file) if opener else file, limits)
    return io.BufferedReader(counted, _READ), counted


def _is_tar(content: Any) -> bool:
    at, magic = _TAR_MAGIC
    return bytes(content.peek(_TAR_BLOCK)[at : at + len(magic)]) == magic


def _refuse_archive(content: Any, where: str, name: str) -> None:
    """Raise UserError if the content is an archive or a form of compression that is not read here."""
    head = content.peek(_TAR_BLOCK)
    _refuse(head, where)
    if head.startswith(_ZIP) or _is_tar(content):
        kind = "zip" if head.startswith(_ZIP) else "tar"
        raise UserError(
            f"{where} is a {kind} archive within another one ({name}), which is not read. Unpack the outer one, and "
            "put the inner one in its place"
        )


def _refuse(head: bytes, where: str) -> None:
    for magic, kind in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{where} is a {kind} file, which is not read. Valid are text, gz, bz2, xz, zip and tar; unpack it, "
                "and pack it as one of these"
            )


def _is_chosen(path: Path, name: str, source: Source) -> bool:
    """Whether the source's patterns choose a member. Raises UserError if its path leaves the folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(
            f"{path}: the member {name!r} has a path that leaves the archive's folder. Such archives are refused as a "
            "whole, because they may be meant to do harm; ask whoever made it for another one"
        )
    chosen = not source.members or any(_matches(name, pattern) for pattern in source.members)
    return chosen and not any(_matches(name, pattern) for pattern in source.skip)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name if "/" in pattern else name.rsplit("/", 1)[-1], pattern)


def _link(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: the member {name!r} is a link or a device, and not a file. Leave it out with `skip` of the source, "
        "or ask whoever made the archive for another one"
    )
