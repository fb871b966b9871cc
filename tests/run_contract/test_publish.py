"""Write-then-rename, markers and claims."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import xxhash

from run_contract.entry_point import run_main
from run_contract.errors import Superseded, UserError
from run_contract.output import printable
from run_contract.publish import publishing, write_json
from snakmodel.monitor.run_files import json_lines
from snakmodel.run.attempts import log_event
from snakmodel.run.markers import Marker
from snakmodel.shards.append_file import append_file


def test_published_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    """Until the body succeeds the old content stands; afterwards the new one does, and no temporary is left."""
    final = tmp_path / "x.txt"
    final.write_text("old")
    with pytest.raises(RuntimeError), publishing(final) as (temporary,):
        temporary.write_text("half")
        raise RuntimeError
    assert final.read_text() == "old"
    with publishing(final) as (temporary,):
        temporary.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_published_folder_replaces_a_folder(tmp_path: Path) -> None:
    """A folder is exchanged as a whole: nothing of the old one remains."""
    final = tmp_path / "out"
    for name in ("a", "b"):
        with publishing(final) as (temporary,):
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_superseded_attempt_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt whose claim has been taken by another one does not rename."""
    claim = tmp_path / "claim.json"
    claim.write_text(json.dumps({"attempt": "7.r1"}))
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(claim))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "7.r0")
    with pytest.raises(Superseded, match=r"7\.r0 was replaced by 7\.r1"), publishing(tmp_path / "x") as (temporary,):
        temporary.write_text("late")
    assert not (tmp_path / "x").exists()


def test_marker_round_trip_and_what_it_notices(tmp_path: Path) -> None:
    """A marker holds sizes and xxh3-128 checksums of all files, and notices a missing, a cut and a changed one."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"hej")
    (tmp_path / "n.json").write_text('{"documents": 1}')
    marker = Marker.of(tmp_path, "key", ["d"], "n.json")
    assert marker.counts == {"documents": 1}
    marker.write(tmp_path / "marker.json")
    found = Marker.read(tmp_path / "marker.json")
    assert found == marker
    assert found is not None
    assert found.outputs == {"d/x": (3, xxhash.xxh3_128_hexdigest(b"hej"))}
    assert found.problem(tmp_path, full=True) is None
    (tmp_path / "d" / "x").write_bytes(b"hoj")
    assert found.problem(tmp_path, full=False) is None
    assert "checksum" in str(found.problem(tmp_path, full=True))
    assert found.problem(tmp_path, full=True, only=["other"]) is None
    (tmp_path / "d" / "x").write_bytes(b"he")
    assert "has 2 bytes" in str(found.problem(tmp_path, full=False))
    (tmp_path / "d" / "x").unlink()
    assert "is missing" in str(found.problem(tmp_path, full=False))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": "k", "outputs": {"a": 3}, "counts": {}}'])
def test_corrupt_marker_is_no_marker(tmp_path: Path, text: str) -> None:
    """Whatever is in the file, reading a marker gives a marker or None."""
    (tmp_path / "marker.json").write_text(text)
    assert Marker.read(tmp_path / "marker.json") is None


def test_marker_of_a_command_that_wrote_nothing(tmp_path: Path) -> None:
    """A command that exits 0 without its outputs gets no marker."""
    with pytest.raises(FileNotFoundError, match="did not write a, b"):
        Marker.of(tmp_path, "key", ["a", "b"])


def test_peoples_mistakes_have_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """A UserError becomes one line on stderr and exit code 2."""

    def main() -> int:
        raise UserError("the file x is not there")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the file x is not there\n"


def test_leftovers_of_killed_attempts_are_removed_by_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the claim clears away what killed attempts left; without a claim another writer's file is kept."""
    leftovers = [tmp_path / name for name in (".x.tmp-7.r0", "..x.tmp-7.r0.tmp-7.r0")]
    for claimed in (False, True):
        for leftover in leftovers:
            leftover.write_text("half")
        if claimed:
            (tmp_path / "claim.json").write_text(json.dumps({"attempt": "7.r1"}))
            monkeypatch.setenv("SNAKMODEL_CLAIM", str(tmp_path / "claim.json"))
            monkeypatch.setenv("SNAKMODEL_ATTEMPT", "7.r1")
        with publishing(tmp_path / "x") as (temporary,):
            temporary.write_text("whole")
        assert [leftover.exists() for leftover in leftovers] == [not claimed] * 2


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EIO, 1), (errno.ESTALE, 1)])
def test_errors_of_the_system_name_the_file(capsys: pytest.CaptureFixture[str], number: int, code: int) -> None:
    """One line with the file; only what may go away by itself counts as a crash, which is tried again."""

    def main() -> int:
        raise OSError(number, os.strerror(number), "/corpus/a.txt")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == f"error: /corpus/a.txt: {os.strerror(number)}\n"


def test_an_error_of_the_system_without_a_file_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """What names no file would say nothing in one line."""

    def main() -> int:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert printed.endswith("OSError: [Errno 5] broken\n")


def test_a_full_disk_is_a_persons_error(tmp_path: Path) -> None:
    """What does not fit is not published, and the message says where and what."""
    full = pytest.raises(UserError, match=r"no room for x \(No space left on device\)")
    with full, publishing(tmp_path / "x") as (temporary,):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("within_the_file_system", [True, False])
def test_appended_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within_the_file_system: bool) -> None:
    """Bytes follow what was written before, whether the file system copies or this process does, also from half-way."""
    if not within_the_file_system:
        real = os.copy_file_range
        calls = iter([1000, 0])

        def once(source: int, sink: int, size: int) -> int:
            if (now := next(calls, 0)) == 0:
                raise OSError(errno.EXDEV, "between file systems")
            return real(source, sink, now)

        monkeypatch.setattr(os, "copy_file_range", once)
    parts = [os.urandom(size) for size in (5000, 0, 3)]
    with (tmp_path / "all").open("wb") as sink:
        sink.write(b"first")
        for number, part in enumerate(parts):
            (tmp_path / str(number)).write_bytes(part)
            append_file(sink, tmp_path / str(number))
        sink.write(b"last")
    assert (tmp_path / "all").read_bytes() == b"first" + b"".join(parts) + b"last"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Half a surrogate pair, as Python keeps such a byte of a name, is read back from what was written."""
    name = os.fsdecode(b"/data/bl\xe5/\xe6.txt")
    write_json(tmp_path / "a.json", {name: [name]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {name: [name]}
    assert printable(name) == "/data/bl\\xe5/\\xe6.txt"
    assert printable("blå") == "blå"
    marker = Marker("key", {name: (1, "digest")}, {"file": name})
    marker.write(tmp_path / "marker.json")
    assert Marker.read(tmp_path / "marker.json") == marker
    log_event(tmp_path, "prepare", "failed", reason=name)
    assert json_lines(tmp_path / "events.jsonl", [])[0]["reason"] == name
