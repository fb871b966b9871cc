"""Counts the lines of a shard: batch -> keys -> sorted runs on disk -> each key once, in ranges of the key space."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.lines.key_file import COUNTED, HELD, SUFFIX, Run, borders, merged, read_from, summed, write
from snakmodel.dedup.minhash.hasher import buffers
from snakmodel.dedup.minhash.parameters import KEY_POINTS
from snakmodel.shards.arrow_stream import Rows, arrays

Numbers = NDArray[np.int64]
Longs = NDArray[np.uint64]


def count(source: Rows, output: Path, ranges: int, column: str = "text") -> dict[str, Any]:
    """Write the keys of a shard's lines, `output`.lines, and what they are, `output`.json; returns the latter.

    Holds a batch of documents and HELD records in memory, and uses 24 bytes of disk per line beside the output.
    """
    if ranges < 1:
        raise UserError(f"--ranges {ranges}: must be 1 or more")
    documents = lines = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        publishing(Path(f"{output}{SUFFIX}"), Path(f"{output}.json")) as (path, report),
        tempfile.TemporaryFile(dir=output.parent) as spilled,
    ):
        runs: list[Run] = []
        waiting, held = list[NDArray[np.void]](), 0
        for values in arrays(source, column):
            _, keys = lines_of(values, documents)
            documents, lines = documents + len(values), lines + len(keys)
            waiting.append(counted(keys))
            held += len(keys)
            if held >= HELD:
                runs.append(_spill(spilled, waiting, runs))
                waiting, held = [], 0
        runs.append(_spill(spilled, waiting, runs))
        starts, distinct = np.zeros(ranges + 1, np.int64), 0
        with path.open("wb") as file:
            for records in merged(runs):
                write(file, records)
                distinct += len(records)
                starts[1:] += np.bincount(np.searchsorted(borders(ranges), records["hi"], "right"), minlength=ranges)
        found = {"step": "count", "documents": documents, "lines": lines, "records": distinct, "ranges": ranges}
        write_json(report, {**found, "starts": np.cumsum(starts).tolist()})
    return found


def lines_of(values: Any, first_row: int = 0) -> tuple[Numbers, Longs]:
    """The table of lines, (k, 4), see `kernel`, and the keys, (k, 2), of an Arrow array of documents."""
    from snakmodel.dedup.lines.kernel import find_lines

    data, offsets = buffers(values, first_row)
    room = int(np.count_nonzero(data[offsets[0] : offsets[-1]] == ord("\n"))) + len(values)
    lines, keys = np.empty((room, 4), np.int64), np.empty((room, 2), np.uint64)
    found = find_lines(data, offsets, np.array(KEY_POINTS, np.uint64), lines, keys)
    return lines[:found], keys[:found]


def counted(keys: Longs) -> NDArray[np.void]:
    """A record for each key, with the count 1."""
    records = np.empty(len(keys), COUNTED)
    records["hi"], records["lo"], records["count"] = keys[:, 0], keys[:, 1], 1
    return records


def _spill(file: Any, waiting: list[NDArray[np.void]], runs: list[Run]) -> Run:
    """Append sorted records to the file of runs, and return where they are."""
    records = summed(np.concatenate([np.empty(0, COUNTED), *waiting]))
    start = runs[-1].stop if runs else 0
    file.seek(start * COUNTED.itemsize)
    write(file, records)
    return Run(partial(read_from, file), start, start + len(records))
