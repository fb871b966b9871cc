"""The compiled kernel that counts words, lines and repetitions of documents in UTF-8.

scan      one pass over the characters of a document -> its counts, its words and its lines
measure   all documents -> all measures but those of C4, with what `repetition.py` finds in the words and lines
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.kernel import decode, extended, mixed
from snakmodel.filter.quality.cache import compiled, inner
from snakmodel.filter.quality.characters import BREAK, LETTER, SPACE, STOP, SYMBOL
from snakmodel.filter.quality.measures import COLUMN, NAMES, Bytes, Numbers
from snakmodel.filter.quality.repetition import (
    AGAIN,
    BEGIN,
    BLANK,
    END,
    FIRST_BYTE,
    FIRST_CHARACTER,
    OWN,
    POINT,
    POWERS,
    PREFIX,
    SIZE,
    Longs,
    between,
    capacity,
    characters_in,
    mark_repeated,
    repeated_grams,
    split_paragraphs,
    top_gram,
)

CHARACTERS, WORDS, CONTENT_WORDS, CONTENT_CHARACTERS, LETTER_WORDS, STOP_WORDS, HASHES, ELLIPSES = range(8)
LINES, BULLETS, TAILS, NEWLINES, INK, TEXT_LINES, STOPPED, SHORT, REPEATED_TEXT = range(8, 17)
PIECES, REPEATED_PIECES, PIECE_CHARACTERS, PARAGRAPHS, REPEATED_PARAGRAPHS, PARAGRAPH_CHARACTERS = range(17, 23)
TOP_2, REPEATED_5 = COLUMN["top_2_gram"], COLUMN["repeated_5_grams"]
MEASURES = len(NAMES)
_NEWLINE, _RETURN, _HASH, _DOT, _HYPHEN, _BULLET, _ELLIPSIS = 0x0A, 0x0D, 0x23, 0x2E, 0x2D, 0x2022, 0x2026


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
def count_word(row: Numbers, any_flags: int, all_flags: int, size: int) -> None:
    """Count a word of `size` characters, of which any has the first flags, and all have the second ones."""
    row[LETTER_WORDS] += any_flags & LETTER != 0
    if not all_flags & SYMBOL:
        row[CONTENT_WORDS] += 1
        row[CONTENT_CHARACTERS] += size


@inner
def new_stop_word(key: np.uint64, stop_keys: Longs, stop_seen: Bytes) -> int:
    """1 if the key is that of a stop word which the document did not have before, which is then noted, and else 0."""
    slot = np.int64(key >> np.uint64(20)) & (len(stop_keys) - 1)
    while stop_keys[slot]:
        if stop_keys[slot] == key:
            new = 1 - np.int64(stop_seen[slot])
            stop_seen[slot] = 1
            return new
        slot = (slot + 1) & (len(stop_keys) - 1)
    return 0


@inner
def count_line(row: Numbers, bullet: int, tail: int) -> None:
    """Count a line, and whether it begins with a bullet and ends in an ellipsis."""
    row[LINES] += 1
    row[BULLETS] += bullet
    row[TAILS] += tail


@inner
def count_text_line(row: Numbers, last: int, short: bool) -> None:
    """Count a line that is not blank: `last` holds the flags of its last character."""
    row[TEXT_LINES] += 1
    row[STOPPED] += last & STOP != 0
    row[SHORT] += short


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
                prefix = extended(prefix, POINT, np.uint64(data[place]) + np.uint64(1))
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
                count_word(row, word_any, word_all, word_size)
                row[STOP_WORDS] += new_stop_word(key, stop_keys, stop_seen)
            if flags & BREAK:
                if not (point == _NEWLINE and at > begin and data[at - 1] == _RETURN):
                    count_line(row, bullet, tail)
                    head, bullet, tail = True, 0, 0
                fresh = at + size
            if point == _NEWLINE or at == end:
                row[NEWLINES] += point == _NEWLINE
                if at > span:
                    spans[count, BEGIN], spans[count, END] = span, at
                    spans[count, SIZE], spans[count, BLANK] = span_characters, span_blank
                    count += 1
                    if not span_blank:
                        count_text_line(row, last, span_characters <= short_line)
                row[CHARACTERS] += span_characters
                span, span_characters, span_blank = at + 1, -1, 1
        last = flags
        span_characters += 1
        at += size
    if fresh < end:
        count_line(row, bullet, tail)
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
    powers = np.empty(POWERS, np.uint64)
    powers[0] = 1
    for exponent in range(1, POWERS):
        powers[exponent] = extended(powers[exponent - 1], POINT, np.uint64(0))
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
            value = extended(value, POINT, np.uint64(data[at]) + np.uint64(1))
        keys[word] = mixed(value)
