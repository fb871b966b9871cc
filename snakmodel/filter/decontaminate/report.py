"""python -m snakmodel.filter contamination --counts A.json B.json … --output REPORT

Adds the counts that the step `decontaminate` wrote for the shards of a corpus: REPORT.json holds the sums, and
REPORT.md tables of how much of each evaluation file was hit, and which items, by which source and how often.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import encoded, publishing, write_json
from snakmodel.filter.decontaminate.tally import FIXED, added
from snakmodel.shards.counts import bounded, merged

HELP = "adds the counts of the step decontaminate over shards, as tables of which evaluation items were hit"
_STEP = "decontaminate"
_SUMS = ("documents", "kept", "hit", "spans", "emptied")
_ITEMS, _SOURCES = 100, 5
"""How many items of each evaluation file, and how many sources of each, REPORT.md names."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--counts", type=Path, nargs="+", required=True, help="counts of shards, as the step wrote them"
    )
    parser.add_argument("--output", type=Path, required=True, help="output path without suffix")


def run(args: argparse.Namespace) -> None:
    """Write the report, and print the table of evaluation files."""
    read = [(path, counts_of(path)) for path in args.counts]
    check(read)
    total = reduce(summed, (counts for _, counts in read))
    paths = Path(f"{args.output}.json"), Path(f"{args.output}.md")
    with publishing(*paths) as (numbers, text):
        write_json(numbers, total)
        text.write_bytes(encoded("\n".join(as_text(total)) + "\n"))
    print("\n".join(table_of_files(total)))


def counts_of(path: Path) -> dict[str, Any]:
    """The step's counts of a shard. Raises InputsMissing or UserError if the file does not hold any."""
    if not path.is_file():
        raise InputsMissing(f"--counts {path} does not exist; run the step {_STEP} for its shard first")
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))["steps"][_STEP]
        contents(counts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold the counts of the step {_STEP}; give the .json files that it wrote beside its shards"
        ) from error
    return dict(counts)


def check(read: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Raise UserError unless all shards were compared with the same items in the same way."""
    first_path, first = read[0]
    seen = set[Path]()
    for path, counts in read:
        if path.resolve() in seen:
            raise UserError(f"--counts names {path} twice, and its documents would count twice; name each file once")
        seen.add(path.resolve())
        for what in ("ngram", "mode"):
            if counts[what] != first[what]:
                raise UserError(
                    f"{first_path} was made with --{what} {first[what]} and {path} with --{what} {counts[what]}; run "
                    "the step again with the same flags for all shards"
                )
        if contents(counts) != contents(first):
            raise UserError(
                f"{first_path} and {path} were compared with different evaluation files; run the step again with the "
                "same files for all shards"
            )


def contents(counts: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation files hold."""
    return {name: {key: one[key] for key in FIXED} for name, one in counts["files"].items()}


def summed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sum of the step's counts of two shards."""
    return {
        **one,
        **{key: one[key] + other[key] for key in _SUMS if key in one},
        **{key: bounded(dict(sorted(merged(one[key], other[key]).items()))) for key in ("sources", "by_source")},
        "files": {name: added(counts, other["files"][name]) for name, counts in one["files"].items()},
    }


def as_text(total: dict[str, Any]) -> list[str]:
    """The lines of REPORT.md."""
    lines = [
        "# Contamination",
        "",
        f"{total['hit']:,} of {total['documents']:,} documents share {total['ngram']} words in a row, or a whole "
        f"shorter item, with an evaluation item, in {total['spans']:,} spans (mode: {total['mode']}).",
        "",
        *table_of_files(total),
    ]
    for name, counts in total["files"].items():
        if counts["hit_items"]:
            lines += ["", f"## {shown(name)}", "", *table_of_items(counts)]
    return lines


def table_of_files(total: dict[str, Any]) -> list[str]:
    """A table with a row per evaluation file."""
    rows = [["evaluation file", "items", "too short", "matched whole", "items hit", "share", "documents", "spans"]]
    for name, counts in total["files"].items():
        share = 100 * counts["items_hit"] / (counts["items"] - counts["too_short"])
        numbers = [counts[key] for key in ("items", "too_short", "whole", "items_hit")]
        rows.append(
            [
                shown(name),
                *(f"{number:,}" for number in numbers),
                f"{share:.2f} %",
                *(f"{counts[key]:,}" for key in ("documents", "spans")),
            ]
        )
    return table(rows)


def table_of_items(counts: dict[str, Any]) -> list[str]:
    """A table of the items that were hit, those that most documents hit first, and a sentence about the others."""
    items = sorted(counts["hit_items"].items(), key=lambda pair: (-sum(pair[1].values()), int(pair[0])))
    rows = [["item", "documents", "sources"]]
    for number, sources in items[:_ITEMS]:
        ordered = sorted(sources.items(), key=lambda pair: (-pair[1], pair[0]))
        named = [f"{shown(source)} ({documents:,})" for source, documents in ordered[:_SOURCES]]
        more = [f"{len(ordered) - _SOURCES} more"] if len(ordered) > _SOURCES else []
        rows.append([number, f"{sum(sources.values()):,}", ", ".join([*named, *more])])
    if len(rows) > counts["items_hit"]:
        return table(rows)
    left = counts["items_hit"] - len(rows) + 1
    documents = counts["further_items"]["documents"] + sum(sum(sources.values()) for _, sources in items[_ITEMS:])
    return [
        *table(rows),
        "",
        f"{left:,} further items were hit, by {documents:,} documents if each counts once per item.",
    ]


def shown(name: str) -> str:
    """A name as it may stand in a table."""
    return " ".join(name.replace("|", "\\|").split())


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; the first row is its head."""
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *others]
