"""Reads Hugging Face datasets where they lie, and writes them without a copy, for the command on one machine.

`datasets` is imported only where it is needed: that takes a second, which the processes of the pool need not spend.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.dedup.signatures import count_rows
from snakmodel.shards.arrow_stream import Rows, write_stream

_LEAST, _MOST = 10_000, 1 << 18
"""The least and the largest number of documents per task, which is also that of a file of the output."""


def load_dataset(args: argparse.Namespace) -> Any:
    """The `datasets.Dataset` that the flags name.

    Raises UserError if it cannot be read, has no rows, or lacks the split or the column.
    """
    import datasets

    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    try:
        if args.local:
            found = datasets.load_from_disk(args.path)
        else:
            found = datasets.load_dataset(
                args.path,
                args.name,
                data_dir=args.data_dir,
                data_files=args.data_files,
                split=args.split,
                revision=args.revision,
                cache_dir=args.cache_dir,
                num_proc=args.num_proc,
                token=args.use_auth_token or None,
            )
    except IndexError as error:  # what `datasets` raises for a folder without files, which it writes itself
        raise UserError(f"--path {args.path} has no rows: there is nothing to deduplicate") from error
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        hint = "a folder that save_to_disk wrote" if args.local else "what datasets.load_dataset takes"
        why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise UserError(f"--path {args.path} cannot be read: {why.rstrip('.')}. Give {hint}.") from error
    if isinstance(found, dict):
        if args.split not in found:
            given = f"--split {args.split}" if args.split else "no --split"
            raise UserError(f"--path {args.path}: {given}, but there are the splits {', '.join(map(repr, found))}")
        found = found[args.split]
    if args.idx_column not in {None, *found.column_names}:
        raise UserError(f"--idx_column {args.idx_column}: the columns are {', '.join(map(repr, found.column_names))}")
    return found


def cut(data: Any, processes: int, work: Path) -> list[Rows]:
    """Cut the rows of the dataset's Arrow files into ranges, in order and several per process.

    A dataset that does not consist of all rows of its files (a slice, or one in memory) is written to `work` first.
    """
    files = [Path(file["filename"]) for file in data.cache_files]
    counts = [count_rows(Rows(file)) for file in files]
    if not files or sum(counts) != len(data) or data._indices is not None:
        files, counts = [work / "input.arrow"], [len(data)]
        schema = data.features.arrow_schema
        tables = data.with_format("arrow").iter(1000)
        write_stream(files[0], schema, (batch for table in tables for batch in table.cast(schema).to_batches()))
    size = min(_MOST, max(_LEAST, -(-len(data) // (8 * processes))))
    shards = []
    for file, count in zip(files, counts, strict=True):
        pieces = -(-count // size)
        edges = [count * piece // pieces for piece in range(pieces + 1)] if pieces else []
        shards += [Rows(file, start, stop) for start, stop in pairwise(edges)]
    return shards or [Rows(files[0], 0, 0)]


def save_dataset(data: Any, files: list[Path], target: Path) -> None:
    """Make a folder that `datasets.load_from_disk` opens, from Arrow files with this dataset's columns.

    The files are moved into the folder.
    """
    data.select(range(0)).save_to_disk(str(target))  # writes features, format and split
    state_file = target / "state.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    for entry in state["_data_files"]:
        (target / entry["filename"]).unlink()
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(target / name)
    state["_data_files"] = [{"filename": name} for name in names]
    state_file.write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
