"""python Megatron-LLM/tools/build_index.py --data_path PREFIX --seq_length N --train_iters N --global_batch_size N …

Writes the order of a training run's samples to index files in --index_path (default: PREFIX.index). Every rank of
finetune.py maps these files instead of building the order. The flags are those of finetune.py; these affect the order:
the data paths, --split, --seed, --seq_length, --global_batch_size, --train_iters or --train_samples, --eval_interval
and --eval_iters. An index that is already there and complete is left alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_llm.data import gpt_dataset, sample_order_files
from megatron_llm.data.gpt_dataset import SPLITS, DataPaths, SplitPlan
from megatron_llm.data.indexed_dataset import IndexedDataset
from megatron_llm.flags import parser as flags_parser
from megatron_llm.flags.arguments import Arguments
from run_contract.entry_point import run_main
from run_contract.errors import UserError

NOT_NEEDED = ("save", "lr", "micro_batch_size")


def main() -> None:
    """Plan the three splits, then build the indices that are missing."""
    args = flags_parser.parse(sys.argv[1:], optional=NOT_NEEDED, prog="build_index.py", description=__doc__ or "")
    if args.model.seq_length is None:
        raise UserError("--seq_length is missing; no checkpoint is read here, so give the number that the run will use")
    if args.training.global_batch_size is None:
        raise UserError(
            "--global_batch_size is missing, and the number of samples of the run depends on it; give the run's"
        )
    paths = args.data.paths()
    folder = args.data.index_path or paths.index_folder()
    plans = plan(args, paths, args.samples(args.training.global_batch_size))
    print(f"memory: up to {forecast(plans) / 1e9:.2f} GB", flush=True)
    for one in plans:
        build(one, folder)


def plan(args: Arguments, paths: DataPaths, samples: tuple[int, int, int]) -> list[SplitPlan]:
    """The plans of what each split reads.

    A test split that fills no sample is left out, because training does not read it.
    """
    opened = {prefix: IndexedDataset(prefix) for prefix in paths.prefixes()}
    plans = []
    for number, wanted in enumerate(samples):
        if not wanted or (SPLITS[number] == "test" and paths.split is None and not paths.test):
            continue
        try:
            plans.append(
                gpt_dataset.plan_split(paths, opened, number, wanted, args.training.seed, args.model.seq_length)
            )
        except UserError as error:
            if SPLITS[number] != "test":
                raise
            print(f"no index for test: {error}", flush=True)
    return plans


def forecast(plans: list[SplitPlan]) -> int:
    """Memory needed in bytes: the arrays of the largest split, the mapped .idx files, and Python with its libraries."""
    tables = {dataset.prefix: 20 * len(dataset) for one in plans for dataset in one.datasets}
    return max(one.bytes() for one in plans) + sum(tables.values()) + 150_000_000


def build(one: SplitPlan, folder: Path) -> None:
    """Build and publish the index of a split, unless there is a valid one."""
    began, description = time.perf_counter(), one.description()
    manifest = sample_order_files.manifest_path(folder, one.split, description)
    if manifest.exists():
        try:
            sample_order_files.verify(manifest)
        except UserError as error:
            print(f"{error} (this is done now)", flush=True)
        else:
            print(f"{one.split}: {manifest} is there already", flush=True)
            return
    sample_order_files.write(manifest, description, one.build())
    print(
        f"{one.split}: {one.samples()} samples of {sum(order.last - order.first for order in one.orders)} documents, "
        f"{max(order.epochs for order in one.orders)} epoch(s), {one.bytes() / 1e6:.1f} MB "
        f"in {time.perf_counter() - began:.1f} s: {manifest}",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
