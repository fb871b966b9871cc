"""The n-grams of all evaluation items, and the documents in which they occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from run_contract.errors import UserError
from snakmodel.filter.decontaminate.letters import Words, tables
from snakmodel.filter.quality.measures import Numbers, buffers

SHORTEST = 8
"""The fewest words of an item that is looked for as a whole although it has fewer than n words."""

_ROOM = 1 << 12
"""The number of matches for which there is room before they are counted."""


@dataclass(frozen=True)
class Found:
    """What was found in some documents."""

    spans: Numbers
    """The spans of words that are shared with items, in order: (s, 5), see `kernel.find`."""
    items: Numbers
    """Each span with each item of which it holds a gram, (k, 2), without repetitions and sorted."""


class Grams:
    """The n-grams of items, which `find` looks for. An item of fewer than n words is one gram, if it is long enough.

    Raises UserError if Numba is set not to compile.
    """

    def __init__(self, items: Sequence[str], ngram: int) -> None:
        import numba

        if numba.config.DISABLE_JIT:
            raise UserError("NUMBA_DISABLE_JIT is set, and decontamination is compiled by Numba; unset it")
        self._spelled, ends, words = spelled(items)
        self.lengths = np.where(words >= min(ngram, SHORTEST), np.minimum(words, ngram), 0)
        """The number of words of each item's grams, (n,); 0 if the item is too short."""
        self._tabulate(ends, words)

    def _tabulate(self, ends: Numbers, words: Numbers) -> None:
        from snakmodel.filter.decontaminate.kernel import BITS, tabulate

        self._widths = np.unique(self.lengths[self.lengths > 0])
        most = int((words - self.lengths + 1)[self.lengths > 0].sum())
        size = 1 << max(2, (2 * most - 1).bit_length())
        self._keys, self._slots = np.zeros(size, np.uint64), np.empty(size, np.int64)
        self._begins, self._stops = np.empty(most, np.int64), np.empty(most, np.int64)
        self._seen = np.zeros(max(1, size * BITS // 2 // 64), np.uint64)
        pairs = np.empty((most, 2), np.int64)
        if most:
            grams, count = tabulate(
                self._spelled,
                ends,
                self.lengths,
                int(self._widths[-1]),
                int(self._widths[0]),
                self._keys,
                self._slots,
                self._begins,
                self._stops,
                self._seen,
                pairs,
            )
            self._begins, self._stops = self._begins[:grams].copy(), self._stops[:grams].copy()
            assert count == most
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        again = (pairs[1:] == pairs[:-1]).all(axis=1)
        pairs = pairs[np.concatenate([[True], ~again])] if len(pairs) else pairs
        self._first_item = np.searchsorted(pairs[:, 0], np.arange(len(self._begins) + 1))
        self._items = pairs[:, 1].copy()

    def find(self, texts: Any) -> Found:
        """The spans of an Arrow array of valid strings, and the items to which they belong."""
        from snakmodel.filter.decontaminate.kernel import DOCUMENT, GRAM, LAST, LAST_WORD, OF, find

        matches, spans = np.empty((0, 3), np.int64), np.empty((0, 5), np.int64)
        if len(self._widths):
            data, offsets = buffers(texts)
            data.setflags(write=False)  # otherwise the kernel is compiled once for each of the two
            count = _ROOM
            while count > len(matches):
                matches, spans = np.empty((count, 3), np.int64), np.empty((count, 5), np.int64)
                count, covered = find(
                    data,
                    offsets,
                    *tables(),
                    self._spelled,
                    self._widths,
                    self._keys,
                    self._slots,
                    self._begins,
                    self._stops,
                    self._seen,
                    matches,
                    spans,
                )
            matches, spans = matches[:count], spans[:covered].copy()
        if not len(matches):
            return Found(spans, np.empty((0, 2), np.int64))
        ends = spans[:, OF] << 40 | spans[:, LAST_WORD]
        place = np.searchsorted(ends, matches[:, DOCUMENT] << 40 | matches[:, LAST])
        hits = distinct(place, matches[:, GRAM])
        first, counts = self._first_item[hits[:, 1]], np.diff(self._first_item)[hits[:, 1]]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Found(spans, distinct(np.repeat(hits[:, 0], counts), self._items[np.repeat(first, counts) + steps]))


def distinct(one: Numbers, other: Numbers) -> Numbers:
    """The different pairs of two columns of numbers from 0 on, sorted, (k, 2)."""
    order = np.lexsort((other, one))
    pairs = np.stack([one[order], other[order]], axis=1)
    fresh = np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(axis=1)])
    found: Numbers = pairs[fresh[: len(pairs)]]
    return found


def spelled(items: Sequence[str]) -> tuple[Words, Numbers, Numbers]:
    """The letters of all items, where those of each item end, (n + 1,), and its number of words, (n,)."""
    from snakmodel.filter.decontaminate.kernel import spell

    data, offsets = buffers(pa.array(items, pa.large_string()))
    ends, words = np.zeros(len(items) + 1, np.int64), np.zeros(len(items), np.int64)
    spell(data, offsets, *tables(), np.empty(0, np.uint32), ends, words)
    letters = np.empty(ends[-1], np.uint32)
    spell(data, offsets, *tables(), letters, ends, words)
    return letters, ends, words
