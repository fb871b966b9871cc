"""The compiled kernel of the line rules of C4: which lines of a document are kept, and the text without the others.

The rules and their order are those of the table in `rules.Lines`. A line is cut as `str.splitlines` cuts it, and white
space at its ends is removed. The kept lines are joined by newlines.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.kernel import decode
from snakmodel.filter.quality.cache import compiled, inner
from snakmodel.filter.quality.characters import BREAK, CLOSER, DIGIT, SPACE, STOP
from snakmodel.filter.quality.measures import COLUMN, LINE_NAMES, Bytes, Numbers

SENTENCES, LOREM, CURLY = COLUMN["sentences"], COLUMN["lorem_ipsum_lines"], COLUMN["curly_bracket_lines"]
SEEN, LONG_WORD, NOT_STOPPED, FEW_WORDS, JAVASCRIPT, POLICY, KEPT = range(len(LINE_NAMES))
LOREM_IPSUM, JAVASCRIPT_WORD, EDIT, CITATION, FIRST_POLICY = range(5)
"""The places of the fixed phrases among the phrases, see `phrases`; those of policies follow."""
LONGEST_WORD, FEWEST_WORDS, STOPPED_ONLY, NO_JAVASCRIPT, NO_CITATIONS = range(5)
"""The places of the settings of `clean`."""
_FIXED = ("lorem ipsum", "javascript", "[edit]", "[citation needed]")
_NEWLINE, _RETURN, _CURLY, _OPEN, _CLOSE, _DOT = 0x0A, 0x0D, 0x7B, 0x5B, 0x5D, 0x2E
_KELVIN, _ELLIPSIS = 0x212A, 0x2026


def phrases(policy: tuple[str, ...]) -> tuple[Bytes, Numbers]:
    """The bytes and offsets of all phrases that the kernel looks for, in lower case."""
    encoded = [phrase.lower().encode() for phrase in (*_FIXED, *policy)]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


@inner
def starts_with(text: Bytes, at: int, end: int, wanted: Bytes, first: int, stop: int) -> bool:
    """Whether text[at : end] begins with wanted[first : stop]."""
    if end - at < stop - first:
        return False
    for place in range(stop - first):  # noqa: SIM110 (Numba compiles no generator expressions)
        if text[at + place] != wanted[first + place]:
            return False
    return True


@inner
def contains(text: Bytes, end: int, wanted: Bytes, first: int, stop: int) -> bool:
    """Whether text[:end] contains wanted[first : stop]."""
    for at in range(end - (stop - first) + 1):
        if text[at] == wanted[first] and starts_with(text, at, end, wanted, first, stop):
            return True
    return False


@inner
def citation(data: Bytes, at: int, end: int, table: Bytes, wanted: Bytes, starts: Numbers) -> int:
    """The length of the citation mark at data[at], which is "[": digits or nothing in brackets, or one of two notes."""
    for phrase in (EDIT, CITATION):
        if starts_with(data, at, end, wanted, starts[phrase], starts[phrase + 1]):
            return starts[phrase + 1] - starts[phrase]
    stop = at + 1
    while stop < end:
        if data[stop] == _CLOSE:
            return stop + 1 - at
        point, size = decode(data, stop)
        if not table[point] & DIGIT:
            return 0
        stop += size
    return 0


@inner
def line_words(data: Bytes, begin: int, end: int, table: Bytes) -> tuple[int, int]:
    """The number of words in a line, and the number of characters in the longest."""
    words, longest, length = 0, 0, 0
    at = begin
    while at < end:
        point, size = decode(data, at)
        length = 0 if table[point] & SPACE else length + 1
        words += length == 1
        longest = max(longest, length)
        at += size
    return words, longest


@inner
def sentences_in(data: Bytes, begin: int, end: int, table: Bytes) -> int:
    """The number of sentences in a line: of words that end one, and one more if words follow the last of these.

    A word ends a sentence if its last character but CLOSERs is a STOP or "…".
    """
    count, is_open, stopped = 0, False, False
    at = begin
    while at < end:
        point, size = decode(data, at)
        flags = np.int64(table[point])
        if flags & SPACE:
            count += stopped
            is_open, stopped = is_open and not stopped, False
        else:
            is_open = True
            if not flags & CLOSER:
                stopped = flags & STOP != 0 or point == _ELLIPSIS
        at += size
    return count + is_open


@inner
def lowered(data: Bytes, begin: int, end: int, low: Bytes) -> int:
    """Write a text in lower case to `low`, and return its length.

    Other letters than those of ASCII stay as they are, but for the Kelvin sign, whose lower case is the letter k.
    """
    top, at = 0, begin
    while at < end:
        byte = data[at]
        if byte == 0xE2 and data[at + 1] == 0x84 and data[at + 2] == 0xAA:
            byte, at = np.uint8(0x6B), at + 2
        low[top] = byte + 32 if 0x41 <= byte <= 0x5A else byte
        top, at = top + 1, at + 1
    return top


@inner
def without_citations(
    data: Bytes, begin: int, end: int, table: Bytes, wanted: Bytes, starts: Numbers, out: Bytes
) -> int:
    """Write a line without its citation marks to `out`, and return its length."""
    top, at = 0, begin
    while at < end:
        skipped = citation(data, at, end, table, wanted, starts) if data[at] == _OPEN else 0
        if skipped:
            at += skipped
        else:
            out[top] = data[at]
            top, at = top + 1, at + 1
    return top


@inner
def ends_in_stop(line: Bytes, size: int) -> bool:
    """Whether a line ends in . ? ! " or ', but not in three dots."""
    if not size:
        return False
    last = line[size - 1]
    dots = size > 2 and last == _DOT and line[size - 2] == _DOT and line[size - 3] == _DOT
    return not dots and (last == _DOT or last == 0x3F or last == 0x21 or last == 0x22 or last == 0x27)


@inner
def next_line(data: Bytes, at: int, end: int, table: Bytes) -> tuple[int, int, int]:
    """The line that begins at data[at], without white space around it: its begin and end, and where the next begins."""
    stop, ink_begin, ink_end, after = end, -1, at, end
    while at < end:
        point, size = decode(data, at)
        flags = np.int64(table[point])
        if flags & BREAK:
            stop = at
            after = at + size
            if point == _RETURN and after < end and data[after] == _NEWLINE:
                after += 1
            break
        at += size
        if not flags & SPACE:
            ink_begin = at - size if ink_begin < 0 else ink_begin
            ink_end = at
    return (stop, stop, after) if ink_begin < 0 else (ink_begin, ink_end, after)


@inner
def judged(
    line: Bytes, size: int, words: int, settings: Numbers, wanted: Bytes, starts: Numbers, low: Bytes, row: Numbers
) -> int:
    """The rule that removes a line whose words are not too long, as the place of its count, or KEPT.

    The line is line[:size], and `low` is room for it in lower case. Counts what `row` has of lines that got so far.
    """
    if settings[STOPPED_ONLY] and not ends_in_stop(line, size):
        return NOT_STOPPED
    if words < settings[FEWEST_WORDS]:
        return FEW_WORDS
    length = lowered(line, 0, size, low)
    row[LOREM] += contains(low, length, wanted, starts[LOREM_IPSUM], starts[LOREM_IPSUM + 1])
    javascript = starts[JAVASCRIPT_WORD], starts[JAVASCRIPT_WORD + 1]
    if settings[NO_JAVASCRIPT] and contains(low, length, wanted, javascript[0], javascript[1]):
        return JAVASCRIPT
    for place in range(size):
        if line[place] == _CURLY:
            row[CURLY] += 1
            break
    for phrase in range(FIRST_POLICY, len(starts) - 1):
        if contains(low, length, wanted, starts[phrase], starts[phrase + 1]):
            return POLICY
    return KEPT


@compiled
def clean(
    data: Bytes,
    offsets: Numbers,
    table: Bytes,
    settings: Numbers,
    wanted: Bytes,
    starts: Numbers,
    found: Numbers,
    counts: Numbers,
    text: Bytes,
    ends: Numbers,
) -> None:
    """Write the kept lines of each document to `text`, their ends to `ends`, (n + 1,), and fill the columns of C4.

    `settings` is: the most characters in a word, the fewest words (-1 for either: no limit), and 0 or 1 for each of
    stopped lines, javascript and citations. `wanted` and `starts` come from `phrases`. `counts`, (n, len(LINE_NAMES)),
    is zero before. `text` has room for all documents.
    """
    longest_word, no_citations = settings[LONGEST_WORD], settings[NO_CITATIONS]
    top, most = 0, 0
    for document in range(len(offsets) - 1):
        most = max(most, offsets[document + 1] - offsets[document])
    line, low = np.empty(most, np.uint8), np.empty(most, np.uint8)
    ends[0] = 0
    for document in range(len(offsets) - 1):
        row, lines = found[document], counts[document]
        end, at, first = offsets[document + 1], offsets[document], top
        while at < end:
            begin, stop, at = next_line(data, at, end, table)
            lines[SEEN] += 1
            words, longest = line_words(data, begin, stop, table)
            if longest_word >= 0 and longest > longest_word:
                lines[LONG_WORD] += 1
                continue
            if no_citations:
                size = without_citations(data, begin, stop, table, wanted, starts, line)
            else:
                size = stop - begin
                line[:size] = data[begin:stop]
            outcome = judged(line, size, words, settings, wanted, starts, low, row)
            lines[outcome] += 1
            if outcome != KEPT:
                continue
            row[SENTENCES] += sentences_in(line, 0, size, table)
            if lines[KEPT] > 1:
                text[top] = _NEWLINE
                top += 1
            text[top : top + size] = line[:size]
            top += size
        top = trimmed(text, first, top, table)
        ends[document + 1] = top


@inner
def trimmed(text: Bytes, first: int, top: int, table: Bytes) -> int:
    """Remove white space at both ends of text[first : top], moving the text to the front; returns the new end."""
    begin, end, at = top, first, first
    while at < top:
        point, size = decode(text, at)
        at += size
        if not table[point] & SPACE:
            begin, end = min(begin, at - size), at
    if begin > first:
        for place in range(end - begin):
            text[first + place] = text[begin + place]
    return max(first, first + end - begin)
