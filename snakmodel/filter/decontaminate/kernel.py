"""The compiled kernel of decontamination: it tabulates the n-grams of evaluation items, and finds them in documents.

  spell      items -> their letters, with a SEPARATOR after each word
  tabulate   letters -> the different grams, a hash table of them, a filter, and which item has which gram
  find       documents -> matches of grams, and the spans of words that matches cover

A gram is a run of words: n of them, or all words of an item that has fewer. Each word has a 64-bit hash, and so has
each run of words. A document's last words are looked up in two steps. The filter has a bit for the hash of the last
`shortest` words of each gram; this hash is kept up to date from word to word, and most words end here. For the others,
the hash of each possible number of words is looked up in the table, and where it is there, the letters themselves are
compared. Hashes therefore only decide what is compared, and never what matches.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.kernel import decode
from snakmodel.filter.decontaminate.cache import compiled, inner
from snakmodel.filter.decontaminate.letters import EXPANDED, PASSED_OVER, SEPARATOR, Words
from snakmodel.filter.quality.measures import Bytes, Numbers

Longs = NDArray[np.uint64]

DOCUMENT, GRAM, LAST = range(3)
"""Columns of matches: the document, the gram, and the number of the gram's last word in the document."""
OF, FIRST_WORD, LAST_WORD, BEGIN, END = range(5)
"""Columns of spans: the document, its first and last word in the span, and the first byte and the one after the last,
counted from the begin of the document."""
BITS = 32
"""Bits of the filter per gram; one of them is set, so that about three per cent of all other words pass."""
_SEED, _LETTER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_WORD, _MIX = np.uint64(0xD1342543DE82EF95), np.uint64(0xBF58476D1CE4E5B9)
_EXPANDED, _NO_FLAG = np.uint32(EXPANDED), np.uint32(EXPANDED - 1)


@inner
def with_letter(value: np.uint64, letter: np.uint32) -> np.uint64:
    """The hash of a word's letters so far and one more."""
    return (value ^ np.uint64(letter)) * _LETTER


@inner
def mixed(value: np.uint64) -> np.uint64:
    """A hash whose bits all depend on all bits of the value."""
    value = (value ^ value >> np.uint64(32)) * _MIX
    return value ^ value >> np.uint64(29)


@inner
def bit_of(rolling: np.uint64, words: Longs) -> tuple[int, np.uint64]:
    """The place of a hash in the filter: the word, and the bit in it. The filter's size is a power of two."""
    value = mixed(rolling)
    return np.int64(value >> np.uint64(6)) & (len(words) - 1), np.uint64(1) << (value & np.uint64(63))


@inner
def run_hash(ring: Longs, last: int, length: int) -> np.uint64:
    """The hash, never 0, of the run of words that ends with word `last`; the ring holds the hashes of single words."""
    value = np.uint64(length)
    for word in range(last - length + 1, last + 1):
        value = value * _WORD + ring[word & (len(ring) - 1)]
    return mixed(value) | np.uint64(1)


@inner
def power(exponent: int) -> np.uint64:
    """The multiplier of run hashes to this power."""
    value = np.uint64(1)
    for _ in range(exponent):
        value *= _WORD
    return value


@inner
def ring_size(longest: int) -> int:
    """The size of a ring for runs of this many words: a power of two above it."""
    size = 2
    while size <= longest:
        size *= 2
    return size


@compiled
def spell(
    data: Bytes, offsets: Numbers, letters: Words, more: Words, out: Words, ends: Numbers, words: Numbers
) -> None:
    """Fill `ends`, (n + 1,), with the ends of the items' letters, and `words`, (n,), with their numbers of words.

    The letters are written to `out`, unless it is empty.
    """
    top = 0
    ends[0] = 0
    for item in range(len(offsets) - 1):
        at = offsets[item]
        words[item] = 0
        is_open = False
        while at <= offsets[item + 1]:
            entry, size = np.uint32(SEPARATOR), 1
            if at < offsets[item + 1]:
                point, size = decode(data, at)
                entry = letters[point]
            at += size
            if entry == PASSED_OVER:
                continue
            if entry == SEPARATOR:
                if is_open:
                    if len(out):
                        out[top] = SEPARATOR
                    top += 1
                    words[item] += 1
                is_open = False
                continue
            is_open = True
            count = np.int64(1)
            if entry & _EXPANDED:
                place = np.int64(entry & _NO_FLAG)
                count = np.int64(more[place])
                if len(out):
                    out[top : top + count] = more[place + 1 : place + 1 + count]
            elif len(out):
                out[top] = entry
            top += count
        ends[item + 1] = top


@compiled
def tabulate(
    spelled: Words,
    ends: Numbers,
    lengths: Numbers,
    longest: int,
    shortest: int,
    keys: Longs,
    slots: Numbers,
    begins: Numbers,
    stops: Numbers,
    seen: Longs,
    pairs: Numbers,
) -> tuple[int, int]:
    """Fill the hash table (`keys`, `slots`), the grams' letters (`begins`, `stops`), the filter and the pairs.

    `lengths`, (n,), says of how many words the grams of each item are; 0 leaves an item out. Each row of `pairs` is a
    gram and an item that has it. Returns the number of grams and of pairs, in the order of items.
    """
    ring, places = np.empty(ring_size(longest), np.uint64), np.empty(ring_size(longest), np.int64)
    grams, count = 0, 0
    for item in range(len(lengths)):
        length = lengths[item]
        if not length:
            continue
        word, value, begin = 0, _SEED, ends[item]
        for at in range(ends[item], ends[item + 1]):
            if spelled[at] != SEPARATOR:
                value = with_letter(value, spelled[at])
                continue
            ring[word & (len(ring) - 1)], places[word & (len(ring) - 1)] = mixed(value), begin
            word, value, begin = word + 1, _SEED, at + 1
            if word < length:
                continue
            rolling = np.uint64(0)
            for one in range(word - shortest, word):
                rolling = rolling * _WORD + ring[one & (len(ring) - 1)]
            place, bit = bit_of(rolling, seen)
            seen[place] |= bit
            key = run_hash(ring, word - 1, length)
            first = places[(word - length) & (len(ring) - 1)]
            slot = np.int64(key >> np.uint64(20)) & (len(keys) - 1)
            while keys[slot]:
                if keys[slot] == key and equal(spelled, begins[slots[slot]], stops[slots[slot]], first, at):
                    break
                slot = (slot + 1) & (len(keys) - 1)
            if not keys[slot]:
                keys[slot], slots[slot], begins[grams], stops[grams] = key, grams, first, at
                grams += 1
            pairs[count, 0], pairs[count, 1] = slots[slot], item
            count += 1
    return grams, count


@inner
def equal(spelled: Words, one: int, stop: int, other: int, other_stop: int) -> bool:
    """Whether two ranges hold the same letters."""
    if stop - one != other_stop - other:
        return False
    for place in range(stop - one):  # noqa: SIM110 (Numba compiles no generator expressions)
        if spelled[one + place] != spelled[other + place]:
            return False
    return True


@inner
def spells(data: Bytes, begin: int, end: int, letters: Words, more: Words, spelled: Words, at: int, stop: int) -> bool:
    """Whether a text, which begins and ends with a letter, has the letters spelled[at : stop]."""
    gap = False
    while begin < end:
        point, size = decode(data, begin)
        entry = letters[point]
        begin += size
        if entry == PASSED_OVER:
            continue
        if entry == SEPARATOR:
            gap = True
            continue
        if gap:
            if at >= stop or spelled[at] != SEPARATOR:
                return False
            at, gap = at + 1, False
        if entry & _EXPANDED:
            place = np.int64(entry & _NO_FLAG)
            for one in range(place + 1, place + 1 + np.int64(more[place])):
                if at >= stop or spelled[at] != more[one]:
                    return False
                at += 1
        else:
            if at >= stop or spelled[at] != entry:
                return False
            at += 1
    return at == stop


@inner
def cover(spans: Numbers, first: int, count: int, word: int, begin: int) -> int:
    """Add a span that begins at this word and byte, and join it with those from `first` on that it touches.

    Returns the number of spans; the end of the last one is still to be set.
    """
    while count > first and word <= spans[count - 1, LAST_WORD] + 1:
        count -= 1
        word, begin = min(word, spans[count, FIRST_WORD]), min(begin, spans[count, BEGIN])
    spans[count, FIRST_WORD], spans[count, BEGIN] = word, begin
    return count + 1


@compiled
def find(
    data: Bytes,
    offsets: Numbers,
    letters: Words,
    more: Words,
    spelled: Words,
    lengths: Numbers,
    keys: Longs,
    slots: Numbers,
    begins: Numbers,
    stops: Numbers,
    seen: Longs,
    matches: Numbers,
    spans: Numbers,
) -> tuple[int, int]:
    """Fill `matches`, (m, 3), and `spans`, (m, 5), both in the order of the text, and return their numbers.

    A span is a maximal run of words that matches cover. `lengths` are the numbers of words of grams, rising. If there
    are more than m matches, only their number is right. (To enlarge the tables here would cost much: Numba counts the
    references to an array that may change in a loop at each step of the loop.)
    """
    shortest = lengths[0]
    ring, places = np.empty(ring_size(lengths[-1]), np.uint64), np.empty(ring_size(lengths[-1]), np.int64)
    around, leaving = len(ring) - 1, power(shortest)
    count, covered = 0, 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        words, rolling, first_span = 0, np.uint64(0), covered
        value, word_begin, word_end, is_open = _SEED, at, at, False
        while at <= end:
            entry, size = np.uint32(SEPARATOR), 1
            if at < end:
                point = np.int64(data[at])
                if point >= 0x80:
                    point, size = decode(data, at)
                entry = letters[point]
            if entry > PASSED_OVER:
                if not is_open:
                    is_open, word_begin, value = True, at, _SEED
                if entry & _EXPANDED:
                    place = np.int64(entry & _NO_FLAG)
                    for one in range(place + 1, place + 1 + np.int64(more[place])):
                        value = with_letter(value, more[one])
                else:
                    value = with_letter(value, entry)
                word_end = at + size
            elif entry == SEPARATOR and is_open:
                is_open = False
                value = mixed(value)
                rolling = rolling * _WORD + value
                if words >= shortest:
                    rolling -= ring[(words - shortest) & around] * leaving
                ring[words & around], places[words & around] = value, word_begin
                words += 1
                if words >= shortest:
                    place, bit = bit_of(rolling, seen)
                    if seen[place] & bit:
                        for length in lengths:
                            if length > words:
                                break
                            key = run_hash(ring, words - 1, length)
                            first = places[(words - length) & around]
                            slot = np.int64(key >> np.uint64(20)) & (len(keys) - 1)
                            while keys[slot]:
                                gram = slots[slot]
                                if keys[slot] == key and spells(
                                    data, first, word_end, letters, more, spelled, begins[gram], stops[gram]
                                ):
                                    if count < len(matches):
                                        matches[count, DOCUMENT], matches[count, GRAM] = document, gram
                                        matches[count, LAST] = words - 1
                                        begin = first - offsets[document]
                                        covered = cover(spans, first_span, covered, words - length, begin)
                                        spans[covered - 1, OF], spans[covered - 1, LAST_WORD] = document, words - 1
                                        spans[covered - 1, END] = word_end - offsets[document]
                                    count += 1
                                    break
                                slot = (slot + 1) & (len(keys) - 1)
            at += size
    return count, covered
