"""Removes near-duplicates, in steps that any number of machines can share or in one command on one machine.

  signatures   a shard's documents -> its band keys, sorted and cut into P ranges of the key space   (a task per shard)
  buckets      range p of every shard -> the fewest links that connect documents which share a key   (a task per range)
  components   all links -> the lowest document number of every cluster, and each shard's removals   (one task)
  filter       a shard and its removals -> the documents that are kept                               (a task per shard)
  report       what was removed: sources, clusters, excerpts, as JSON and PNG                        (one task)

Documents are numbered through all shards in order. The document with the lowest number of a cluster survives, so the
result depends neither on the number of shards nor on the number of ranges. Every file names the texts and the
parameters from which it was made. With `--against`, buckets and components number the documents of earlier runs before
this run's, and only this run's documents are removed: see earlier_runs.py. Without the name of a step, the command
takes text-dedup's flags and does the first four steps itself: see one_machine.py. Lines that occur often are found by
`lines count` and `lines frequent`: see lines/commands.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_contract.entry_point import run_main
from snakmodel.dedup.flags import add_parameters, parameters_of
from snakmodel.dedup.minhash.parameters import SHORT_POLICIES
from snakmodel.dedup.signature_file import numbered
from snakmodel.shards.arrow_stream import Rows

STEPS = ("signatures", "buckets", "components", "filter", "report")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the sub-commands; outputs are given without their suffix."""
    parser = argparse.ArgumentParser(prog="snakmodel.dedup", description="near-duplicate removal, one step at a time")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("signatures", help="a shard's documents -> its band keys")
    step.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    step.add_argument("--ranges", type=int, required=True, help="ranges of the key space")
    add_parameters(step, num_perm=64, threshold=0.85)
    step.add_argument("--short_docs", choices=SHORT_POLICIES, default="exact", help="what to do with short documents")
    bucket = steps.add_parser("buckets", help="one range of every shard -> links")
    bucket.add_argument("--range", type=int, required=True, help="which range, from 0")
    bucket.add_argument("--texts", type=Path, help="the folder of the Arrow shards: verify links by Jaccard similarity")
    joined = steps.add_parser("components", help="all links -> clusters and removal lists")
    joined.add_argument("--buckets", type=Path, required=True, help="the folder of the links")
    joined.add_argument("--ranges", type=int, required=True, help="ranges of the key space")
    joined.add_argument("--cluster_size", action="store_true", help="also write the cluster sizes of kept documents")
    kept = steps.add_parser("filter", help="a shard and its removals -> the documents kept")
    kept.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    kept.add_argument("--removed", type=Path, required=True, help="the shard's removal list")
    kept.add_argument("--sizes", type=Path, help="the shard's cluster sizes: append a column cluster_size")
    seen = steps.add_parser("report", help="sources, clusters and excerpts as JSON and PNG")
    seen.add_argument("--texts", type=Path, required=True, help="the folder of the Arrow shards")
    seen.add_argument("--components", type=Path, required=True, help="the folder that components wrote")
    for step in (bucket, joined):
        step.add_argument("--signatures", type=Path, required=True, help="the folder of the signature files")
        step.add_argument("--against", type=Path, nargs="+", default=[], metavar="RUN", help="folders of earlier runs")
    for step in (bucket, joined, seen):
        step.add_argument("--shards", type=int, required=True, help="number of shards")
    for step in (steps.choices["signatures"], bucket, seen):
        step.add_argument("--column", default="text", help="the column that holds the documents")
    for step in steps.choices.values():
        step.add_argument("--output", type=Path, required=True, help="output path without suffix")
    return parser.parse_args(argv)


def shard_files(folder: Path, shards: int) -> list[Rows]:
    """The Arrow shards in a folder. Raises InputsMissing or UserError if they are not exactly `shards` many."""
    return [Rows(path) for path in numbered(folder, "shard", ".arrow", shards, "--shards")]


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    """Run one step, for one shard or range if the step has several tasks, and return its counts."""
    if args.step == "signatures":
        from snakmodel.dedup.signatures import signatures

        return signatures(Rows(args.input), args.output, args.column, args.ranges, parameters_of(args))
    if args.step == "buckets":
        from snakmodel.dedup.buckets import buckets

        texts = shard_files(args.texts, args.shards) if args.texts else None
        return buckets(args.signatures, args.shards, args.range, args.output, texts, args.column, args.against)
    if args.step == "components":
        from snakmodel.dedup.components import components

        return components(
            args.signatures, args.buckets, args.shards, args.ranges, args.output, args.against, args.cluster_size
        )
    if args.step == "filter":
        from snakmodel.dedup.filter import filter_shard

        return filter_shard(Rows(args.input), args.removed, args.output, args.sizes)
    from snakmodel.dedup.report import report

    return report(shard_files(args.texts, args.shards), args.column, args.components, args.output)


def main() -> None:
    """python -m snakmodel.dedup signatures|buckets|components|filter|report --output PATH …
    python -m snakmodel.dedup lines count|frequent --output PATH …
    python -m snakmodel.dedup --path DATASET --local --split train --output PATH --column text …

    Runs one step for one shard or range and prints its counts, or all of them on one machine.
    """
    argv = sys.argv[1:]
    if argv and argv[0] in STEPS:
        print(json.dumps(run_step(parse_arguments(argv)), ensure_ascii=False))
        return
    if argv and argv[0] == "lines":
        from snakmodel.dedup.lines.commands import run

        print(json.dumps(run(argv[1:]), ensure_ascii=False))
        return
    from snakmodel.dedup.one_machine import deduplicate

    deduplicate(argv)


if __name__ == "__main__":
    run_main(main)
