import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from snakmodel.arrow import SCHEMA, write_stream
from snakmodel.export_text import export_shard, join
from snakmodel.publish import InputsMissing, UserError

DOCUMENTS = [['æ \u2028 "citat" \\ tab\t', "to\nlinjer\r\nog\ren"], [], ["🐍", ""]]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """The exported pairs of three shards, the second without documents."""
    for number, documents in enumerate(DOCUMENTS):
        batch = pa.record_batch(
            [pa.array(documents, pa.large_string()), pa.array(["s"] * len(documents), pa.string())], schema=SCHEMA
        )
        write_stream(tmp_path / f"shard-{number:05d}.arrow", SCHEMA, [batch])
        export_shard(tmp_path / f"shard-{number:05d}.arrow", tmp_path / f"shards/shard-{number:05d}")
    return tmp_path / "shards"


def test_join_holds_every_document_in_order(parts: Path, tmp_path: Path) -> None:
    """The jsonl reads back to the documents, unescaped; the txt has one line each; counts agree."""
    counts = join(parts, 3, tmp_path / "corpus")
    lines = (tmp_path / "corpus.jsonl").read_bytes().decode().removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [{"text": text} for shard in DOCUMENTS for text in shard]
    assert lines[0] == '{"text": "æ \u2028 \\"citat\\" \\\\ tab\\t"}'
    plain = (tmp_path / "corpus.txt").read_bytes().decode()
    assert plain == 'æ \u2028 "citat" \\ tab\t\nto linjer og en\n🐍\n\n'
    sizes = {f"{suffix}_bytes": (tmp_path / f"corpus.{suffix}").stat().st_size for suffix in ("jsonl", "txt")}
    documents = [text for shard in DOCUMENTS for text in shard]
    amounts = {
        "documents": 4,
        "characters": sum(map(len, documents)),
        "bytes": sum(len(text.encode()) for text in documents),
    }
    expected = {**amounts, **sizes, "sources": {"s": amounts}}
    assert asdict(counts) == json.loads((tmp_path / "corpus.json").read_text()) == expected


def test_parts_are_checked_before_joining(parts: Path, tmp_path: Path) -> None:
    """A missing part, one of another size, one too many and unreadable counts are errors; nothing is published."""
    with pytest.raises(InputsMissing, match=r"lacks 3 files of 4 shards, the first is shard-00003\.jsonl"):
        join(parts, 4, tmp_path / "corpus")
    with pytest.raises(UserError, match="holds shard-00002 although --shards is 2"):
        join(parts, 2, tmp_path / "corpus")
    text = parts / "shard-00000.txt"
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00000\.txt has \d+ bytes, its counts say \d+"):
        join(parts, 3, tmp_path / "corpus")
    (parts / "shard-00000.json").write_text('{"documents": 2')
    with pytest.raises(UserError, match=r"shard-00000\.json does not hold the counts"):
        join(parts, 3, tmp_path / "corpus")
    assert not list(tmp_path.glob("*corpus*"))


def test_command_line(parts: Path, tmp_path: Path) -> None:
    """Both documented commands work; a missing input exits 3 with one line."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakmodel.export_text", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    again = parts / "shard-00000.jsonl"
    before = again.read_bytes()
    done = run("shard", "--input", tmp_path / "shard-00000.arrow", "--output", parts / "shard-00000")
    assert (done.returncode, again.read_bytes()) == (0, before)
    assert run("join", "--input", parts, "--shards", 3, "--output", tmp_path / "corpus").returncode == 0
    absent = run("shard", "--input", tmp_path / "none.arrow", "--output", parts / "none")
    assert (absent.returncode, absent.stderr.count("\n")) == (3, 1)
