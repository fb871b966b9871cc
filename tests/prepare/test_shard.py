import json
import random
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import datasets
import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.prepare.input_files import FilePart, plan_shards
from snakmodel.prepare.readers import BACKWARD_BLOCK, Reading
from snakmodel.prepare.shard import prepare
from snakmodel.prepare.shard_writer import Cleaning, ShardCounts
from tests import prepare_reference


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts(
    part: FilePart, document: str = "line", errors: str = "error", counts: ShardCounts | None = None
) -> list[str]:
    return prepare_reference.texts(part, Reading(document, errors), counts=counts)


def read(plan: list[list[FilePart]], document: str = "line", errors: str = "error") -> list[tuple[str, str]]:
    return [(part.source, text) for parts in plan for part in parts for text in texts(part, document, errors)]


def cuts(path: Path, size: int, *borders: int) -> list[list[FilePart]]:
    return [[FilePart(str(path), "s", start, end)] for start, end in pairwise([0, *borders, size])]


HARD = (
    "\ufeffførste linje\r\nfortsat\r\n\r\n \t\r\nanden blok\n\n\n"
    "\u2028inde i\u2028linjen\u0085her\x0b\x0c\x1c\x1dslut\nlang 🐍 æøå\r\n\r\n\n\u00a0\n\n"
    + " " * 50
    + "\nefter\rvogn\nsidste uden linjeskift"
).encode()


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
@pytest.mark.parametrize("content", [HARD, HARD[3:], b"\xef\xbb\xbf\n\na\n", b"\n\r\n\n", b"\xef\xbb\xbf", b"x"])
def test_every_cut_gives_the_documents_of_the_uncut_file(tmp_path: Path, document: str, content: bytes) -> None:
    """One cut at any byte (in the BOM, within CRLF, within a character, in blank lines) loses and doubles nothing."""
    path = write(tmp_path / "a.txt", content)
    whole = read(cuts(path, len(content)), document)
    for border in range(len(content) + 1):
        assert read(cuts(path, len(content), border), document) == whole, border


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
def test_any_number_of_shards_gives_the_same_documents(tmp_path: Path, document: str) -> None:
    """Plans of 1 to 60 shards over several files hold the same documents in the same order, and about equal bytes."""
    random_ = random.Random(1)
    for name in ("b/x.txt", "b/y.txt", "a/z/deep.txt", "own.txt"):
        pieces = random_.choices(["æble", "🐍", " ", "\n", "\r\n", "\n\n", "\r\n\r\n", "\u2028", "\x85"], k=120)
        write(tmp_path / name, "".join(pieces).encode())
    whole = read(plan_shards(tmp_path, None, 1, 10), document)
    assert {source for source, _ in whole} == {tmp_path.name, "a", "b"}
    for shards in range(2, 61):
        plan = plan_shards(tmp_path, None, shards, 10)
        sizes = [sum(part.end - part.start for part in parts) for parts in plan]
        assert len(plan) == shards
        assert max(sizes) - min(sizes) <= 1
        assert read(plan, document) == whole


def test_a_long_run_of_white_space_before_a_cut(tmp_path: Path) -> None:
    """Blank-line mode looks back past its block size to tell whether the line before the cut holds text."""
    for lead in (b"tekst", b"\ntekst\n", b""):
        content = lead + b" " * (BACKWARD_BLOCK + 10) + b"\nmore\n"
        path = write(tmp_path / "a.txt", content)
        whole = read(cuts(path, len(content)), "blank-line")
        for border in (len(content) - 8, len(content) - 6, len(content) - 5, len(content) - 4):
            assert read(cuts(path, len(content), border), "blank-line") == whole


def test_documents_end_at_line_feeds_only(tmp_path: Path) -> None:
    """U+2028, U+2029, U+0085, VT, FF and lone CR stay within a document; CRLF and the BOM are dropped."""
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\rg"
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + f"{text}\r\nnext\n\n   \n".encode())
    counts = ShardCounts()
    found = texts(FilePart(str(path), "s", 0, path.stat().st_size), counts=counts)
    assert found == [text, "next"]
    assert counts.empty == 2


def test_blank_lines_and_files_as_borders(tmp_path: Path) -> None:
    """Blank-line mode joins the lines of a block by a line feed; file mode takes the whole file."""
    path = write(tmp_path / "a.txt", b"one\r\ntwo\r\n\r\n \nthree\n")
    assert [text for _, text in read(cuts(path, 20), "blank-line")] == ["one\ntwo", "three"]
    assert [text for _, text in read(cuts(path, 20), "file")] == ["one\ntwo\n\n \nthree"]


def test_bad_bytes_follow_the_policy(tmp_path: Path) -> None:
    """`error` names file, byte and line; `replace` and `skip` go on and count by reason."""
    path = write(tmp_path / "a.txt", b"good\nbl\xe5 b\xe6r\nfine\ncut \xc3\n")
    part = FilePart(str(path), "s", 0, path.stat().st_size)
    with pytest.raises(UserError, match=r"a\.txt: byte 7 \(line 2\) is not UTF-8: invalid continuation byte, 0xe5"):
        texts(part)
    replaced, skipped = ShardCounts(), ShardCounts()
    assert texts(part, errors="replace", counts=replaced) == ["good", "bl� b�r", "fine", "cut �"]
    assert texts(part, errors="skip", counts=skipped) == ["good", "fine"]
    assert (replaced.replaced, replaced.skipped, skipped.replaced, skipped.skipped) == (2, 0, 0, 2)
    assert replaced.invalid == skipped.invalid == {"invalid continuation byte": 2}


def test_shard_file_opens_as_a_dataset_and_counts_agree(tmp_path: Path) -> None:
    """`datasets` opens the shard with text and source; counts are per source, empty files too; bytes repeat."""
    write(tmp_path / "raw/news/a.txt", "æ\n\nb\n".encode())
    write(tmp_path / "raw/news/empty.txt", b"")
    write(tmp_path / "raw/tales/t.txt", b"c\n")
    (parts,) = plan_shards(tmp_path / "raw", None, 1, 10)
    prepare(parts, tmp_path / "one", Reading(), Cleaning())
    prepare(parts, tmp_path / "two", Reading(), Cleaning())
    data = datasets.Dataset.from_file(str(tmp_path / "one.arrow"))
    assert data.to_dict() == {"text": ["æ", "b", "c"], "source": ["news", "news", "tales"]}
    counts = json.loads((tmp_path / "one.json").read_text())
    sources = {
        "news": {"documents": 2, "characters": 2, "bytes": 3},
        "tales": {"documents": 1, "characters": 1, "bytes": 1},
    }
    read = counts.pop("read")
    assert counts == asdict(ShardCounts(documents=3, characters=3, bytes=4, empty=1, empty_files=1, sources=sources))
    assert [one[:2] for one in read] == [[0, 6], [0, 0], [0, 2]]
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "two.arrow").read_bytes()


def test_sources_are_selected_in_the_order_given(tmp_path: Path) -> None:
    """Sub-folders, the folder's own name and single files can be named; what is wrong is named with the valid ones."""
    for name in ("tales/b.txt", "tales/a.txt", "news/n.txt", "loose.txt", "tales/.hidden.txt", "tales/notes.md"):
        write(tmp_path / "raw" / name, Path(name).name.encode())
    raw = tmp_path / "raw"

    def chosen(*names: str) -> list[tuple[str, str]]:
        return read(plan_shards(raw, dict.fromkeys(names, 1.0), 1, 10))

    assert chosen("tales", "news") == [("tales", "a.txt"), ("tales", "b.txt"), ("news", "n.txt")]
    assert chosen("raw") == [("raw", "loose.txt")]
    assert chosen("loose") == chosen("loose.txt") == [("loose", "loose.txt")]
    with pytest.raises(UserError, match=r"unknown source 'tale'.*'news', 'tales'; did you mean 'tales'\?"):
        chosen("tale")
    with pytest.raises(UserError, match="same file twice"):
        chosen("raw", "loose")


def test_nothing_to_read_is_said_at_planning(tmp_path: Path) -> None:
    """No folder, no *.txt, only empty files, and impossible numbers are errors that name the folder."""
    with pytest.raises(UserError, match=r"absent is not a folder"):
        plan_shards(tmp_path / "absent", None, 1, 10)
    write(tmp_path / "sub/readme.md", b"x")
    with pytest.raises(UserError, match=rf"looked for \*\.txt, .* in {tmp_path}"):
        plan_shards(tmp_path, None, 1, 10)
    write(tmp_path / "sub/a.txt", b"")
    with pytest.raises(UserError, match=r"all 1 input files .* are empty"):
        plan_shards(tmp_path, None, 1, 10)
    write(tmp_path / "sub/a.txt", b"text")
    with pytest.raises(UserError, match="must be 1 or more"):
        plan_shards(tmp_path, None, 0, 10)
    assert len(plan_shards(tmp_path, None, None, 3)) == 2
    assert len(plan_shards(tmp_path, None, 100, 3)) == 4


def test_a_file_that_changed_since_planning_is_an_error(tmp_path: Path) -> None:
    """A shorter file is refused, a vanished one is a missing input."""
    path = write(tmp_path / "a.txt", b"text\n")
    with pytest.raises(UserError, match="has 5 bytes, the plan expects 9"):
        texts(FilePart(str(path), "s", 0, 9))
    with pytest.raises(InputsMissing, match=r"gone\.txt"):
        texts(FilePart(str(tmp_path / "gone.txt"), "s", 0, 9))


def test_command_line(tmp_path: Path) -> None:
    """The documented command writes the shard; bad bytes exit 2 and a missing plan 3, each with one line."""

    def run(shard: int, plan: str = "shards.json") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakmodel.prepare", "--shards", str(tmp_path / plan), "--shard", str(shard)]
        command += ["--output", str(tmp_path / f"arrow/shard-{shard:05d}"), "--document", "line", "--errors", "error"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    write(tmp_path / "raw/a.txt", b"hej\nd\xe5\n")
    plan = [[FilePart(str(tmp_path / "raw/a.txt"), "raw", *span)] for span in ((0, 4), (4, 7))]
    write(tmp_path / "shards.json", json.dumps({"shards": [[asdict(p) for p in parts] for parts in plan]}).encode())
    assert run(0).returncode == 0
    bad, absent, beyond = run(1), run(0, "other.json"), run(2)
    assert (bad.returncode, absent.returncode, beyond.returncode) == (2, 3, 2)
    for result in (bad, absent, beyond):
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "arrow").iterdir()) == ["shard-00000.arrow", "shard-00000.json"]
