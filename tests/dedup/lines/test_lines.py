"""The commands that count the lines of a corpus: keys, counts and ranges against plain Python, in any cut."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.dedup.lines import count as counting
from snakmodel.dedup.lines.count import count, lines_of
from snakmodel.dedup.lines.frequent import frequent
from snakmodel.dedup.lines.key_file import COUNTED, Records, Run, merged, read, summed
from snakmodel.dedup.minhash.parameters import KEY_POINTS, PRIME
from snakmodel.shards.arrow_stream import SCHEMA, Rows, write_stream
from tests.lines_reference import counted

WORDS = (
    "a",
    "b",
    "Læs mere",
    "Læs mere ",
    "\tLæs mere\r",
    "\u00a0a\u3000",
    "a b",
    "a  b",
    "\x85",
    " ",
    "",
    "\u200b",
    "😀",
)


def documents(count: int, seed: int = 1) -> list[str]:
    """Random documents of few different lines and of lines of their own, with white space of all kinds."""
    generator = random.Random(seed)
    return [
        "\n".join(
            generator.choice(WORDS) if generator.random() < 0.7 else f"linje {generator.randrange(count)}"
            for _ in range(generator.randint(0, 8))
        )
        for _ in range(count)
    ]


def write_shards(folder: Path, texts: list[str], shards: int, batch: int = 7) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, rows in enumerate(np.array_split(np.arange(len(texts)), shards)):
        part = [texts[row] for row in rows]
        columns = {"text": pa.array(part, pa.large_string()), "source": pa.array([f"s{row % 2}" for row in rows])}
        table = pa.table(columns, schema=SCHEMA)
        paths.append(folder / f"shard-{shard:05d}.arrow")
        write_stream(paths[-1], SCHEMA, table.to_batches(max_chunksize=batch))
    return paths


def key_of(line: str) -> tuple[int, int]:
    high, low = lines_of(pa.array([line], pa.large_string()))[1][0].tolist()
    return high, low


def corpus(folder: Path, texts: list[str], shards: int, ranges: int, minimum: int, batch: int = 7) -> Records:
    """The frequent lines of a corpus, by both commands in all tasks."""
    for path in write_shards(folder / "arrow", texts, shards, batch):
        count(Rows(path), folder / "counts" / path.stem, ranges)
    for part in range(ranges):
        frequent(folder / "counts", shards, part, minimum, folder / "frequent" / f"range-{part:05d}")
    content = b"".join(path.read_bytes() for path in sorted((folder / "frequent").glob("*.lines")))
    return np.frombuffer(content, COUNTED)


def test_white_space_is_that_of_strip() -> None:
    """Every character at the end of a line is stripped or kept as `str.strip` has it."""
    for start in range(0, 0x11000, 0x1000):
        characters = [chr(point) for point in range(start, start + 0x1000) if not 0xD800 <= point <= 0xDFFF]
        characters = [one for one in characters if one != "\n"]
        if not characters:
            continue
        lines, _ = lines_of(pa.array(characters, pa.large_string()))
        assert [characters[row] for row in lines[:, 0]] == [one for one in characters if one.strip()]


def test_keys_equal_polynomials_of_whole_numbers() -> None:
    """The keys of lines of any length, at the end of the buffer too, are what Python's whole numbers give."""
    texts = ["æ" * (size // 2) + "x" * (size % 2) for size in range(1, 40)]
    for one in (texts, [f"{text} \n{text}" for text in texts], texts[-1:], texts[6:7]):
        lines = [line.strip() for text in one for line in text.split("\n")]
        _, keys = lines_of(pa.array(one, pa.large_string()))
        assert keys.tolist() == [[spread(polynomial(line.encode(), point)) for point in KEY_POINTS] for line in lines]


def polynomial(line: bytes, point: int) -> int:
    """The polynomial of 1, the groups of seven bytes and the number of bytes, modulo 2⁶¹ - 1."""
    full = max(0, len(line) - 1) // 7
    groups = [line[7 * place : 7 * place + 7] for place in range(full)] + [line[7 * full :]]
    value = 1
    for word in (*(int.from_bytes(group, "little") for group in groups), len(line)):
        value = (value * point + word) % PRIME
    return value


def spread(value: int) -> int:
    """The finaliser of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ value >> 27) * 0x94D049BB133111EB % (1 << 64)
    return value ^ value >> 31


@pytest.mark.parametrize(("shards", "ranges", "batch"), [(1, 1, 1000), (1, 4, 3), (5, 1, 7), (4, 3, 2)])
def test_frequent_lines_equal_plain_counting(tmp_path: Path, shards: int, ranges: int, batch: int) -> None:
    """However a corpus is cut, its frequent lines are those that plain Python counts, sorted by key."""
    texts = documents(150)
    expected = {key_of(line): number for line, number in counted(texts).items() if number >= 3}
    found = corpus(tmp_path, texts, shards, ranges, 3, batch)
    assert [((high, low), number) for high, low, number in found.tolist()] == sorted(expected.items())
    assert len(expected) > 5
    about = json.loads((tmp_path / "frequent/range-00000.json").read_text())
    assert (about["minimum"], about["ranges"]) == (3, ranges)


def test_spilled_runs_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard with more lines than are held at a time has the same keys, and is merged in many parts."""
    texts = documents(400, 3)
    (path,) = write_shards(tmp_path, texts, 1, 5)
    whole = count(Rows(path), tmp_path / "whole", 3)
    monkeypatch.setattr(counting, "HELD", 50)
    monkeypatch.setattr(counting, "merged", partial(merged, held=50))
    monkeypatch.setattr("snakmodel.dedup.lines.key_file._LEAST", 4)
    assert count(Rows(path), tmp_path / "spilled", 3) == whole
    for suffix in (".lines", ".json"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"spilled{suffix}").read_bytes()
    assert whole["lines"] == sum(counted(texts).values()) > 500
    assert whole["records"] == len(counted(texts))
    assert not [one for one in tmp_path.iterdir() if "tmp" in one.name]


@pytest.mark.parametrize("different", [1, 2, 3, 1000])
def test_merging_equals_a_dictionary(different: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with few different upper halves, so that these are equal beyond what is held, add up as in a dictionary."""
    monkeypatch.setattr("snakmodel.dedup.lines.key_file._LEAST", 2)
    generator = np.random.default_rng(different)
    runs, expected = [], dict[tuple[int, int], int]()
    for size in (0, 1, 40, 90, 200):
        records = np.zeros(size, COUNTED)
        records["hi"] = generator.integers(0, different, size)
        records["lo"] = generator.integers(0, 30, size)
        records["count"] = generator.integers(1, 5, size)
        records = summed(records)
        for high, low, number in records.tolist():
            expected[high, low] = expected.get((high, low), 0) + number
        runs.append(Run(lambda start, stop, records=records: records[start:stop], 0, len(records)))  # type: ignore[misc]
    found = [record for part in merged(runs, held=10) for record in part.tolist()]
    assert [((high, low), number) for high, low, number in found] == sorted(expected.items())


def test_mistakes(tmp_path: Path) -> None:
    """Missing, foreign and damaged files, and numbers that make no sense, are refused in words."""
    paths = write_shards(tmp_path, documents(20), 2)
    counts = tmp_path / "counts"
    with pytest.raises(UserError, match="--ranges 0"):
        count(Rows(paths[0]), counts / "shard-00000", 0)
    count(Rows(paths[0]), counts / "shard-00000", 2)
    with pytest.raises(InputsMissing, match="lacks 1 of 2"):
        frequent(counts, 2, 0, 2, tmp_path / "out")
    count(Rows(paths[1]), counts / "shard-00001", 3)
    for flags, message in (((2, 0, 2), "2 ranges and"), ((2, 2, 2), "ranges 0 to 1"), ((2, 0, 1), "--min 1")):
        with pytest.raises(UserError, match=message):
            frequent(counts, *flags, tmp_path / "out")
    count(Rows(paths[1]), counts / "shard-00001", 2)
    (counts / "shard-00001.lines").write_bytes(b"x" * 24)
    with pytest.raises(UserError, match="does not agree"):
        frequent(counts, 2, 0, 2, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_commands(tmp_path: Path) -> None:
    """Both commands as a job calls them."""

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "snakmodel.dedup", "lines", *words]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    (path,) = write_shards(tmp_path, ["a\na\nb", "a"], 1)
    counts = tmp_path / "counts"
    done = command("count", "--input", str(path), "--output", f"{counts}/shard-00000", "--ranges", "1")
    assert done.returncode == 0, done.stderr
    flags = ("--counts", str(counts), "--shards", "1", "--range", "0", "--output", f"{tmp_path}/range-00000")
    told = command("frequent", *flags, "--min", "3")
    assert told.returncode == 0, told.stderr
    assert (json.loads(told.stdout)["records"], json.loads(told.stdout)["lines"]) == (1, 3)
    assert read(tmp_path / "range-00000.lines", 0, 1)[["hi", "lo"]].tolist() == [key_of("a")]
    wrong = command("frequent", *flags, "--min", "1")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
