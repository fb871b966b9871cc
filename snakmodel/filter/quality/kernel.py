"""The compiled kernel that counts words, lines and repetitions of documents in UTF-8.

  scan     one pass over the characters of a document -> its counts, its words and its lines
  spans    lines and paragraphs -> which of them occurred before, by a hash and then by their bytes
  grams    words -> the most frequent n-gram, and the characters in repeated n-grams

Words are compared by polynomial hashes modulo 2⁶¹ - 1. The hash of words i to j - 1, written without spaces, follows
from the hashes of the prefixes, so that an n-gram costs the same whatever n is. Two different n-grams of b bytes agree
at no more than b of all points: among the n-grams of a document of 100,000 words (2³² pairs, b = 64), any two agree
with a probability of about 2⁻²³.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.kernel import decode, extended, mixed
from snakmodel.dedup.minhash.parameters import KEY_POINTS, PRIME
from snakmodel.filter.quality.cache import compiled, high_product, inner, long_at
from snakmodel.filter.quality.characters import BREAK, LETTER, SPACE, STOP, SYMBOL
from snakmodel.filter.quality.measures import COLUMN, NAMES, Bytes, Numbers

Longs = NDArray[np.uint64]

CHARACTERS, WORDS, CONTENT_WORDS, CONTENT_CHARACTERS, LETTER_WORDS, STOP_WORDS, HASHES, ELLIPSES = range(8)
LINES, BULLETS, TAILS, NEWLINES, INK, TEXT_LINES, STOPPED, SHORT, REPEATED_TEXT = range(8, 17)
PIECES, REPEATED_PIECES, PIECE_CHARACTERS, PARAGRAPHS, REPEATED_PARAGRAPHS, PARAGRAPH_CHARACTERS = range(17, 23)
TOP_2, REPEATED_5 = COLUMN["top_2_gram"], COLUMN["repeated_5_grams"]
MEASURES = len(NAMES)
BEGIN, END, SIZE, BLANK, AGAIN = range(5)
"""Columns of a table of spans: the first byte, the byte after the last, the characters, whether it holds only white
space, and whether it occurred before in the document."""
OWN, PREFIX = range(2)
"""Columns of the hashes of words: the word itself, and all words before it."""
FIRST_BYTE, FIRST_CHARACTER = range(2)
"""Columns of the sizes of words: the bytes and characters of all words before it."""
_POINT = np.uint64(KEY_POINTS[0])
_POWERS = 256
_ODD = np.uint64(0x9E3779B97F4A7C15)
_NEWLINE, _RETURN, _HASH, _DOT, _HYPHEN, _BULLET, _ELLIPSIS = 0x0A, 0x0D, 0x23, 0x2E, 0x2D, 0x2022, 0x2026


@inner
def power(exponent: int, powers: Longs) -> np.uint64:
    """The point of the hashes to this power, modulo 2⁶¹ - 1; `powers` holds the first ones."""
    if exponent < len(powers):
        return powers[exponent]
    value, base = np.uint64(1), _POINT
    while exponent:
        if exponent & 1:
            value = extended(value, base, np.uint64(0))
        base = extended(base, base, np.uint64(0))
        exponent >>= 1
    return value


@inner
def between(hashes: Longs, sizes: Numbers, first: int, stop: int, powers: Longs) -> np.uint64:
    """The hash of the words first … stop - 1, written without spaces."""
    shift = power(sizes[stop, FIRST_BYTE] - sizes[first, FIRST_BYTE], powers)
    before = extended(hashes[first, PREFIX], shift, np.uint64(0)) % np.uint64(PRIME)
    return mixed(hashes[stop, PREFIX] + np.uint64(PRIME) - before)


@inner
def capacity(entries: int) -> int:
    """The size of a hash table for this number of entries: a power of two, at least half of it free."""
    size = 4
    while size < 2 * entries:
        size *= 2
    return size


@inner
def text_hash(data: Bytes, begin: int, end: int) -> np.uint64:
    """A hash of bytes, never 0; equal hashes are no proof of equal bytes."""
    value = np.uint64(end - begin) * _ODD
    at = begin
    while at + 8 <= end:
        word = value ^ long_at(data, at)
        value = (word * _ODD) ^ high_product(word, _ODD)
        at += 8
    while at < end:
        word = value ^ np.uint64(data[at])
        value = (word * _ODD) ^ high_product(word, _ODD)
        at += 1
    return value | np.uint64(1)


@inner
def same(data: Bytes, one: int, other: int, size: int) -> bool:
    """Whether two ranges hold the same bytes."""
    for place in range(size):  # noqa: SIM110 (Numba compiles no generator expressions)
        if data[one + place] != data[other + place]:
            return False
    return True


@inner
def mark_repeated(data: Bytes, spans: Numbers, count: int, keys: Longs, places: Numbers) -> None:
    """Set AGAIN of the first `count` spans."""
    size = capacity(count)
    for slot in range(size):
        keys[slot] = np.uint64(0)
    for span in range(count):
        begin, length = spans[span, BEGIN], spans[span, END] - spans[span, BEGIN]
        key = text_hash(data, begin, begin + length)
        slot = np.int64(key >> np.uint64(20)) & (size - 1)
        spans[span, AGAIN] = 0
        while keys[slot]:
            other = places[slot]
            if (
                keys[slot] == key
                and spans[other, END] - spans[other, BEGIN] == length
                and same(data, spans[other, BEGIN], begin, length)
            ):
                spans[span, AGAIN] = 1
                break
            slot = (slot + 1) & (size - 1)
        if not spans[span, AGAIN]:
            keys[slot], places[slot] = key, span


@inner
def split_paragraphs(data: Bytes, begin: int, end: int, spans: Numbers) -> int:
    """Fill `spans` with the paragraphs of a text without white space at its ends; returns their number."""
    count, start, at = 0, begin, begin
    while at < end:
        if data[at] == _NEWLINE and data[at + 1] == _NEWLINE:
            spans[count, BEGIN], spans[count, END] = start, at
            count += 1
            while data[at] == _NEWLINE:
                at += 1
            start = at
        else:
            at += 1
    spans[count, BEGIN], spans[count, END] = start, end
    return count + 1


@inner
def characters_in(data: Bytes, begin: int, end: int) -> int:
    """The number of code points in a range of valid UTF-8."""
    count = 0
    for at in range(begin, end):
        count += data[at] & 0xC0 != 0x80
    return count


@inner
def top_gram(n: int, words: int, hashes: Longs, sizes: Numbers, keys: Longs, counts: Numbers) -> int:
    """The characters of all occurrences of the most frequent n-gram; the first of several equally frequent ones."""
    size = capacity(words - n + 1)
    for slot in range(size):
        keys[slot] = np.uint64(0)
    best, best_first = 0, 0
    for first in range(words - n + 1):
        key = hashes[first, OWN]
        for word in range(first + 1, first + n):
            key = key * _ODD + hashes[word, OWN]
        key = (key ^ key >> np.uint64(32)) * _ODD | np.uint64(1)
        slot = np.int64(key >> np.uint64(20)) & (size - 1)
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & (size - 1)
        if not keys[slot]:
            keys[slot], counts[slot, 0], counts[slot, 1] = key, 0, first
        counts[slot, 0] += 1
        if counts[slot, 0] > best or (counts[slot, 0] == best and counts[slot, 1] < best_first):
            best, best_first = counts[slot, 0], counts[slot, 1]
    length = sizes[best_first + n, FIRST_CHARACTER] - sizes[best_first, FIRST_CHARACTER] + n - 1
    return best * length


@inner
def repeated_grams(n: int, words: int, hashes: Longs, sizes: Numbers, powers: Longs, keys: Longs) -> int:
    """The characters in n-grams that occurred before, going on behind each of them; words are joined without spaces."""
    size = capacity(words - n + 1)
    for slot in range(size):
        keys[slot] = np.uint64(0)
    found, first = 0, 0
    while first <= words - n:
        key = between(hashes, sizes, first, first + n, powers) | np.uint64(1)
        slot = np.int64(key >> np.uint64(20)) & (size - 1)
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & (size - 1)
        if keys[slot]:
            found += sizes[first + n, FIRST_CHARACTER] - sizes[first, FIRST_CHARACTER]
            first += n
        else:
            keys[slot] = key
            first += 1
    return found


@inner
def room(data: Bytes, offsets: Numbers, table: Bytes) -> tuple[int, int]:
    """At most how many words and how many lines a document has."""
    words, lines = 0, 0
    for document in range(len(offsets) - 1):
        spaces, newlines = 0, 0
        for at in range(offsets[document], offsets[document + 1]):
            byte = data[at]
            spaces += (byte <= 0x20) | (byte == 0xC2) | ((byte >= 0xE1) & (byte <= 0xE3))
            newlines += byte == _NEWLINE
        words, lines = max(words, spaces + 1), max(lines, newlines + 1)
    return words, lines


@inner
def scan(
    data: Bytes,
    begin: int,
    end: int,
    table: Bytes,
    powers: Longs,
    short_line: int,
    stop_keys: Longs,
    stop_seen: Bytes,
    row: Numbers,
    hashes: Longs,
    sizes: Numbers,
    spans: Numbers,
) -> tuple[int, int, int]:
    """Fill the first part of `row`, the tables of words, and the spans that newlines separate, which are not empty.

    Returns the number of spans, and the range of the document without white space around it.
    """
    words, prefix, inked, count = 0, np.uint64(0), 0, 0
    first_ink, last_ink = end, end
    in_word, word_start, word_any, word_all, word_size = False, 0, 0, 0, 0
    run, last = 0, 0
    fresh, head, bullet, tail = begin, True, 0, 0
    span, span_characters, span_blank = begin, 0, 1
    hashes[0, PREFIX], sizes[0, FIRST_BYTE], sizes[0, FIRST_CHARACTER] = np.uint64(0), 0, 0
    for place in range(len(stop_seen)):
        stop_seen[place] = 0
    at = begin
    while at <= end:
        point, size = 0x20, 1
        if at < end:
            point = np.int64(data[at])
            if point >= 0x80:
                point, size = decode(data, at)
        flags = np.int64(table[point])
        if not flags & SPACE:
            if not in_word:
                in_word, word_start, word_any, word_all, word_size = True, at, 0, 0xFF, 0
                if words == 0:
                    first_ink = at
            for place in range(at, at + size):
                prefix = extended(prefix, _POINT, np.uint64(data[place]) + np.uint64(1))
            word_any, word_all, word_size = word_any | flags, word_all & flags, word_size + 1
            run = run + 1 if point == _DOT else 0
            row[ELLIPSES] += point == _ELLIPSIS or (run > 0 and run % 3 == 0)
            row[HASHES] += point == _HASH
            if head:
                head, bullet = False, 1 if point in (_BULLET, _HYPHEN) else 0
            tail = 1 if run >= 3 or point == _ELLIPSIS else 0
            span_blank = 0
        else:
            run = 0
            if in_word:
                in_word, last_ink = False, at
                inked += word_size
                words += 1
                hashes[words, PREFIX] = prefix
                sizes[words, FIRST_BYTE] = sizes[words - 1, FIRST_BYTE] + at - word_start
                sizes[words, FIRST_CHARACTER] = inked
                key = between(hashes, sizes, words - 1, words, powers)
                hashes[words - 1, OWN] = key
                row[LETTER_WORDS] += word_any & LETTER != 0
                if not word_all & SYMBOL:
                    row[CONTENT_WORDS] += 1
                    row[CONTENT_CHARACTERS] += word_size
                slot = np.int64(key >> np.uint64(20)) & (len(stop_keys) - 1)
                while stop_keys[slot]:
                    if stop_keys[slot] == key:
                        row[STOP_WORDS] += 1 - stop_seen[slot]
                        stop_seen[slot] = 1
                        break
                    slot = (slot + 1) & (len(stop_keys) - 1)
            if flags & BREAK:
                if not (point == _NEWLINE and at > begin and data[at - 1] == _RETURN):
                    row[LINES] += 1
                    row[BULLETS] += bullet
                    row[TAILS] += tail
                    head, bullet, tail = True, 0, 0
                fresh = at + size
            if point == _NEWLINE or at == end:
                row[NEWLINES] += point == _NEWLINE
                if at > span:
                    spans[count, BEGIN], spans[count, END] = span, at
                    spans[count, SIZE], spans[count, BLANK] = span_characters, span_blank
                    count += 1
                    if not span_blank:
                        row[TEXT_LINES] += 1
                        row[STOPPED] += last & STOP != 0
                        row[SHORT] += span_characters <= short_line
                row[CHARACTERS] += span_characters
                span, span_characters, span_blank = at + 1, -1, 1
        last = flags
        span_characters += 1
        at += size
    if fresh < end:
        row[LINES] += 1
        row[BULLETS] += bullet
        row[TAILS] += tail
    row[WORDS] = words
    row[INK] = row[CHARACTERS]
    row[CHARACTERS] += row[NEWLINES]
    return count, first_ink, last_ink


@compiled
def measure(
    data: Bytes,
    offsets: Numbers,
    table: Bytes,
    short_line: int,
    stop_keys: Longs,
    found: Numbers,
) -> None:
    """Fill `found`, (n, len(NAMES)) and zero before, but for the columns of C4.

    `stop_keys`, of a power of two in length, is a hash table of the keys of stop words as `word_keys` gives them.
    """
    most_words, most_lines = room(data, offsets, table)
    hashes, sizes = np.empty((most_words + 1, 2), np.uint64), np.empty((most_words + 1, 2), np.int64)
    spans = np.empty((most_lines, 5), np.int64)
    slots = capacity(max(most_words, most_lines))
    keys, counts, places = np.empty(slots, np.uint64), np.empty((slots, 2), np.int64), np.empty(slots, np.int64)
    stop_seen = np.empty(len(stop_keys), np.uint8)
    powers = np.empty(_POWERS, np.uint64)
    powers[0] = 1
    for exponent in range(1, _POWERS):
        powers[exponent] = extended(powers[exponent - 1], _POINT, np.uint64(0))
    for document in range(len(offsets) - 1):
        row, begin, end = found[document], offsets[document], offsets[document + 1]
        count, first, last = scan(
            data, begin, end, table, powers, short_line, stop_keys, stop_seen, row, hashes, sizes, spans
        )
        words = row[WORDS]
        mark_repeated(data, spans, count, keys, places)
        edges = 0 if end == begin else np.int64(data[begin] == _NEWLINE) + np.int64(data[end - 1] == _NEWLINE)
        row[PIECES] = count + edges
        row[REPEATED_PIECES] = edges == 2
        for span in range(count):
            if spans[span, AGAIN]:
                row[REPEATED_PIECES] += 1
                row[PIECE_CHARACTERS] += spans[span, SIZE]
                row[REPEATED_TEXT] += spans[span, SIZE] * (1 - spans[span, BLANK])
        paragraphs = split_paragraphs(data, first, last, spans) if words else 1
        row[PARAGRAPHS] = paragraphs
        if paragraphs > 1:
            mark_repeated(data, spans, paragraphs, keys, places)
            for span in range(paragraphs):
                if spans[span, AGAIN]:
                    row[REPEATED_PARAGRAPHS] += 1
                    row[PARAGRAPH_CHARACTERS] += characters_in(data, spans[span, BEGIN], spans[span, END])
        for n in range(2, 5):
            if words >= n:
                row[TOP_2 + n - 2] = top_gram(n, words, hashes, sizes, keys, counts)
        for n in range(5, 11):
            if words >= n:
                row[REPEATED_5 + n - 5] = repeated_grams(n, words, hashes, sizes, powers, keys)


@compiled
def word_keys(data: Bytes, offsets: Numbers, keys: Longs) -> None:
    """Fill `keys`, (n,), with the keys by which `measure` knows stop words: their own hashes."""
    for word in range(len(offsets) - 1):
        value = np.uint64(0)
        for at in range(offsets[word], offsets[word + 1]):
            value = extended(value, _POINT, np.uint64(data[at]) + np.uint64(1))
        keys[word] = mixed(value)
