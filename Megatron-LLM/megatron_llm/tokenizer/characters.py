"""A set of characters, and a fast search, in NumPy over UTF-8 bytes, for texts with a character outside the set.

Most bytes are below the first lead byte that may begin a character outside the set, so one comparison rules them out.
The remaining characters are looked up by their first two bytes. These decide all cases except the few groups of 64
characters that are only partly in the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.document_blocks import offsets

CODE_POINTS = 0x110000
NONE, PARTLY = 1, 2
"""How many of the characters that begin with two given bytes are in the set; 0 means all of them."""


class Characters:
    """A set of Unicode code points."""

    def __init__(self, members: Iterable[int]) -> None:
        self.table = np.zeros(CODE_POINTS, dtype=np.bool_)
        self.table[np.fromiter(members, dtype=np.int64)] = True
        self._pairs = byte_pairs(self.table)
        self._lead: NDArray[np.bool_] = np.any(self._pairs.reshape(256, 256), axis=1)
        self._first = int(np.argmax(self._lead)) if self._lead.any() else 256

    def keep(self, text: str) -> str:
        """The text without the characters outside the set."""
        return "".join(character for character in text if self.table[ord(character)])

    def outside(self, texts: Any) -> NDArray[np.bool_]:
        """Which texts of a large_string array (n,) contain a character outside the set, (n,) bool."""
        borders = offsets(texts)
        if borders[0] == borders[-1]:
            return np.zeros(len(texts), dtype=np.bool_)
        data = np.frombuffer(texts.buffers()[2], dtype=np.uint8)[borders[0] : borders[-1]]
        before = np.searchsorted(self._places(data), borders - borders[0])
        found: NDArray[np.bool_] = np.diff(before) > 0
        return found

    def _places(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The offsets in UTF-8 text at which characters outside the set begin, in order."""
        places = np.flatnonzero(data >= self._first)
        places = places[self._lead.take(data.take(places))]
        pairs = data.take(places).astype(np.int64) << 8 | data.take(places + 1, mode="clip")
        found = self._pairs.take(pairs)
        unclear = np.flatnonzero(found == PARTLY)
        found[unclear] = ~self.table.take(code_points(data, places[unclear]))
        return places[found > 0]


def byte_pairs(table: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """For each two bytes of UTF-8, how many of the characters that they begin are in a set: 0 (all), NONE or PARTLY.

    table: (1114112,) bool; returns (65536,) uint8. A continuation byte begins no character, and has 0.
    """
    pairs = np.zeros((256, 256), dtype=np.uint8)
    pairs[:0x80] = np.where(table[:0x80], 0, NONE)[:, None]
    for first in range(0xC2, 0xE0):  # a character of two bytes
        start = (first & 0x1F) << 6
        pairs[first, 0x80:0xC0] = np.where(table[start : start + 64], 0, NONE)
    for first, shift, mask in [*((b, 6, 0x0F) for b in range(0xE0, 0xF0)), *((b, 12, 0x07) for b in range(0xF0, 0xF5))]:
        for second in range(0x80, 0xC0):
            start = ((first & mask) << 6 | second & 0x3F) << shift
            group = table[start : start + (1 << shift)]
            pairs[first, second] = 0 if group.all() and len(group) else PARTLY if group.any() else NONE
    return pairs.ravel()


def code_points(data: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The characters of three or four bytes that begin at these places of UTF-8 text."""
    first = data[places].astype(np.int64)
    rest = [data.take(places + i, mode="clip").astype(np.int64) & 0x3F for i in (1, 2, 3)]
    three = (first & 0x0F) << 12 | rest[0] << 6 | rest[1]
    four = (first & 0x07) << 18 | rest[0] << 12 | rest[1] << 6 | rest[2]
    return np.where(first < 0xF0, three, np.minimum(four, CODE_POINTS - 1))
