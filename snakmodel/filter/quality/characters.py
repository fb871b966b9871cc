"""What each character of Unicode is to the rules of quality: one byte of flags per code point."""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from numpy.typing import NDArray

SPACE, BREAK, LETTER, SYMBOL, STOP, DIGIT, CLOSER = (1 << bit for bit in range(7))
"""SPACE is white space, as `str.isspace` has it. BREAK ends a line, as `str.splitlines` has it. LETTER is a letter of
any alphabet (categories L*). SYMBOL is punctuation, a symbol or a control character (P*, S* and Cc). STOP ends a
sentence (the property Sentence_Terminal). DIGIT is a decimal digit (Nd). CLOSER may follow the end of a sentence inside
its last word: quotation marks of either side, since languages differ in which one closes, and closing brackets."""

POINTS = 0x110000
ASSIGNED = 0x40000
"""The first code point of the planes that hold neither letters nor symbols."""

BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
ASCII_QUOTES = "\"'"
_STOPS = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D5 1803 1809
1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024 203C-203D 2047-2049 2CF9-2CFB 2E2E
2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12
FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143
111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642
1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44
16D6E-16D6F 16E98 1BC9F 1DA88
"""
"""The code points with the property Sentence_Terminal in the file PropList.txt of Unicode 17."""


def stops() -> list[str]:
    """The characters that end a sentence."""
    ranges = [[int(end, 16) for end in part.split("-")] for part in _STOPS.split()]
    return [chr(point) for ends in ranges for point in range(ends[0], ends[-1] + 1)]


@functools.cache
def table() -> NDArray[np.uint8]:
    """The flags of each code point, (0x110000,)."""
    flags = np.zeros(POINTS, np.uint8)
    by_category = {category: _flags_of(category) for category in ("Cc", "Nd", *_categories("LPS"))}
    flags[:ASSIGNED] = [by_category.get(unicodedata.category(chr(point)), 0) for point in range(ASSIGNED)]
    flags[[point for point in range(ASSIGNED) if chr(point).isspace()]] |= SPACE
    for characters, flag in ((BREAKS, BREAK), (stops(), STOP), (ASCII_QUOTES, CLOSER)):
        flags[[ord(character) for character in characters]] |= flag
    return flags


def _categories(majors: str) -> list[str]:
    """All categories that these letters begin."""
    return [major + minor for major in majors for minor in "ulmtocdseifkq"]


def _flags_of(category: str) -> int:
    """The flags that follow from a general category of Unicode."""
    if category == "Nd":
        return DIGIT
    if category[0] == "L":
        return LETTER
    return SYMBOL | (CLOSER if category in ("Pe", "Pf", "Pi") else 0)
