"""The step `lines`: removes the lines that occur often in the whole corpus, as `snakmodel.dedup lines` has found them.

batch -> the keys of its lines -> the places of those that are frequent -> texts without these lines, and the counts

All occurrences are removed. To keep the first one of the corpus, the counts of each shard would have to hold its place.
A blank line that follows directly on a removed line goes with it where a blank line or the begin of the document comes
before; otherwise a document stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.dedup.lines.count import lines_of
from snakmodel.dedup.lines.key_file import SUFFIX, about, read
from snakmodel.dedup.signature_file import numbered
from snakmodel.filter.quality.measures import Numbers, buffers, strings
from snakmodel.shards.arrow_stream import NO_SOURCE, source_names
from snakmodel.shards.counts import bounded, merged

HELP = "Removes lines that occur often in the whole corpus."
SAMPLES, SAMPLE_CHARACTERS = 20, 200
"""The number of the most frequent lines that the counts show, and the characters that they show of each."""


class FrequentLines:
    """The frequent lines of a corpus: some 20 bytes of memory per line, and 40 more for those of the range being read.

    Raises InputsMissing or UserError if the files of the ranges are not complete, or not of one run.
    """

    def __init__(self, folder: Path, ranges: int) -> None:
        paths = numbered(folder, "range", SUFFIX, ranges, "--ranges")
        found = [about(path, "frequent") for path in paths]
        for part, (path, counts) in enumerate(zip(paths, found, strict=True)):
            if (counts["range"], counts["ranges"]) != (part, ranges):
                raise UserError(
                    f"{path} is range {counts['range']} of {counts['ranges']}, and not {part} of {ranges}; give "
                    "--ranges as it was for dedup lines"
                )
            if counts["minimum"] != found[0]["minimum"]:
                raise UserError(
                    f"{paths[0]} was made with --min {found[0]['minimum']} and {path} with --min {counts['minimum']}; "
                    "run dedup lines frequent again with one of them for all ranges"
                )
        self.minimum = int(found[0]["minimum"])
        total = sum(counts["records"] for counts in found)
        self._highs, self._lows = np.empty(total, np.uint64), np.empty(total, np.uint64)
        top, first = [], 0
        for path, counts in zip(paths, found, strict=True):
            records = read(path, 0, counts["records"])
            here = slice(first, first + len(records))
            self._highs[here], self._lows[here] = records["hi"], records["lo"]
            often = np.argsort(-records["count"].astype(np.int64), kind="stable")[:SAMPLES]
            top += [(-int(records["count"][place]), first + int(place)) for place in often]
            first += len(records)
        self.samples = {place: -negative for negative, place in sorted(top)[:SAMPLES]}
        """The place of each of the most frequent lines, the most frequent first, and how often it occurs."""
        bits = max(1, (total // 4).bit_length())
        self._shift = 64 - bits
        upper = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(self._shift)
        self._starts = np.concatenate([[0], np.searchsorted(self._highs, upper), [total]]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._highs)

    def places(self, keys: NDArray[np.uint64]) -> Numbers:
        """The place of each key among those of the frequent lines, (k,), or -1."""
        from snakmodel.dedup.lines.kernel import look_up

        found = np.empty(len(keys), np.int64)
        look_up(keys, self._highs, self._lows, self._starts, self._shift, found)
        return found


class LinesStep:
    """A `FinishingStep` that removes frequent lines, and drops documents of which nothing is left."""

    name = "lines"

    def __init__(self, frequent: FrequentLines) -> None:
        self._frequent = frequent
        self._texts: dict[int, str] = {}

    def schema(self, schema: Any) -> Any:
        """See `Step`."""
        self._texts = {}
        return schema

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """See `Step`. The counts are removed lines and bytes, by source, and changed and dropped documents."""
        from snakmodel.dedup.lines.kernel import DOCUMENT, take_out

        index = batch.schema.get_field_index("text")
        lines, keys = lines_of(batch.column(index))
        places = self._frequent.places(keys)
        gone = places >= 0
        if not gone.any():
            return batch, {}
        data, offsets = buffers(batch.column(index))
        data.setflags(write=False)
        text, ends = np.empty(offsets[-1] - offsets[0], np.uint8), np.empty(len(offsets), np.int64)
        kept = np.empty(batch.num_rows, np.int64)
        take_out(data, offsets, lines, gone.view(np.uint8), text, ends, kept)
        removed = np.bincount(lines[gone, DOCUMENT], minlength=batch.num_rows)
        dropped = (removed > 0) & (kept == 0)
        sizes = np.where(removed > 0, np.diff(offsets) - np.where(dropped, 0, np.diff(ends)), 0)
        counts = {
            "changed": int((removed > 0).sum()),
            "emptied": int(dropped.sum()),
            "lines": int(removed.sum()),
            "bytes": int(sizes.sum()),
            "by_source": _by_source(batch, removed, sizes),
            "most_frequent": self._sampled(data, lines[gone], places[gone]),
        }
        column = strings(text[: ends[-1]], ends).cast(batch.column(index).type)
        after = batch.set_column(index, batch.schema.field(index), column)
        return after.filter(pa.array(~dropped)), counts

    def finished(self, counts: dict[str, Any]) -> dict[str, Any]:
        """See `FinishingStep`: adds how many lines are frequent, and the texts of the most frequent ones."""
        removed = counts.get("most_frequent", {})
        return {
            "minimum": self._frequent.minimum,
            "frequent": len(self._frequent),
            **{key: counts.get(key, 0) for key in ("changed", "emptied", "lines", "bytes")},
            "by_source": bounded(dict(sorted(counts.get("by_source", {}).items()))),
            "most_frequent": [
                {"text": self._texts[place], "times": times, "removed": removed[str(place)]}
                for place, times in self._frequent.samples.items()
                if str(place) in removed
            ],
        }

    def _sampled(self, data: NDArray[np.uint8], lines: Numbers, places: Numbers) -> dict[str, int]:
        """How many of the removed lines are each of the most frequent lines; notes their texts."""
        from snakmodel.dedup.lines.kernel import INK, INK_END

        found: dict[str, int] = {}
        for place in self._frequent.samples:
            here = np.flatnonzero(places == place)
            if len(here):
                found[str(place)] = len(here)
                line = lines[here[0]]
                self._texts[place] = bytes(data[line[INK] : line[INK_END]]).decode()[:SAMPLE_CHARACTERS]
        return found


def _by_source(batch: Any, removed: Numbers, sizes: Numbers) -> dict[str, dict[str, int]]:
    """The changed documents and the removed lines and bytes of each source, of documents that were changed."""
    names, codes = source_names(batch) or ([NO_SOURCE], np.zeros(batch.num_rows, np.int64))
    sums = [np.bincount(codes, weights, len(names)).astype(np.int64) for weights in (removed > 0, removed, sizes)]
    found: dict[str, dict[str, int]] = {}
    for name, *numbers in zip(names, *(one.tolist() for one in sums), strict=True):
        if numbers[0]:
            one = {name: dict(zip(("documents", "lines", "bytes"), numbers, strict=True))}
            found = merged(found, one)
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step."""
    parser.add_argument(
        "--frequent", type=Path, required=True, help="the folder that dedup lines frequent wrote, as range-00000 …"
    )
    parser.add_argument("--ranges", type=int, required=True, help="number of ranges")


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`; the frequent lines are found only while the run is under way."""
    return schema


def make(args: argparse.Namespace) -> LinesStep:
    """The step of these flags."""
    return LinesStep(FrequentLines(args.frequent, args.ranges))
