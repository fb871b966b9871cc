"""The step `lines`: what is left of documents, against plain Python, and the counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.dedup.lines.frequent import frequent
from snakmodel.filter.__main__ import make_parser
from snakmodel.filter.lines import FrequentLines, LinesStep, make
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import open_stream
from tests.dedup.lines.test_lines import corpus, documents
from tests.lines_reference import counted, without


def step(folder: Path, ranges: int) -> LinesStep:
    flags = ["lines", "--input", "x", "--output", "y", "--frequent", f"{folder}/frequent", "--ranges", str(ranges)]
    return make(make_parser().parse_args(flags))


def filtered(folder: Path, shards: int, ranges: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows and the step's counts of all shards."""
    rows, counts = [], []
    for shard in range(shards):
        name = f"shard-{shard:05d}"
        told = filter_shard(folder / f"arrow/{name}.arrow", folder / f"kept/{name}", [step(folder, ranges)])
        counts.append(told["steps"]["lines"])
        with open_stream(folder / f"kept/{name}.arrow") as reader:
            rows += reader.read_all().to_pylist()
    return rows, counts


@pytest.mark.parametrize(("shards", "ranges", "batch"), [(1, 1, 1000), (3, 2, 7), (2, 5, 1)])
def test_texts_equal_the_plain_reference(tmp_path: Path, shards: int, ranges: int, batch: int) -> None:
    """However a corpus is cut, every document is what plain Python leaves of it, and removed lines add up."""
    texts = documents(200)
    corpus(tmp_path, texts, shards, ranges, 4, batch)
    often = {line for line, number in counted(texts).items() if number >= 4}
    expected = [without(text, often) for text in texts]
    rows, counts = filtered(tmp_path, shards, ranges)
    assert [row["text"] for row in rows] == [text for text in expected if text is not None]
    removed = sum(number for line, number in counted(texts).items() if line in often)
    assert sum(one["lines"] for one in counts) == removed
    assert sum(one["emptied"] for one in counts) == expected.count(None) > 3
    lost = sum(len(text.encode()) - len((after or "").encode()) for text, after in zip(texts, expected, strict=True))
    assert sum(one["bytes"] for one in counts) == lost
    sources = [source for one in counts for source in one["by_source"].values()]
    assert (sum(one["lines"] for one in sources), sum(one["bytes"] for one in sources)) == (removed, lost)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("en\nX\nto", "en\nto"),
        ("en\n\nX\n\nto", "en\n\nto"),
        ("en\nX\n\nto", "en\n\nto"),
        ("en\n\nX\nto", "en\n\nto"),
        ("X\n\n\nen\n", "en\n"),
        ("en\n\n\nto\n  X \r", "en\n\n\nto"),
        ("en\nX\n\n\n\nto", "en\n\n\n\nto"),
        ("en\n\nX\n\nX\n \nto", "en\n\nto"),
        ("\n\nen", "\n\nen"),
        ("\nX\n", None),
        ("\n", "\n"),
        ("", ""),
    ],
)
def test_blank_lines_around_a_removed_one(tmp_path: Path, text: str, expected: str | None) -> None:
    """Blank lines after a removed line go if a blank line or nothing comes before; others stay."""
    assert without(text, {"X"}) == expected
    corpus(tmp_path, [text, "X\nX\nX"], 1, 1, 3)
    rows, _ = filtered(tmp_path, 1, 1)
    assert [row["text"] for row in rows] == ([] if expected is None else [expected])


def test_the_most_frequent_lines_are_shown(tmp_path: Path) -> None:
    """The counts hold the texts of the most frequent lines, how often they occur in all, and are removed here."""
    texts = [f"{'lang' * 60}\nA\nB", "A\nA\n B ", "A\nslut"] * 2 + ["C\nC\nC"]
    corpus(tmp_path, texts, 2, 2, 3, 2)
    _, counts = filtered(tmp_path, 2, 2)
    assert counts[0]["most_frequent"] == [
        {"text": "A", "times": 8, "removed": 5},
        {"text": "B", "times": 4, "removed": 3},
    ]
    assert counts[1]["most_frequent"][2] == {"text": "C", "times": 3, "removed": 3}
    assert (counts[0]["frequent"], counts[0]["minimum"]) == (3, 3)
    assert counts[0]["by_source"]["s1"] == {"documents": 2, "lines": 5, "bytes": 11}


def test_nothing_frequent_and_no_documents(tmp_path: Path) -> None:
    """A corpus without frequent lines stays as it is, and a shard without documents has all counts."""
    corpus(tmp_path, ["en\nto", "tre"], 3, 2, 2)
    rows, counts = filtered(tmp_path, 3, 2)
    assert [row["text"] for row in rows] == ["en\nto", "tre"]
    assert (counts[2]["lines"], counts[2]["most_frequent"], counts[2]["frequent"]) == (0, [], 0)


def test_mistakes(tmp_path: Path) -> None:
    """Ranges that are missing, of another number or of another limit are refused."""
    corpus(tmp_path, ["en\nto\nen"], 1, 2, 2)
    folder = tmp_path / "frequent"
    with pytest.raises(InputsMissing, match="lacks 1 of 3"):
        FrequentLines(folder, 3)
    with pytest.raises(UserError, match="--ranges is 1"):
        FrequentLines(folder, 1)
    frequent(tmp_path / "counts", 1, 1, 5, folder / "range-00001")
    with pytest.raises(UserError, match=r"--min 2 and .* --min 5"):
        FrequentLines(folder, 2)
    about = json.loads((folder / "range-00001.json").read_text())
    (folder / "range-00001.json").write_text(json.dumps({**about, "ranges": 3}))
    with pytest.raises(UserError, match="range 1 of 3, and not 1 of 2"):
        FrequentLines(folder, 2)
