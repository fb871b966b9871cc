"""Files of keys of lines with their numbers, sorted by key, and how many of them are added in bounded memory.

A file PATH.lines holds records of the type COUNTED, little-endian, each key once and in rising order; PATH.json beside
it holds the number of records and what else is known about them. A key is of 128 bits, of which 122 carry information:
two polynomials modulo 2⁶¹ - 1. Among 10¹¹ different lines (2⁷² pairs) of 100 bytes, which are 17 coefficients, any two
agree in both with a probability of about 2⁷² · (17 / 2⁶¹)² = 2⁻⁴². Of keys of 64 bits, hundreds of pairs would agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError

COUNTED = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("count", "<u8")])
"""A key in two halves, and how often the line occurs."""
SUFFIX = ".lines"
HELD = 1 << 21
"""The number of records that are added at a time: 50 MB, and some 300 MB with what sorting takes."""
_LEAST = 256
"""The fewest records that are read from a file at a time."""

Records = NDArray[np.void]


@dataclass
class Run:
    """Sorted records that are read part by part."""

    read: Callable[[int, int], Records]
    """Reads records from one position up to another."""
    at: int
    stop: int
    held: Records = field(default_factory=lambda: np.empty(0, COUNTED))

    def fill(self, most: int) -> None:
        """Hold at least `most` records, or all that are left."""
        if len(self.held) < most and self.at < self.stop:
            upto = min(self.stop, self.at + most)
            self.held = np.concatenate([self.held, self.read(self.at, upto)])
            self.at = upto

    def take(self, border: Any) -> Records:
        """Take the records with an upper half below the border, or all if it is None."""
        count = len(self.held) if border is None else int(np.searchsorted(self.held["hi"], border))
        taken, self.held = self.held[:count], self.held[count:]
        return taken


def merged(runs: Iterable[Run], held: int = HELD) -> Iterator[Records]:
    """Yield the records of all runs in rising order, each key once with the sum of its counts, in parts.

    Holds about `held` records of all runs together.
    """
    left = list(runs)
    each = max(_LEAST, held // max(1, len(left)))
    while left:
        for run in left:
            run.fill(each)
        left = [run for run in left if len(run.held)]
        border = min((run.held["hi"][-1] for run in left if run.at < run.stop), default=None)
        parts = [part for run in left if len(part := run.take(border))]
        if parts:
            yield summed(np.concatenate(parts)) if len(parts) > 1 else parts[0]
        else:  # all that is held of a run has the same upper half
            each *= 2


def summed(records: Records) -> Records:
    """The records sorted, each key once with the sum of its counts."""
    order = np.argsort(records["hi"])
    high, low = records["hi"][order], records["lo"][order]
    same = high[1:] == high[:-1]
    if (same & (low[1:] != low[:-1])).any():
        order = np.lexsort((records["lo"], records["hi"]))
        high, low = records["hi"][order], records["lo"][order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same])[: len(order)])
    found = np.empty(len(starts), COUNTED)
    found["hi"], found["lo"] = high[starts], low[starts]
    found["count"] = np.add.reduceat(records["count"][order], starts) if len(starts) else 0
    return found


def borders(ranges: int) -> NDArray[np.uint64]:
    """The first upper half of each range of the key space but the first: p·2⁶⁴/R for p = 1 … R - 1, rounded up."""
    return np.array([-(-(part << 64) // ranges) for part in range(1, ranges)], np.uint64)


def write(file: BinaryIO, records: Records) -> None:
    """Append records to a file."""
    file.write(records.tobytes())


def read_from(file: BinaryIO, start: int, stop: int) -> Records:
    """The records from one position up to another."""
    file.seek(start * COUNTED.itemsize)
    return np.frombuffer(file.read((stop - start) * COUNTED.itemsize), COUNTED)


def read(path: Path, start: int, stop: int) -> Records:
    """The same of a file that is opened for it, because thousands of files cannot be open at a time."""
    with path.open("rb") as file:
        return read_from(file, start, stop)


def about(path: Path, step: str) -> dict[str, Any]:
    """What the .json beside a file says. Raises InputsMissing or UserError if the two do not agree."""
    beside = path.with_suffix(".json")
    if missing := [str(one) for one in (path, beside) if not one.is_file()]:
        raise InputsMissing(f"{' and '.join(missing)} missing; run dedup lines {step} first")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        intact = path.stat().st_size == found["records"] * COUNTED.itemsize and found["step"] == step
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"{path} does not agree with {beside.name} beside it, or was not written by dedup lines {step}; run that "
            "step again"
        )
    return dict(found)
