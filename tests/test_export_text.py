import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies

from run_contract.errors import InputsMissing, UserError
from snakmodel.chain.build import STAGES
from snakmodel.chain.disk_forecast import forecast
from snakmodel.export_text import export_shard, join
from snakmodel.launch.local_scheduler import check_selection
from snakmodel.shards.arrow_stream import SCHEMA, write_stream
from tests.old_run import Run

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


def write_shard(path: Path, documents: list[str], sources: list[str]) -> Path:
    batch = pa.record_batch([pa.array(documents, pa.large_string()), pa.array(sources, pa.string())], schema=SCHEMA)
    write_stream(path, SCHEMA, [batch])
    return path


@hypothesis.given(strategies.lists(strategies.text(), min_size=1, max_size=8))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    """Whatever characters they hold: jsonl is byte for byte what json.dumps writes, txt has one line a document."""
    folder = tmp_path_factory.mktemp("any")
    counts = export_shard(write_shard(folder / "a.arrow", documents, ["s"] * len(documents)), folder / "o")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    assert (folder / "o.jsonl").read_bytes() == lines.encode()
    flat = [text.replace("\r\n", " ").replace("\r", " ").replace("\n", " ") for text in documents]
    assert (folder / "o.txt").read_bytes() == "".join(text + "\n" for text in flat).encode()
    assert (counts.documents, counts.characters) == (len(documents), sum(map(len, documents)))


def test_every_ascii_character_is_escaped_as_json_does(tmp_path: Path) -> None:
    """All control characters, quotes and backslashes, one by one and in a row."""
    documents = [*map(chr, range(128)), "".join(map(chr, range(128))), '\\"\\n\n']
    export_shard(write_shard(tmp_path / "a.arrow", documents, ["s"] * len(documents)), tmp_path / "o")
    lines = (tmp_path / "o.jsonl").read_bytes()
    assert lines == "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()


def test_counts_by_source(tmp_path: Path) -> None:
    """Documents, characters and bytes of each source, over shards and joined."""
    write_shard(tmp_path / "0.arrow", ["æ", "b", "cc"], ["x", "y", "x"])
    write_shard(tmp_path / "1.arrow", ["d"], ["x"])
    for number in (0, 1):
        export_shard(tmp_path / f"{number}.arrow", tmp_path / f"shards/shard-0000{number}")
    counts = join(tmp_path / "shards", 2, tmp_path / "corpus")
    assert counts.sources == {
        "x": {"documents": 3, "characters": 4, "bytes": 5},
        "y": {"documents": 1, "characters": 1, "bytes": 1},
    }
    report = tmp_path / "shards/shard-00001.json"
    report.write_text(report.read_text().replace('"documents": 1', '"documents": 2', 1))
    with pytest.raises(UserError, match=r"shard-00001\.json: the counts of the sources do not add up"):
        join(tmp_path / "shards", 2, tmp_path / "corpus")


def test_a_shard_that_is_not_what_its_counts_say(tmp_path: Path) -> None:
    """Documents lost or doubled since deduplication, and counts that are none, stop the export."""
    shard = write_shard(tmp_path / "a.arrow", ["x", "y"], ["s", "s"])
    (tmp_path / "a.json").write_text('{"documents": 3}')
    with pytest.raises(UserError, match=r"a\.arrow has 2 documents, a\.json says 3"):
        export_shard(shard, tmp_path / "o")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json does not hold the counts of a shard"):
        export_shard(shard, tmp_path / "o")
    assert not list(tmp_path.glob("*o.*"))


def test_parts_damaged_without_a_change_of_size(parts: Path, tmp_path: Path) -> None:
    """A part in which a line end became another byte is found by the joined file's number of lines."""
    text = parts / "shard-00000.txt"
    text.write_bytes(text.read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(UserError, match=r"the \.txt parts have \d+ bytes and 3 lines, their counts say \d+ and 4"):
        join(parts, 3, tmp_path / "corpus")
    assert not list(tmp_path.glob("*corpus*"))


def test_documents_that_are_not_text(tmp_path: Path) -> None:
    """A null, and bytes that are not UTF-8, in a shard of somebody else's are errors that name it."""
    for name, column in {"null": pa.array(["a", None]), "bytes": pa.array([b"\xff"]).view(pa.string())}.items():
        batch = pa.record_batch({"text": column})
        write_stream(tmp_path / f"{name}.arrow", batch.schema, [batch])
        with pytest.raises(UserError, match=rf"{name}\.arrow: a document is (null|not UTF-8)"):
            export_shard(tmp_path / f"{name}.arrow", tmp_path / "o")


def test_left_out_by_the_recipe(tmp_path: Path) -> None:
    """`text: {export: false}` takes both stages out of the chain and the forecast, and touches no other stage.

    The default keeps them; asking for one that is left out is an error; they can come back to the same run.
    """
    run = Run(tmp_path)
    before = run.plan().chain.keys
    run.recipe["text"] = {"export": False}
    plan = run.plan()
    assert {**plan.chain.keys, "export-text": before["export-text"], "join-text": before["join-text"]} == before
    assert list(before)[6:8] == ["export-text", "join-text"]
    assert not {"export-text", "join-text"} & {*plan.chain.keys, *plan.missing}
    assert forecast(plan.config, {}, 0, 100, 4).parts["text"] == 0
    with pytest.raises(UserError, match=r"export-text: left out.*export-text needs `text: {export: true}`"):
        run.plan(stages=["export-text"])
    with pytest.raises(UserError, match=r"join-text: left out"):
        run.plan("join-text")
    assert check_selection(run.plan(stages=STAGES[:8]), STAGES[:8]) == []
    run.recipe["text"] = {"export": True}
    assert run.plan().chain.keys == before


def test_further_columns_follow_the_text(tmp_path: Path) -> None:
    """The jsonl carries them wherever they stand in the shard, the txt and the counts are those of the text alone.

    Also over several record batches, joined, and for a shard of no documents.
    """
    documents = ['æ "1"\n', "", "to\r\nlinjer", "\x01"]
    further = {"id": [7, 8, None, 9], "meta": [{"url": "u", "tags": ["a"]}, None, {"url": None, "tags": []}, None]}
    table = pa.table(
        {
            "id": further["id"],
            "text": pa.array(documents, pa.large_string()),
            "source": ["s"] * 4,
            "meta": further["meta"],
        }
    )
    plain = table.select(["text", "source"])
    for name, shard in (("rich", table), ("plain", plain)):
        write_stream(tmp_path / f"{name}.arrow", shard.schema, shard.to_batches(3))
        write_stream(tmp_path / f"{name}-none.arrow", shard.schema, [])
        export_shard(tmp_path / f"{name}.arrow", tmp_path / f"{name}/shard-00000")
        export_shard(tmp_path / f"{name}-none.arrow", tmp_path / f"{name}/shard-00001")
    rich, bare = (asdict(join(tmp_path / name, 2, tmp_path / f"{name}-all")) for name in ("rich", "plain"))
    expected = [
        {"text": text, "id": id_, "meta": meta}
        for text, id_, meta in zip(documents, further["id"], further["meta"], strict=True)
    ]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in expected)
    assert (tmp_path / "rich-all.jsonl").read_bytes() == lines.encode()
    assert (tmp_path / "rich-all.txt").read_bytes() == (tmp_path / "plain-all.txt").read_bytes()
    assert rich.pop("jsonl_bytes") > bare.pop("jsonl_bytes")
    assert rich == bare


def test_further_columns_without_json_are_refused(tmp_path: Path) -> None:
    """The shard and the column are named, and nothing is published."""
    batch = pa.record_batch({"text": ["a"], "span": pa.array([1], pa.duration("s"))})
    write_stream(tmp_path / "a.arrow", batch.schema, [batch])
    with pytest.raises(UserError, match=r"a\.arrow: column 'span' holds duration\[s\], which has no form in JSON"):
        export_shard(tmp_path / "a.arrow", tmp_path / "o")
    assert not list(tmp_path.glob("*o.*"))
