"""The compiled kernel of lines: it finds and keys the lines of documents, looks keys up, and takes lines out of texts.

Lines end with a newline. White space at both ends of a line, as `str.strip` takes it, is no part of its key, and a line
of nothing else is blank and has no key.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.lines.cache import compiled, inner
from snakmodel.dedup.minhash.compile_cache import Bytes, Longs, Numbers, long_at
from snakmodel.dedup.minhash.kernel import decode, extended, mixed

DOCUMENT, BEGIN, INK, INK_END = range(4)
"""Columns of a table of lines: the document, the first byte, and the range without white space at its ends."""
_NEWLINE = 0x0A
_SEVEN_BYTES = np.uint64((1 << 56) - 1)


@inner
def is_space(point: int) -> bool:
    """Whether a character is white space, as `str.isspace` has it."""
    if point < 0x1680:
        return 0x09 <= point <= 0x0D or 0x1C <= point <= 0x20 or point == 0x85 or point == 0xA0
    if point < 0x2000 or point > 0x3000:
        return point == 0x1680
    return (
        point <= 0x200A or point == 0x2028 or point == 0x2029 or point == 0x202F or point == 0x205F or point == 0x3000
    )


@inner
def line_key(data: Bytes, begin: int, end: int, points: Longs) -> tuple[np.uint64, np.uint64]:
    """Both halves of the key of a line.

    The coefficients are 1, the bytes in groups of seven (little-endian, filled up with zeros), and their number.
    """
    high, low, at = np.uint64(1), np.uint64(1), begin
    while at + 8 <= end:
        word = long_at(data, at) & _SEVEN_BYTES
        high, low = extended(high, points[0], word), extended(low, points[1], word)
        at += 7
    word = np.uint64(0)
    for place in range(end - at):
        word |= np.uint64(data[at + place]) << np.uint64(8 * place)
    high, low = extended(high, points[0], word), extended(low, points[1], word)
    size = np.uint64(end - begin)
    return mixed(extended(high, points[0], size)), mixed(extended(low, points[1], size))


@inner
def stripped(data: Bytes, begin: int, end: int) -> tuple[int, int]:
    """A range without white space at its ends."""
    while begin < end:
        point, size = decode(data, begin)
        if not is_space(point):
            break
        begin += size
    while end > begin:
        last = end - 1
        while data[last] & 0xC0 == 0x80:
            last -= 1
        if not is_space(decode(data, last)[0]):
            break
        end = last
    return begin, end


@compiled
def find_lines(data: Bytes, offsets: Numbers, points: Longs, lines: Numbers, keys: Longs) -> int:
    """Fill `lines`, (k, 4), and their keys, (k, 2), with the lines that are not blank; returns their number.

    The tables need room for a line per newline and per document.
    """
    count = 0
    for document in range(len(offsets) - 1):
        end, at = offsets[document + 1], offsets[document]
        while at < end:
            begin = at
            while at < end and data[at] != _NEWLINE:
                at += 1
            ink, ink_end = stripped(data, begin, at)
            at += 1
            if ink < ink_end:
                lines[count, DOCUMENT], lines[count, BEGIN] = document, begin
                lines[count, INK], lines[count, INK_END] = ink, ink_end
                keys[count, 0], keys[count, 1] = line_key(data, ink, ink_end, points)
                count += 1
    return count


@compiled
def look_up(keys: Longs, highs: Longs, lows: Longs, starts: Numbers, shift: int, places: Numbers) -> None:
    """Fill `places`, (k,), with the place of each key among the sorted ones, or -1.

    Those whose upper half begins with the bits b are at starts[b] … starts[b + 1] - 1; `shift` is 64 less their number.
    """
    for line in range(len(places)):
        bucket = np.int64(keys[line, 0] >> np.uint64(shift))
        places[line] = -1
        for place in range(starts[bucket], starts[bucket + 1]):
            if highs[place] == keys[line, 0] and lows[place] == keys[line, 1]:
                places[line] = place
                break


@compiled
def take_out(
    data: Bytes, offsets: Numbers, lines: Numbers, gone: Bytes, text: Bytes, ends: Numbers, kept: Numbers
) -> None:
    """Write the documents without the lines that are gone to `text`, and their ends to `ends`, (n + 1,).

    `kept`, (n,), becomes the number of lines that are not blank. `text` has room for all documents. Blank lines that
    directly follow a line that is gone go with it where a blank line, or none at all, comes before.
    """
    top, line = 0, 0
    ends[0] = 0
    for document in range(len(offsets) - 1):
        end, at = offsets[document + 1], offsets[document]
        written, after_blank, skipping = 0, True, False
        kept[document] = 0
        while at <= end:
            begin = at
            while at < end and data[at] != _NEWLINE:
                at += 1
            filled = line < len(lines) and lines[line, DOCUMENT] == document and lines[line, BEGIN] == begin
            if filled and gone[line]:
                skipping = after_blank
            elif filled or not skipping:
                if written:
                    text[top] = _NEWLINE
                    top += 1
                text[top : top + at - begin] = data[begin:at]
                top += at - begin
                written += 1
                after_blank = not filled
                kept[document] += filled
                skipping = False
            line += filled
            at += 1
        ends[document + 1] = top
