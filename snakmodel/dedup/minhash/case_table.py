"""What the MinHash kernel makes of each code point, according to the running Python's `re` and `str.lower`."""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.kernel import CASED, EXPANDED, IGNORABLE, POINT, SEPARATOR, SIGMA

POINTS = 0x110000
DOTTED_I, CAPITAL_SIGMA, LAST_SIGMA = 0x130, 0x3A3, 0x3C2
WORD = re.compile(r"\w", re.ASCII)


@functools.cache
def table(lower: bool) -> NDArray[np.uint32]:
    """The table for `normalise`, with an entry for each code point, (0x110000,).

    With `lower`, separators are what `\\W` matches after lower-casing, otherwise what `[^A-Za-z_0-9]` matches. Raises
    ValueError if the kernel cannot express this Python's rules for lower case.
    """
    entries = np.full(POINTS, SEPARATOR, np.uint32)
    if not lower:
        entries[:128] = [point if WORD.match(chr(point)) else SEPARATOR for point in range(128)]
        return entries
    points = np.arange(POINTS, dtype=np.uint32)
    points = points[((points < 0xD800) | (points > 0xDFFF)) & (points != DOTTED_I) & (points != CAPITAL_SIGMA)]
    lowered = decoded(points).lower()
    expanded = chr(DOTTED_I).lower()
    if len(lowered) != len(points) or len(expanded) != 2 or not re.match(r"\w\W", expanded):
        raise ValueError("other letters than İ have a lower case of several letters")
    entries[points] = encoded(re.sub(r"\W", " ", lowered))
    if (widths(entries[points]) * 2 > widths(points) * 3).any():
        raise ValueError("the lower case of a letter takes more than 3 bytes for every 2")
    entries[DOTTED_I] = ord(expanded[0]) | EXPANDED
    entries[CAPITAL_SIGMA] = ord("σ") | SIGMA
    for point in (DOTTED_I, CAPITAL_SIGMA):
        entries[point] |= CASED
    entries[points] |= context(points)
    return entries


def context(points: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """CASED, IGNORABLE or 0 for each code point, found from the lower case of a Σ that follows it."""
    after = np.full((len(points), 3), ord("\n"), np.uint32)
    after[:, 0], after[:, 1] = points, CAPITAL_SIGMA
    cased = encoded(decoded(after.ravel()).lower()).reshape(-1, 3)[:, 1] == LAST_SIGMA
    after = np.insert(after, 0, ord("a"), axis=1)
    ignored = (encoded(decoded(after.ravel()).lower()).reshape(-1, 4)[:, 2] == LAST_SIGMA) & ~cased
    return np.select([cased, ignored], [np.uint32(CASED), np.uint32(IGNORABLE)], np.uint32(0))


def decoded(points: NDArray[np.uint32]) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")


def encoded(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def widths(points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The number of bytes that each code point takes in UTF-8."""
    return 1 + np.searchsorted(np.array([0x80, 0x800, 0x10000]), points & POINT, "right")
