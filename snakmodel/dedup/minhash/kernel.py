"""The MinHash kernel in Numba: UTF-8 -> tokens -> 32-bit hashes of the n-grams -> signatures -> band keys.

  normalise   documents -> one buffer in which every token is followed by one space, and the start of each token
  sha1_grams  each n-gram -> its hash; an n-gram is a byte range of that buffer, in which spaces join the tokens
  minima      the hashes of a document -> its signature
  keys        signatures -> records of 128-bit keys

Document d has the tokens tokens[d] … tokens[d + 1] - 1, and token k is text[starts[k] : starts[k + 1] - 1]. xxh3_grams
takes the place of sha1_grams for the other hash function.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.compile_cache import Bytes, Longs, Numbers, Words, compiled, high_product, inner
from snakmodel.dedup.minhash.parameters import PRIME

SLACK = 64
"""The number of bytes that must follow the text in its buffer, because hashing reads whole blocks."""
SEPARATOR = 0x20
SIGMA, EXPANDED = 1 << 31, 1 << 30
CASED, IGNORABLE = 1 << 29, 1 << 28
POINT = (1 << 21) - 1
"""Fields of a table entry. SIGMA marks Σ, whose lower case depends on the context; EXPANDED marks a letter that a
separator follows; CASED and IGNORABLE say how a letter counts beside a Σ; POINT masks the code point."""
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@inner
def decode(data: Bytes, at: int) -> tuple[int, int]:
    """The code point whose valid UTF-8 starts at data[at], and the number of bytes that it takes."""
    lead = np.int64(data[at])
    if lead < 0x80:
        return lead, 1
    point = (lead & 0x1F) << 6 | np.int64(data[at + 1] & 0x3F)
    if lead < 0xE0:
        return point, 2
    point = (point & 0x3FF) << 6 | np.int64(data[at + 2] & 0x3F)
    if lead < 0xF0:
        return point, 3
    return (point & 0x7FFF) << 6 | np.int64(data[at + 3] & 0x3F), 4


@inner
def encode(point: int, text: Bytes, at: int) -> int:
    """Write a code point as UTF-8 at text[at], and return the position for the next one."""
    if point < 0x80:
        text[at] = point
        return at + 1
    if point < 0x800:
        text[at] = 0xC0 | point >> 6
    else:
        if point < 0x10000:
            text[at] = 0xE0 | point >> 12
        else:
            text[at] = 0xF0 | point >> 18
            at += 1
            text[at] = 0x80 | point >> 12 & 0x3F
        at += 1
        text[at] = 0x80 | point >> 6 & 0x3F
    text[at + 1] = 0x80 | point & 0x3F
    return at + 2


@inner
def final_sigma(data: Bytes, begin: int, at: int, end: int, table: Words) -> bool:
    """Whether the Σ at data[at] ends a word: a cased letter precedes it and none follows, ignorable ones aside."""
    before = 0
    left = at
    while left > begin:
        left -= 1
        while data[left] & 0xC0 == 0x80:
            left -= 1
        before = np.int64(table[decode(data, left)[0]])
        if not before & IGNORABLE:
            break
    if not before & CASED:
        return False
    right = at + 2
    while right < end:
        point, size = decode(data, right)
        right += size
        if not table[point] & IGNORABLE:
            return not table[point] & CASED
    return True


@compiled
def normalise(data: Bytes, offsets: Numbers, table: Words, text: Bytes, starts: Numbers, tokens: Numbers) -> None:
    """Fill `text`, `starts` and `tokens`.

    `data` and `offsets` hold the documents in valid UTF-8, as Arrow keeps them. `table`, (0x110000,), says what a code
    point becomes: a separator, or a letter in lower case. `text` needs 3 bytes for every 2 bytes of the documents, one
    byte per document, and SLACK bytes; `starts` needs one entry per byte and per document, and one more; `tokens` needs
    one entry per document, and one more.
    """
    top, token = 0, 0
    starts[0] = 0
    for document in range(len(offsets) - 1):
        tokens[document] = token
        begin, end = offsets[document], offsets[document + 1]
        at = begin
        while at < end:
            if data[at] < 0x80:  # written without a branch: where words end cannot be predicted
                point = np.int64(table[data[at]]) & 0x7F
                text[top] = point
                at, top = at + 1, top + 1
                token += point == SEPARATOR
                starts[token] = top if point == SEPARATOR else starts[token]
                continue
            source, size = decode(data, at)
            entry = np.int64(table[source])
            point = entry & POINT
            if entry & SIGMA and final_sigma(data, begin, at, end, table):
                point = 0x3C2
            at += size
            top = encode(point, text, top)
            if point == SEPARATOR:
                token += 1
                starts[token] = top
            if entry & EXPANDED:
                text[top] = SEPARATOR
                token, top = token + 1, top + 1
                starts[token] = top
        text[top] = SEPARATOR
        token, top = token + 1, top + 1
        starts[token] = top
    tokens[len(offsets) - 1] = token


@inner
def permuted(value: np.uint64, multiplier: np.uint64, offset: np.uint64) -> np.uint64:
    """(value * multiplier + offset mod 2⁶⁴) mod (2⁶¹ - 1) mod 2³²."""
    product = value * multiplier + offset
    # For product = q·2⁶¹ + s the residue is s + q, less the prime if s + q reaches it; modulo 2³² that is s + q + 1.
    above = product >> np.uint64(61)
    carry = ((product & np.uint64(PRIME)) + above + np.uint64(1)) >> np.uint64(61)
    return (product + above + carry) & np.uint64(0xFFFFFFFF)


@compiled
def minima(
    hashes: Words, tokens: Numbers, ngram: int, min_length: int, multipliers: Longs, offsets: Longs, signatures: Words
) -> None:
    """Fill `signatures`, (n, num_perm). Documents with fewer than `min_length` tokens get 2³² - 1 throughout."""
    row = np.empty(len(multipliers), np.uint64)
    for document in range(len(tokens) - 1):
        for place in range(len(row)):
            row[place] = np.uint64(0xFFFFFFFF)
        first, last = tokens[document], tokens[document + 1]
        stop = first if last - first < min_length else last - min(ngram, last - first) + 1
        for token in range(first, stop, 4):  # by fours, which saves memory traffic; the last is repeated
            one, two = np.uint64(hashes[token]), np.uint64(hashes[min(token + 1, stop - 1)])
            three, four = np.uint64(hashes[min(token + 2, stop - 1)]), np.uint64(hashes[min(token + 3, stop - 1)])
            for place in range(len(row)):
                a, b = multipliers[place], offsets[place]
                low = min(permuted(one, a, b), permuted(two, a, b))
                low = min(low, min(permuted(three, a, b), permuted(four, a, b)))
                row[place] = min(row[place], low)
        for place in range(len(row)):
            signatures[document, place] = row[place]


@inner
def extended(value: np.uint64, point: np.uint64, word: np.uint64) -> np.uint64:
    """value * point + word modulo 2⁶¹ - 1, though not always reduced to the least residue."""
    low, high = value * point, high_product(value, point)
    total = (low & np.uint64(PRIME)) + (high << np.uint64(3) | low >> np.uint64(61)) + word
    return (total & np.uint64(PRIME)) + (total >> np.uint64(61))


@inner
def mixed(value: np.uint64) -> np.uint64:
    """The least residue modulo 2⁶¹ - 1, spread over 64 bits by the finaliser of SplitMix64, which is one-to-one."""
    value = value % np.uint64(PRIME)
    value = (value ^ value >> np.uint64(30)) * _MULTIPLIER_1
    value = (value ^ value >> np.uint64(27)) * _MULTIPLIER_2
    return value ^ value >> np.uint64(31)


@inner
def text_key(data: Bytes, begin: int, end: int, tag: int, point: np.uint64) -> np.uint64:
    """One half of the key of a text.

    Its coefficients are tag + 1, the bytes in groups of four (little-endian, filled up with zeros), and their number.
    """
    value = np.uint64(tag + 1)
    for at in range(begin, end, 4):
        word = np.uint64(0)
        for place in range(min(4, end - at)):
            word |= np.uint64(data[at + place]) << np.uint64(8 * place)
        value = extended(value, point, word)
    return mixed(extended(value, point, np.uint64(end - begin)))


@inner
def store(record: Words, high: np.uint64, low: np.uint64, row: int) -> None:
    """Write the five words of a RECORD."""
    record[0], record[1] = high & np.uint64(0xFFFFFFFF), high >> np.uint64(32)
    record[2], record[3] = low & np.uint64(0xFFFFFFFF), low >> np.uint64(32)
    record[4] = row


@compiled
def keys(
    data: Bytes,
    offsets: Numbers,
    tokens: Numbers,
    min_length: int,
    short_tag: int,
    short_whole: bool,
    signatures: Words,
    bands: int,
    rows: int,
    points: Longs,
    first_row: int,
    records: Words,
) -> None:
    """Fill `records`, (k, 5), in the order of documents.

    A document has one record per band or, with fewer than `min_length` tokens, one record of its text. If `short_tag`
    is -1, short documents have no record; unless `short_whole`, every short text is taken for an empty one, so that all
    are linked.
    """
    top = 0
    for document in range(len(tokens) - 1):
        row = first_row + document
        if tokens[document + 1] - tokens[document] < min_length:
            if short_tag >= 0:
                begin = offsets[document]
                end = offsets[document + 1] if short_whole else begin
                high, low = (
                    text_key(data, begin, end, short_tag, points[0]),
                    text_key(data, begin, end, short_tag, points[1]),
                )
                store(records[top], high, low, row)
                top += 1
            continue
        for band in range(bands):
            high, low = np.uint64(band + 1), np.uint64(band + 1)
            for place in range(band * rows, (band + 1) * rows):
                word = np.uint64(signatures[document, place])
                high, low = extended(high, points[0], word), extended(low, points[1], word)
            store(records[top], mixed(high), mixed(low), row)
            top += 1
