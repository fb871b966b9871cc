"""A user's own command over a shard: what is checked of its end and of what it wrote."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.config.sections import PROJECT
from snakmodel.filter.custom import run_command
from snakmodel.shards.arrow_stream import open_stream, write_stream

TABLE = pa.table(
    {
        "text": pa.array(["en", "to", "tre", "fire"], pa.large_string()),
        "source": pa.array(["a", "b", "a", "a"]),
        "score": pa.array([1, None, 3, 4]),
    }
)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard with its counts, in a folder whose name has a space."""
    path = tmp_path / "the shards" / "in.arrow"
    path.parent.mkdir()
    write_stream(path, TABLE.schema, TABLE.to_batches(2))
    path.with_suffix(".json").write_text(json.dumps({"documents": 4}))
    return path


def run(shard: Path, command: str) -> dict[str, Any]:
    """Run a command over the shard."""
    return run_command("mine", command, shard, shard.parent / "out")


def writes(shard: Path, table: pa.Table) -> dict[str, Any]:
    """Run a command that writes this table as its output."""
    made = shard.parent / "made"
    write_stream(made, table.schema, table.to_batches())
    return run(shard, f"cp {shlex.quote(str(made))} {{output}}")


def published(shard: Path) -> list[str]:
    """The names in the folder beside the shard, its counts and what the tests put there."""
    return sorted({path.name for path in shard.parent.iterdir()} - {"in.arrow", "in.json", "made", "run"})


def written(shard: Path) -> pa.Table:
    """The documents that a command wrote."""
    with open_stream(shard.parent / "out.arrow") as reader:
        return reader.read_all()


def test_a_command_that_is_as_it_should_be(shard: Path) -> None:
    """It leaves documents out, changes texts and adds a column; the counts are those of what it wrote."""
    rows = [{**row, "text": row["text"].upper(), "length": len(row["text"])} for row in TABLE.to_pylist()[1:]]
    found = writes(shard, pa.Table.from_pylist(rows, TABLE.schema.append(pa.field("length", pa.int64()))))
    sources = {"a": {"documents": 3, "kept": 2}, "b": {"documents": 1, "kept": 1}}
    assert found == {"documents": 3, "steps": {"custom-mine": {"documents": 4, "kept": 3, "sources": sources}}}
    assert published(shard) == ["out.arrow", "out.json"]
    assert json.loads((shard.parent / "out.json").read_text()) == found
    assert written(shard).to_pylist() == rows
    assert run(shard, "cp {input} {output}")["documents"] == 4
    assert written(shard) == TABLE


def test_pythons_own_name(shard: Path) -> None:
    """`python` is the Python that runs the step, and quoted words stay together."""
    found = run(shard, "python -c 'import shutil, sys; shutil.copyfile(*sys.argv[1:])' {input} {output}")
    assert found["documents"] == 4


def test_a_command_that_keeps_nothing(shard: Path) -> None:
    """An empty shard is a shard, and so is one of another order of columns."""
    assert writes(shard, TABLE.slice(0, 0))["documents"] == 0
    assert writes(shard, TABLE.select(["score", "source", "text"]))["documents"] == 4
    assert written(shard).column_names == ["score", "source", "text"]


NOT_UTF_8 = pa.array([b"x", b"\xff", b"y", b"z"], pa.large_binary()).view(pa.large_string())
TABLES: dict[str, tuple[pa.Table, str]] = {
    "loses the text": (TABLE.drop_columns(["text"]), r"has no column 'text'; its columns are 'source', 'score'"),
    "loses a column": (
        TABLE.drop_columns(["score"]),
        r"custom-mine has lost the column 'score'; it wrote text, source",
    ),
    "changes a type": (
        TABLE.set_column(2, "score", TABLE["score"].cast("float64")),
        r"wrote the column 'score' as double; it was int64, and must stay so",
    ),
    "changes the type of the text": (
        TABLE.set_column(0, "text", TABLE["text"].cast("string")),
        r"wrote the column 'text' as string; it was large_string",
    ),
    "has two columns of one name": (
        TABLE.append_column("score", TABLE["score"]),
        r"wrote 2 columns named 'score'; each name may be there once",
    ),
    "adds two columns of one name": (
        TABLE.append_column("new", TABLE["score"]).append_column("new", TABLE["score"]),
        r"wrote 2 columns named 'new'; each name may be there once",
    ),
    "adds a document": (
        pa.concat_tables([TABLE, TABLE.slice(1, 1)]),
        r"wrote 2 documents of the source 'b', of which it was given 1; a command may leave documents out",
    ),
    "moves a document": (
        TABLE.set_column(1, "source", pa.array(["a", "a", "b", "b"])),
        r"wrote 2 documents of the source 'b', of which it was given 1",
    ),
    "makes a source": (
        TABLE.set_column(1, "source", pa.array(["a", "new", "a", "a"])),
        r"wrote 1 documents of the source 'new', of which it was given 0",
    ),
    "forgets a source": (
        TABLE.set_column(1, "source", pa.array(["a", None, "a", "a"])),
        r"wrote 1 documents of the source '\(no source\)', of which it was given 0",
    ),
    "writes a null": (
        TABLE.set_column(0, "text", pa.array(["x", None, "y", "z"], pa.large_string())),
        r"row 1 of column 'text' is null",
    ),
    "writes what is not UTF-8": (TABLE.set_column(0, "text", NOT_UTF_8), r"row 1 of column 'text' is not valid UTF-8"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_refused(shard: Path, case: str) -> None:
    """What is wrong with the documents is said, and nothing is published."""
    table, says = TABLES[case]
    with pytest.raises(UserError, match=says):
        writes(shard, table)
    assert published(shard) == []


ENDS: dict[str, tuple[str, str]] = {
    "exits with an error": ("exit 7", r"has exited with 7; its own message is above\. the command is: sh -c"),
    "writes and then exits with an error": ('cp "$0" "$1"; exit 1', r"has exited with 1"),
    "is killed": ('cp "$0" "$1"; kill -KILL $$', r"was ended by SIGKILL"),
    "is ended by a signal without a name": ("kill -40 $$", r"was ended by signal 40"),
    "writes nothing": ("true", r"has exited with 0, but did not write \{output\}; the command is"),
    "writes to another path": ('cp "$0" "$1.arrow"', r"did not write \{output\}"),
    "makes a folder": ('mkdir "$1"', r"did not write \{output\}"),
    "writes garbage": ('echo no shard at all > "$1"', r"custom-mine: {output} .*not a complete Arrow stream"),
    "writes an empty file": (': > "$1"', r"not a complete Arrow stream"),
    "writes half of a shard": ('head -c 900 "$0" > "$1"', r"not a complete Arrow stream"),
    "writes only the end of a shard": ('tail -c 8 "$0" > "$1"', r"is not an Arrow stream file"),
    "damages a shard": ('(head -c 900 "$0"; tail -c 8 "$0") > "$1"', r"is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_ends_that_are_refused(shard: Path, case: str) -> None:
    """Whatever the command does, what is wrong is said, and nothing is published."""
    script, says = ENDS[case]
    with pytest.raises(UserError, match=says):
        run(shard, f"sh -c {shlex.quote(script)} {{input}} {{output}}")
    assert [name for name in published(shard) if not name.endswith(".arrow")] == []
    assert "out.arrow" not in published(shard)


COMMANDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "is not there": (lambda _: "no-such-program {input} {output}", r"no-such-program: No such file"),
    "may not be run": (lambda folder: f"{shlex.quote(str(folder))}/in.json {{input}} {{output}}", r"Permission denied"),
    "is a folder": (lambda folder: f"{shlex.quote(str(folder))} {{input}} {{output}}", r"Permission denied"),
    "is no program": (lambda folder: f"{shlex.quote(str(folder))}/run {{input}} {{output}}", r"Exec format error"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_that_cannot_be_started(shard: Path, case: str) -> None:
    """The program is named, with the reason."""
    (shard.parent / "run").write_bytes(b"\x00\x01")
    (shard.parent / "run").chmod(0o755)
    make, says = COMMANDS[case]
    with pytest.raises(UserError, match=rf"the command of custom-mine cannot be started: .*{says}"):
        run_command("mine", make(shard.parent), shard, shard.parent / "out")


def test_what_comes_in_is_checked(shard: Path) -> None:
    """Counts beside the shard that say another number, or nothing, and a shard that is gone, are refused beforehand."""
    for content, says in (('{"documents": 5}', "in.json says 5"), ("{}", "does not hold the counts"), ("[", "counts")):
        shard.with_suffix(".json").write_text(content)
        with pytest.raises(UserError, match=says):
            run(shard, "cp {input} {output}")
    shard.with_suffix(".json").unlink()
    assert run(shard, "cp {input} {output}")["documents"] == 4


def test_the_command_line(shard: Path) -> None:
    """A failing command ends with 2, and with one line of ours after the command's own."""
    words = [sys.executable, "-m", "snakmodel.filter", "custom", "--name", "mine", "--input", str(shard)]
    words += ["--output", str(shard.parent / "out"), "--command", "sh -c 'echo own words >&2; exit 3' {input} {output}"]
    failed = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("own words\nerror: the command of custom-mine has exited with 3")
    assert failed.stderr.count("\n") == 2
