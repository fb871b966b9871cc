"""python -m snakmodel.dedup --path P --local --split train --output O --column text --num_perm 64 --threshold 0.85 …

Does all of near-deduplication on one machine, with text-dedup's flags. A dataset is cut into ranges of rows, a pool of
processes runs the package's steps over them, and the result is a dataset with all columns. The texts are read where
they lie, from the dataset's own Arrow files; only the rows that are kept are written. Signatures are not kept, so that
there is no `--against` here: a dataset that is to grow is deduplicated by a recipe.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from run_contract.errors import UserError
from run_contract.publish import publishing
from snakmodel.dedup.buckets import buckets
from snakmodel.dedup.components import DROPPED, components
from snakmodel.dedup.filter import filter_shard
from snakmodel.dedup.flags import add_parameters, parameters_of
from snakmodel.dedup.hf_dataset import cut, load_dataset, save_dataset
from snakmodel.dedup.minhash.parameters import SHORT_POLICIES, Parameters
from snakmodel.dedup.process_pool import TaskPool, pool
from snakmodel.dedup.signatures import count_rows, signatures
from snakmodel.shards.arrow_stream import Rows

_SHORT_DEFAULT = {"text-dedup-0.4.0": "drop", "text-dedup-0.3.1": "collapse"}
_RANGE = 1 << 20
"""The number of keys per range of the key space, which then takes 70 MB of memory."""
_PAD = 32


def deduplicate(argv: Sequence[str]) -> None:
    """Read, deduplicate and write one dataset. If it raises UserError, nothing is published."""
    args = parse_arguments(argv)
    parameters = parameters_of(args, short_docs=args.short_docs or _SHORT_DEFAULT[args.compat])
    bands, rows = parameters.banding()
    parameters = replace(parameters, b=bands, r=rows)  # found once, not in every process
    output = Path(args.output).absolute()
    refuse(args, output)
    timer = Timer()
    with timer("Total"), publishing(output) as (target,), pool(args.num_proc) as run:
        work = target / ".work"
        work.mkdir(parents=True)
        with timer("Loading"):
            data = load_dataset(args)
            shards = cut(data, args.num_proc, work)
        texts = shards if args.verify_jaccard else None
        stats = run_steps(run, timer, shards, texts, args.column, parameters, work)
        with timer("Saving"):
            save_dataset(data, sorted((work / "kept").glob("*.arrow")), target)
            if args.debug:
                write_clusters(data, args.idx_column, work / "components" / "labels.npy", target / "clusters.parquet")
            shutil.rmtree(work)
    summary = {"Before": stats["documents"], f"Short ({parameters.short_docs})": stats["short_documents"]}
    timer.report({**summary, **stats.get("verified", {}), "After": stats["kept"]})


def run_steps(
    run: TaskPool,
    timer: Timer,
    shards: list[Rows],
    texts: list[Rows] | None,
    column: str,
    parameters: Parameters,
    work: Path,
) -> dict[str, Any]:
    """Run signatures, buckets, components and filter, each over all shards, and return the statistics."""
    signed, linked, joined, kept = (work / name for name in ("signatures", "buckets", "components", "kept"))
    names = [f"shard-{number:05d}" for number in range(len(shards))]
    keys = sum(count_rows(shard) for shard in shards) * parameters.banding()[0]
    ranges = max(run.processes, -(-keys // _RANGE))
    with timer("MinHashing"):
        tasks = [(shard, signed / name, column, ranges, parameters) for shard, name in zip(shards, names, strict=True)]
        run("signatures", signatures, tasks)
    with timer("Clustering"):
        parts = [(signed, len(shards), part, linked / f"range-{part:05d}", texts, column) for part in range(ranges)]
        run("buckets", buckets, parts)
        stats = components(signed, linked, len(shards), ranges, joined)
    with timer("Filtering"):
        removed = joined / "removed"
        lists = [(shard, removed / f"{name}.npy", kept / name) for shard, name in zip(shards, names, strict=True)]
        run("filtering", filter_shard, lists)
    return stats


def write_clusters(data: Any, idx_column: str | None, labels: Path, path: Path) -> None:
    """Write clusters.parquet: document number, cluster number (null if dropped as short), and the `idx_column`."""
    import pyarrow as pa
    from pyarrow import parquet

    clusters = np.load(labels, mmap_mode="r")
    table = pa.table(
        {"document": np.arange(len(clusters)), "cluster": pa.array(clusters, mask=np.asarray(clusters == DROPPED))}
    )
    if idx_column:
        index = data.select_columns([idx_column]).with_format("arrow")[:]
        table = table.append_column(idx_column, index.column(idx_column))
    parquet.write_table(table, path)


class Timer:
    """The seconds that each step takes, as text-dedup reports them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def report(self, counts: dict[str, Any]) -> None:
        """Print the seconds of all steps, and these counts."""
        for name, seconds in self.seconds.items():
            print(f"{name:<{_PAD}}: {seconds:.2f}s")
        for name, count in counts.items():
            print(f"{name:<{_PAD}}: {count}")


def refuse(args: argparse.Namespace, output: Path) -> None:
    """Raise UserError for flags that this command cannot follow, and print a note about a seed, which has no effect."""
    if args.hash_bits != 64:
        raise UserError(
            f"--hash_bits {args.hash_bits}: only 64 is supported, text-dedup's default; with 32 the signatures are "
            "others, and with 128 text-dedup itself takes 64"
        )
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc}: must be 1 or more")
    if args.seed != 42:
        print(f"note: --seed {args.seed} has no effect, as in text-dedup: the permutations are always those of seed 42")
    source = Path(args.path).absolute()
    if output.exists() and source.exists() and (output.samefile(source) or output in source.parents):
        raise UserError(f"--output {output} would replace the input {source}; give another folder")
    if output.exists() and not ((output / "state.json").is_file() or (output.is_dir() and not any(output.iterdir()))):
        raise UserError(f"--output {output} exists and is not a dataset; remove it or give another folder")


def boolean(word: str) -> bool:
    """The value of a flag that is true or false. Raises argparse.ArgumentTypeError if it is neither."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return known[word.lower()]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse text-dedup's flags, with its defaults, and our own."""
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.dedup",
        description="Near-deduplicate one dataset on one machine. One step at a time, for job arrays: "
        "python -m snakmodel.dedup signatures|buckets|components|filter|report --help",
        allow_abbrev=False,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--path", required=True, help="a folder written by save_to_disk (--local), or what datasets.load_dataset takes")
    for name in ("name", "data_dir", "data_files", "revision"):
        add(f"--{name}", help=f"`{name}` in load_dataset")
    add("--split", help="the split to take of a dataset that has several")
    add("--cache_dir", default=".cache", help="`cache_dir` in load_dataset (default %(default)s)")
    token = "use the stored token of the Hub: true or false"
    add("--use_auth_token", type=boolean, nargs="?", const=True, default=False, help=token)
    add("--local", action=switch, default=False, help="the path is a folder written by save_to_disk")
    add("--output", required=True, help="the folder of the deduplicated dataset, for datasets.load_from_disk")
    add("--debug", action=switch, default=False, help="also write clusters.parquet: document and cluster numbers")
    add("--clean_cache", action=switch, default=True, help="no effect: no cache files are made")
    cores = len(os.sched_getaffinity(0))
    add("--num_proc", type=int, default=cores, help="processes (default: the cores, %(default)s)")
    add("--column", required=True, help="the column that holds the documents")
    add("--idx_column", help="with --debug: a column that clusters.parquet repeats")
    add("--batch_size", type=int, default=10_000, help="no effect: the size of a batch does not change the result")
    add("--seed", type=int, default=42, help="no effect, as in text-dedup")
    add("--hash_bits", type=int, default=64, help="only 64")
    add_parameters(parser, num_perm=250, threshold=0.7)
    policies = ", ".join(f"{policy} for {compat}" for compat, policy in _SHORT_DEFAULT.items())
    add("--short_docs", choices=SHORT_POLICIES, help=f"what to do with short documents (default {policies})")
    add("--verify_jaccard", action="store_true", help="link only documents whose true Jaccard similarity passes")
    return parser.parse_args(argv)
