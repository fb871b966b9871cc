"""Turns raw text into Hugging Face datasets on one machine, as the published preprocess_to_hf.py does.

Each named source, and `all` for the named ones together, becomes OUTPUT/NAME/train/train, which text_dedup accepts as
its --path. `datasets.load_from_disk` opens this folder, OUTPUT/NAME/train (a dictionary with the split `train`) and
OUTPUT/NAME.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.process_pool import workers
from snakmodel.prepare.input_files import ALL, plan_shards, selection, source_names
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, ShardCounts, write_shard
from snakmodel.shards.append_file import append_file
from snakmodel.shards.arrow_stream import SCHEMA

_SPLIT = Path("train", "train")
_DATA_FILE_BYTES = 4 * 10**9


def write_datasets(
    folder: Path, names: Sequence[str], output: Path, reading: Reading, cleaning: Cleaning
) -> dict[str, ShardCounts]:
    """Write a dataset for each name, and return a mapping from the datasets' paths to their counts.

    `all` alone stands for every source. Raises UserError if a name is unknown or a dataset would have no documents.
    """
    sources = [name for name in dict.fromkeys(names) if name != ALL]
    if ALL in names and ALL in (known := source_names(folder)):
        raise UserError(
            f"{folder} has a source named {ALL!r}, the word for all of them; rename it ({', '.join(known)})"
        )
    if not names:
        raise UserError(f"--dataset_names is empty; {folder} has {', '.join(source_names(folder))}")
    sources = sources or source_names(folder)
    found = selection(folder, dict.fromkeys(sources, 1.0))
    for note in found.notes():
        print(f"note: {note}", file=sys.stderr)
    print(found.sums())
    write = partial(write_shard, reading=reading, cleaning=cleaning)
    try:
        with workers(_cores(), get_context("spawn")) as pool:
            made = {
                name: _write_dataset(folder, name, output / name, partial(pool.map, write), reading.encoding)
                for name in sources
            }
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, perhaps because memory ran out; run this again on a larger node"
        ) from error
    if ALL in names:
        made[ALL] = _write_concatenation(output, made)
    return {str(output / name): counts for name, counts in made.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _write_dataset(
    folder: Path, name: str, output: Path, write: Callable[..., Iterator[ShardCounts]], encoding: str
) -> ShardCounts:
    """Write the dataset of one source.

    `write` maps, in parallel, the parts of the data files and the files' paths to counts. Raises UserError if no
    document can be kept.
    """
    plan = plan_shards(folder, {name: 1.0}, None, _DATA_FILE_BYTES, encoding=encoding)
    if len(plan) < _cores():
        plan = plan_shards(folder, {name: 1.0}, _cores(), 1, encoding=encoding)
    counts = ShardCounts()
    with publishing(output) as (made,):
        (made / _SPLIT).mkdir(parents=True)
        paths = [made / _SPLIT / _data_file(number, len(plan)) for number in range(len(plan))]
        for part in write(plan, paths):
            counts.add(part)
        if not counts.documents:
            raise UserError(f"{folder}: source {name!r} has no documents that could be kept ({counts})")
        _describe(made, [path.name for path in paths])
    return counts


def _write_concatenation(output: Path, parts: dict[str, ShardCounts]) -> ShardCounts:
    """Write OUTPUT/all from the datasets beside it, by copying their files as they are."""
    files = [path for name in parts for path in sorted((output / name / _SPLIT).glob("*.arrow"))]
    counts = ShardCounts()
    with publishing(output / ALL) as (made,):
        (made / _SPLIT).mkdir(parents=True)
        names = [_data_file(number, len(files)) for number in range(len(files))]
        for source, name in zip(files, names, strict=True):
            with (made / _SPLIT / name).open("wb") as sink:
                append_file(sink, source)
        for part in parts.values():
            counts.add(part)
        _describe(made, names)
    return counts


def _data_file(number: int, of: int) -> str:
    return f"data-{number:05d}-of-{of:05d}.arrow"


def _describe(folder: Path, files: Sequence[str]) -> None:
    """Write the files that `datasets` keeps beside the data, for the split and for the folder as a whole."""
    features = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in SCHEMA}
    for place, below in ((folder, f"{_SPLIT}/"), (folder / _SPLIT, "")):
        write_json(place / "dataset_info.json", {"features": features})
        state: dict[str, object] = {
            "_data_files": [{"filename": below + file} for file in files],
            "_fingerprint": secrets.token_hex(8),  # always new, as `datasets` finds cached results by it
            **dict.fromkeys(("_format_columns", "_format_type", "_split")),
            "_format_kwargs": {},
            "_output_all_columns": False,
        }
        write_json(place / "state.json", state)
    write_json(folder / _SPLIT.parent / "dataset_dict.json", {"splits": [_SPLIT.name]})
