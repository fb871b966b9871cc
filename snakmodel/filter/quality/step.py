"""The step `quality`: each document gets the list of rules that it fails, or is removed if it fails one.

Arrow text -> `kernel.measure` and `lines.clean` -> a matrix of measures -> `rules.failures` -> the column `quality`, a
list of the names of failed rules, in the order of `rules.RULES`; the list of a good document is empty.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.filter.quality import threshold_file
from snakmodel.filter.quality.characters import table
from snakmodel.filter.quality.measures import LINE_NAMES, NAMES, Numbers, buffers, strings
from snakmodel.filter.quality.rules import RULES, STOP_WORDS, Thresholds, failures
from snakmodel.filter.shard import with_columns

COLUMN = "quality"
MODES = ("mark", "remove")
HELP = "rules of Gopher, C4 and FineWeb: marks or removes documents that are no running text"
_TYPE = pa.list_(pa.string())


@dataclass(frozen=True)
class Measured:
    """What the kernels found in an Arrow array of documents."""

    measures: Numbers
    """(n, len(NAMES))"""
    lines: Numbers
    """(n, len(LINE_NAMES))"""
    cleaned: Any
    """The documents without the lines that the line rules of C4 remove, a `pyarrow.LargeStringArray`."""


class Measurer:
    """Computes the measures of documents. Raises UserError if Numba is set not to compile."""

    def __init__(self, thresholds: Thresholds) -> None:
        import numba

        if numba.config.DISABLE_JIT:
            raise UserError("NUMBA_DISABLE_JIT is set, and the rules of quality are compiled by Numba; unset it")
        from snakmodel.filter.quality.lines import phrases

        self._short_line = thresholds.fineweb_short_line
        self._stop_keys = stop_keys(thresholds.stop_words)
        self._phrases = phrases(thresholds.c4_line_policy)
        longest, fewest = thresholds.c4_line_max_word_length, thresholds.c4_line_min_words
        limits = [-1 if limit is None else limit for limit in (longest, fewest)]
        flags = [thresholds.c4_line_stopped, thresholds.c4_line_javascript, thresholds.c4_line_citations]
        self._settings = np.array([*limits, *flags], np.int64)

    def measure(self, texts: Any) -> Measured:
        """The measures of an Arrow array of valid strings without nulls."""
        from snakmodel.filter.quality.kernel import measure
        from snakmodel.filter.quality.lines import clean

        data, offsets = buffers(texts)
        found, lines = np.zeros((len(texts), len(NAMES)), np.int64), np.zeros((len(texts), len(LINE_NAMES)), np.int64)
        text, ends = np.empty(offsets[-1] - offsets[0], np.uint8), np.zeros(len(offsets), np.int64)
        measure(data, offsets, table(), self._short_line, self._stop_keys, found)
        clean(data, offsets, table(), self._settings, *self._phrases, found, lines, text, ends)
        return Measured(found, lines, strings(text, ends))


def stop_keys(words: tuple[str, ...]) -> NDArray[np.uint64]:
    """The hash table of stop words that `kernel.measure` takes."""
    from snakmodel.filter.quality.kernel import word_keys

    data, offsets = buffers(pa.array(sorted(set(words)), pa.large_string()))
    keys = np.empty(len(offsets) - 1, np.uint64)
    word_keys(data, offsets, keys)
    slots = np.zeros(1 << (2 * len(keys) + 2).bit_length(), np.uint64)
    for key in keys.tolist():
        slot = key >> 20 & len(slots) - 1
        while slots[slot]:
            slot = slot + 1 & len(slots) - 1
        slots[slot] = key
    return slots


class QualityStep:
    """A `Step` that marks or removes the documents that fail a rule of quality."""

    name = COLUMN

    def __init__(self, thresholds: Thresholds, remove: bool = False, clean_lines: bool = False) -> None:
        self.thresholds, self._remove, self._clean_lines = thresholds, remove, clean_lines
        self._measurer = Measurer(thresholds)

    def schema(self, schema: Any) -> Any:
        """See `Step`; the column `quality` is the last one."""
        return with_columns(schema, pa.field(COLUMN, _TYPE))

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """See `Step`. The counts are the documents that failed each rule, and the lines by what C4's rules say."""
        place = batch.schema.get_field_index("text")
        found = self._measurer.measure(batch.column(place))
        failed = failures(found.measures, self.thresholds)
        after = batch.append_column(pa.field(COLUMN, _TYPE), names_of(failed))
        if self._clean_lines:
            after = after.set_column(place, batch.schema.field(place), found.cleaned.cast(batch.column(place).type))
        if self._remove:
            after = after.filter(pa.array(~failed.any(axis=1)))
        rules = {rule.name: int(count) for rule, count in zip(RULES, failed.sum(axis=0), strict=True)}
        lines = dict(zip(LINE_NAMES, found.lines.sum(axis=0).tolist(), strict=True))
        return after, {"failed": int(failed.any(axis=1).sum()), "rules": rules, "lines": lines}


def names_of(failed: NDArray[np.bool_]) -> Any:
    """The names of failed rules of each document, as a `pyarrow.ListArray` of strings."""
    offsets = np.concatenate([[0], np.cumsum(failed.sum(axis=1))]).astype(np.int32)
    names = pa.array([rule.name for rule in RULES], pa.string())
    return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(np.nonzero(failed)[1])))


def add_threshold_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which thresholds hold."""
    parser.add_argument(
        "--language",
        default="da",
        help=f"language of the stop words, unless the file of thresholds has its own: {', '.join(sorted(STOP_WORDS))}; "
        "another language has no rule for them (default: %(default)s)",
    )
    parser.add_argument("--thresholds", type=Path, help="YAML or JSON file of thresholds; others are as published")


def thresholds_of(args: argparse.Namespace) -> Thresholds:
    """The thresholds that the flags ask for."""
    base = threshold_file.defaults(args.language)
    return threshold_file.read(args.thresholds, base) if args.thresholds else base


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step."""
    add_threshold_flags(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="mark",
        help="mark: keep all documents, with the rules that they fail in the column `quality`; remove: keep those that "
        "fail none (default: %(default)s)",
    )
    parser.add_argument(
        "--clean-lines",
        action="store_true",
        help="replace each text by the lines that the line rules of C4 keep; the rules of documents see the whole text",
    )


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`."""
    thresholds_of(args)
    return with_columns(schema, pa.field(COLUMN, _TYPE))


def make(args: argparse.Namespace) -> QualityStep:
    """The step of these flags."""
    return QualityStep(thresholds_of(args), args.mode == "remove", args.clean_lines)
