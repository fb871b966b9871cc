"""What each character is to the comparison of words: a letter in one fixed spelling, or what separates words.

A word is a maximal run of letters, marks and digits (the Unicode categories L, M and N). Each of them is replaced by
its compatibility decomposition (NFKD) without case (`str.casefold`), so that "É", "é" and "e" with a combining accent
are spelled alike, as are "ﬁ" and "fi". Format characters (Cf), such as the soft hyphen, are passed over. All other
characters separate words. The rule looks at one character at a time, and so does the kernel.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

SEPARATOR, PASSED_OVER = 0, 1
EXPANDED = 1 << 31
"""Entries of the table; every other entry is a letter's code point. EXPANDED marks a character of several letters, and
the rest of its entry is a position in the second table, where the number of letters and the letters stand."""
_POINTS = 0x110000
_ASSIGNED = (range(0x40000), range(0xE0000, 0xE0200))
"""The code points that may be letters, marks, digits or format characters; all others are separators."""


@functools.cache
def tables() -> tuple[Words, Words]:
    """The entry of each code point, (0x110000,), and the letters of those that are EXPANDED."""
    entries, more = np.zeros(_POINTS, np.uint32), list[int]()
    for point in (point for points in _ASSIGNED for point in points):
        category = unicodedata.category(chr(point))
        if category == "Cf":
            entries[point] = PASSED_OVER
        elif letters := spelling(chr(point)) if is_letter(chr(point)) else "":
            entries[point] = ord(letters) if len(letters) == 1 else EXPANDED | len(more)
            if len(letters) > 1:
                more += [len(letters), *map(ord, letters)]
    return entries, np.array(more, np.uint32)


def is_letter(character: str) -> bool:
    """Whether a character is part of words."""
    return unicodedata.category(character)[0] in "LMN"


def spelling(character: str) -> str:
    """The letters that a letter, mark or digit is replaced by."""
    return "".join(filter(is_letter, unicodedata.normalize("NFKD", character).casefold()))
