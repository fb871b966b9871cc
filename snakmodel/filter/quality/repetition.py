"""The part of the compiled kernel that finds repeated lines and paragraphs, and repeated n-grams of words.

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

from snakmodel.dedup.minhash.kernel import extended, mixed
from snakmodel.dedup.minhash.parameters import KEY_POINTS, PRIME
from snakmodel.filter.quality.cache import high_product, inner, long_at
from snakmodel.filter.quality.measures import Bytes, Numbers

Longs = NDArray[np.uint64]

BEGIN, END, SIZE, BLANK, AGAIN = range(5)
"""Columns of a table of spans: the first byte, the byte after the last, the characters, whether it holds only white
space, and whether it occurred before in the document."""
OWN, PREFIX = range(2)
"""Columns of the hashes of words: the word itself, and all words before it."""
FIRST_BYTE, FIRST_CHARACTER = range(2)
"""Columns of the sizes of words: the bytes and characters of all words before it."""
POINT = np.uint64(KEY_POINTS[0])
"""The point at which the hashes of words are taken."""
POWERS = 256
"""How many powers of the point are tabled."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
_NEWLINE = 0x0A


@inner
def power(exponent: int, powers: Longs) -> np.uint64:
    """The point of the hashes to this power, modulo 2⁶¹ - 1; `powers` holds the first ones."""
    if exponent < len(powers):
        return powers[exponent]
    value, base = np.uint64(1), POINT
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
