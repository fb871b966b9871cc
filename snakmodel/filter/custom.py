"""Runs a user's own command over a shard, and checks the shard that it wrote.

The command gets the paths of two Arrow stream files, writes the second one and exits with 0. It may leave documents
out, change texts and columns, and add columns; it may not add documents, lose a column, or move documents to another
source.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.filter.shard import StepCounts, check_inflow, checked
from snakmodel.shards.arrow_stream import column_index, documents_by_source, open_stream
from snakmodel.shards.counts import bounded, merged

HELP = "Runs a command of your own over a shard, and checks what it wrote."


def run_command(name: str, command: str, source: Path, output: Path) -> dict[str, Any]:
    """Write what a command makes of a shard as `output`.arrow, and the counts as `output`.json; returns the counts.

    `command` holds {input} and {output}, which become the paths of the two shards; `python` as its first word stands
    for the Python that runs this. Nothing is published if the command fails. Raises UserError if it cannot be started,
    exits with an error, or does not write the shard that is expected.
    """
    before = _documents(source)
    check_inflow(source, sum(before[1].values()))
    with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
        words = [word.replace("{input}", str(source)).replace("{output}", str(arrow)) for word in shlex.split(command)]
        if words[0] == "python":
            words[0] = sys.executable
        _run(name, words)
        if not arrow.is_file():
            raise UserError(
                f"the command of custom-{name} has exited with 0, but did not write {{output}}; {_said(words)}"
            )
        try:
            after = _documents(arrow)
        except UserError as error:
            raise UserError(f"the command of custom-{name}: {str(error).replace(str(arrow), '{output}')}") from error
        _check(name, before, after)
        counts = StepCounts(
            documents=sum(before[1].values()),
            kept=sum(after[1].values()),
            sources=bounded({key: {"documents": n, "kept": after[1].get(key, 0)} for key, n in before[1].items()}),
        )
        total = {"documents": counts.kept, "steps": {f"custom-{name}": counts.as_json()}}
        write_json(report, total)
    return total


def _run(name: str, words: list[str]) -> None:
    try:
        code = subprocess.run(words, check=False).returncode
    except OSError as error:
        raise UserError(
            f"the command of custom-{name} cannot be started: {words[0]}: {error.strerror}; {_said(words)}"
        ) from error
    if code:
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"has exited with {code}"
        raise UserError(f"the command of custom-{name} {how}; its own message is above. {_said(words)}")


def _signal_name(number: int) -> str:
    """The name of a signal; those for programs' own use have only a number."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _said(words: list[str]) -> str:
    return f"the command is: {shlex.join(words)}"


def _documents(path: Path) -> tuple[Any, dict[str, int]]:
    """The schema of a shard, and its number of documents by source. Raises UserError if it is no shard of documents."""
    found: dict[str, int] = {}
    with open_stream(path) as reader:
        for column in ("text", "source"):
            column_index(reader, column, path)
        for batch in checked(reader, path):
            found = merged(found, documents_by_source(batch))
        return reader.schema, found


def _check(name: str, before: tuple[Any, dict[str, int]], after: tuple[Any, dict[str, int]]) -> None:
    """Raise UserError if the shard after the command could not have been made from the one before."""
    names = after[0].names
    if repeated := [one for one in names if names.count(one) > 1]:
        raise UserError(
            f"the command of custom-{name} wrote {names.count(repeated[0])} columns named {repeated[0]!r}; each name "
            "may be there once"
        )
    for field in before[0]:
        if field.name not in names:
            raise UserError(
                f"the command of custom-{name} has lost the column {field.name!r}; it wrote "
                f"{', '.join(names)}. Copy all columns, and add what is new behind them"
            )
        if after[0].field(field.name).type != field.type:
            raise UserError(
                f"the command of custom-{name} wrote the column {field.name!r} as {after[0].field(field.name).type}; "
                f"it was {field.type}, and must stay so"
            )
    for source, number in after[1].items():
        if number > before[1].get(source, 0):
            raise UserError(
                f"the command of custom-{name} wrote {number} documents of the source {source!r}, of which it was "
                f"given {before[1].get(source, 0)}; a command may leave documents out, but not add any"
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--name", required=True, help="the name of the stage, without custom-")
    parser.add_argument("--command", required=True, help="the command line, with {input} and {output}")
    parser.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    parser.add_argument("--output", type=Path, required=True, help="output path without suffix")


def run(args: argparse.Namespace) -> None:
    """Run the command and print the counts."""
    print(json.dumps(run_command(args.name, args.command, args.input, args.output), ensure_ascii=False))
