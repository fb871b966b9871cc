"""Counts the lines of a whole corpus, and finds those that occur often; the step `lines` of the filter removes them.

  count      a shard's documents -> the keys of its lines with their counts, sorted, in R ranges   (a task per shard)
  frequent   range k of every shard -> the keys that occur at least `--min` times                  (a task per range)

The files are the same however often a command is run, and the frequent lines of all ranges together depend neither on
the number of shards nor on the number of ranges.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakmodel.shards.arrow_stream import Rows


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the commands; outputs are given without their suffix."""
    parser = argparse.ArgumentParser(
        prog="snakmodel.dedup lines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    counted = steps.add_parser("count", help="a shard's documents -> the keys of its lines")
    counted.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    counted.add_argument("--ranges", type=int, required=True, help="ranges of the key space")
    counted.add_argument("--column", default="text", help="the column that holds the documents")
    often = steps.add_parser("frequent", help="one range of every shard -> the keys that occur often")
    often.add_argument("--counts", type=Path, required=True, help="the folder that count wrote, as shard-00000 …")
    often.add_argument("--shards", type=int, required=True, help="number of shards")
    often.add_argument("--range", type=int, required=True, help="which range, from 0")
    often.add_argument("--min", type=int, required=True, help="the least number of times that a line occurs")
    for step in steps.choices.values():
        step.add_argument("--output", type=Path, required=True, help="output path without suffix")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Run one of the commands, and return its counts."""
    args = parse_arguments(argv)
    if args.step == "count":
        from snakmodel.dedup.lines.count import count

        return count(Rows(args.input), args.output, args.ranges, args.column)
    from snakmodel.dedup.lines.frequent import frequent

    return frequent(args.counts, args.shards, args.range, args.min, args.output)
