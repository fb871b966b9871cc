"""fastText's prediction of the first label in Numba, for many texts at a time and with the library's own results.

A text is cut into words at white space; each word of the dictionary adds its vector and those of its n-grams, any other
word those of its n-grams; the mean of all is multiplied with the vectors of the labels. Sums are taken in the library's
order and in single precision, so that labels and probabilities are equal to those of its builds for x86-64 to the last
bit (Joulin et al. 2017, Bag of Tricks for Efficient Text Classification; fastText 0.9.2).
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers, Words, compiled, inner

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]

_BASIS, _PRIME = np.uint32(2166136261), np.uint32(16777619)
_END = np.frombuffer(b"</s>", np.uint8)
_EPSILON = 1e-5
"""fastText adds it to a probability before it takes the logarithm."""
_GROWTH = 1.1e-5
"""How much a score can grow at a node of the tree: log(1 + _EPSILON), rounded up."""


class Tables(NamedTuple):
    """A model as the kernel needs it."""

    slots: Rows
    """Hash table of the dictionary with open addressing: the number of the entry, or -1. Its size is a power of 2."""
    hashes: Words
    """The hash of each entry."""
    blob: Bytes
    """The bytes of all entries, one after another."""
    starts: Numbers
    """Entry e is blob[starts[e] : starts[e + 1]]."""
    n_words: int
    """Entries from this number on are labels."""
    end: int
    """The entry `</s>`, which stands for the end of the text, or -1."""
    subwords: Rows
    """The rows of each word: its own, then those of its n-grams."""
    subword_starts: Numbers
    """The rows of word w are subwords[subword_starts[w] : subword_starts[w + 1]]."""
    inputs: Floats
    """(rows, dim)"""
    buckets: int
    bucket_rows: Rows
    """See ModelFile; empty if no n-gram was pruned."""
    present: Bytes
    """A bit for each bucket: whether it has a row; empty as bucket_rows is."""
    shortest: int
    longest: int
    word_ngrams: int


@inner
def _hashed(state: np.uint32, byte: np.uint8) -> np.uint32:
    """FNV-1a, in which bytes are signed, as in fastText."""
    return np.uint32((state ^ np.uint32(np.int32(np.int8(byte)))) * _PRIME)


@inner
def _is_space(byte: np.uint8) -> bool:
    return bool(byte == 32 or byte == 0 or 9 <= byte <= 13)


@inner
def _is_label(data: Bytes, start: int, stop: int) -> bool:
    """Whether a word begins with `__label__`; fastText takes such words for labels, and skips them."""
    if stop - start < 9:
        return False
    expected = (95, 95, 108, 97, 98, 101, 108, 95, 95)
    same = True
    for place in range(9):
        same &= data[start + place] == expected[place]
    return same


@inner
def _row(bucket: int, bucket_rows: Rows, present: Bytes) -> int:
    """The row of a bucket, counted from the first bucket's, or -1."""
    if not len(bucket_rows):
        return bucket
    if not present[bucket >> 3] >> (bucket & 7) & 1:
        return -1
    return np.int64(bucket_rows[bucket])


@inner
def _add(inputs: Floats, found: Rows, count: int, hidden: Floats, total: Numbers) -> int:
    """Add some rows of the inputs to their sum `hidden`, and their number to total[0]; returns 0, the rows left."""
    if len(hidden) == 16:  # the constant lets the compiler unroll the loop
        for place in range(count):
            row = inputs[found[place]]
            for column in range(16):
                hidden[column] += row[column]
    else:
        for place in range(count):
            row = inputs[found[place]]
            for column in range(len(hidden)):
                hidden[column] += row[column]
    total[0] += count
    return 0


@inner
def _ngrams(word: Bytes, size: int, tables: Tables, found: Rows, count: int, hidden: Floats, total: Numbers) -> int:
    """Append the rows of the n-grams of `<word>` (its first `size` bytes) to `found`; returns how many it holds."""
    buckets = np.uint32(tables.buckets)
    for first in range(size):
        if word[first] & 0xC0 == 0x80:
            continue
        if count + tables.longest > len(found):
            count = _add(tables.inputs, found, count, hidden, total)
        state = _BASIS
        at = first
        for n in range(1, tables.longest + 1):
            if at >= size:
                break
            state = _hashed(state, word[at])
            at += 1
            while at < size and word[at] & 0xC0 == 0x80:
                state = _hashed(state, word[at])
                at += 1
            if n >= tables.shortest and not (n == 1 and (first == 0 or at == size)):
                row = _row(np.int64(state % buckets), tables.bucket_rows, tables.present)
                if row >= 0:
                    found[count] = tables.n_words + row
                    count += 1
    return count


@inner
def _entry(data: Bytes, start: int, stop: int, state: np.uint32, tables: Tables) -> int:
    """The entry of the dictionary that is this word, or -1."""
    mask = len(tables.slots) - 1
    slot = np.int64(state) & mask
    while tables.slots[slot] >= 0:
        entry = tables.slots[slot]
        begin = tables.starts[entry]
        if tables.hashes[entry] == state and tables.starts[entry + 1] - begin == stop - start:
            place = 0
            while place < stop - start and tables.blob[begin + place] == data[start + place]:
                place += 1
            if place == stop - start:
                return np.int64(entry)
        slot = (slot + 1) & mask
    return -1


@compiled
def fill_slots(hashes: Words, slots: Rows, blob: Bytes, starts: Numbers) -> None:
    """Compute the hash of each entry, and enter all into the hash table, which holds only -1 before."""
    for entry in range(len(hashes)):
        state = _BASIS
        for at in range(starts[entry], starts[entry + 1]):
            state = _hashed(state, blob[at])
        hashes[entry] = state
        slot = np.int64(state) & (len(slots) - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = entry


@compiled
def fill_subwords(tables: Tables, word: Bytes, subwords: Rows, starts: Numbers) -> None:
    """Write the rows of each word one after another; `word` is room for the longest word and two bytes."""
    nothing, total = np.empty(0, np.float32), np.zeros(1, np.int64)
    count = 0
    for entry in range(tables.n_words):
        starts[entry] = count
        subwords[count] = entry
        count += 1
        begin = tables.starts[entry]
        size = tables.starts[entry + 1] - begin
        if entry != tables.end and tables.longest > 0:
            word[0] = 60
            for place in range(size):
                word[1 + place] = tables.blob[begin + place]
            word[1 + size] = 62
            count = _ngrams(word, size + 2, tables, subwords, count, nothing, total)
    starts[tables.n_words] = count


@inner
def _sum_words(
    data: Bytes,
    at: int,
    stop: int,
    tables: Tables,
    word: Bytes,
    hashes: Rows,
    found: Rows,
    hidden: Floats,
    total: Numbers,
) -> int:
    """Add the rows of a text to `hidden`, in fastText's order; the last ones stay in `found`. Returns their number."""
    count = words = 0
    ended = False
    while not ended:
        while at < stop and _is_space(data[at]):
            at += 1
        start, state = at, _BASIS
        word[0] = 60
        while at < stop and not _is_space(data[at]):
            word[1 + at - start] = data[at]
            state = _hashed(state, data[at])
            at += 1
        size = at - start
        if size:
            entry = _entry(data, start, at, state, tables)
            ended = size == 4 and word[1] == 60 and word[2] == 47 and word[3] == 115 and word[4] == 62  # </s> ends it
        else:
            entry, ended = tables.end, True
            for place in range(4):
                state = _hashed(state, _END[place])
        if entry >= tables.n_words or (entry < 0 and not ended and _is_label(data, start, at)):
            continue
        if tables.word_ngrams > 1:
            hashes[words] = np.int32(state)
            words += 1
        if entry >= 0:
            for place in range(tables.subword_starts[entry], tables.subword_starts[entry + 1]):
                if count == len(found):
                    count = _add(tables.inputs, found, count, hidden, total)
                found[count] = tables.subwords[place]
                count += 1
        elif not ended and tables.longest > 0:
            word[1 + size] = 62
            count = _ngrams(word, size + 2, tables, found, count, hidden, total)
    return _sum_word_ngrams(hashes, words, tables, found, count, hidden, total)


@inner
def _sum_word_ngrams(
    hashes: Rows, words: int, tables: Tables, found: Rows, count: int, hidden: Floats, total: Numbers
) -> int:
    """Append the rows of the n-grams of words to `found`; returns how many it holds."""
    for first in range(words):
        state = np.uint64(np.int64(hashes[first]))
        for place in range(first + 1, min(first + tables.word_ngrams, words)):
            state = state * np.uint64(116049371) + np.uint64(np.int64(hashes[place]))
            row = _row(np.int64(state % np.uint64(tables.buckets)), tables.bucket_rows, tables.present)
            if row >= 0:
                if count == len(found):
                    count = _add(tables.inputs, found, count, hidden, total)
                found[count] = tables.n_words + row
                count += 1
    return count


@compiled
def hidden_vectors(data: Bytes, offsets: Numbers, tables: Tables, hidden: Floats) -> NDArray[np.bool_]:
    """Write the mean vector of each text to `hidden` (texts, dim), and return whether each has any row.

    Text t is data[offsets[t] : offsets[t + 1]].
    """
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    word = np.empty(longest + 4, np.uint8)
    hashes = np.empty(longest // 2 + 3 if tables.word_ngrams > 1 else 1, np.int32)
    found = np.empty(4096 + tables.longest, np.int32)
    known = np.zeros(len(offsets) - 1, np.bool_)
    total = np.zeros(1, np.int64)
    for text in range(len(offsets) - 1):
        total[0] = 0
        hidden[text] = 0
        left = _sum_words(data, offsets[text], offsets[text + 1], tables, word, hashes, found, hidden[text], total)
        _add(tables.inputs, found, left, hidden[text], total)
        if total[0]:
            known[text] = True
            scale = np.float32(1.0 / total[0])
            for column in range(hidden.shape[1]):
                hidden[text, column] *= scale
    return known


@inner
def _dot(left: Floats, right: Floats) -> np.float32:
    total = np.float32(0)
    for place in range(len(left)):
        total += left[place] * right[place]
    return total


@inner
def _branch(hidden: Floats, outputs: Floats, norms: Floats, node: int) -> np.float32:
    """The probability of the right branch at an inner node."""
    value = _dot(hidden, outputs[node]) * norms[node]
    return np.float32(1.0 / np.float64(np.float32(1) + np.float32(math.exp(np.float32(-value)))))


@inner
def _log(value: np.float32) -> np.float32:
    return np.float32(math.log(np.float64(value) + _EPSILON))


@compiled
def best_in_tree(
    hidden: Floats, outputs: Floats, norms: Floats, children: Rows, depth: int, labels: Rows, probabilities: Floats
) -> None:
    """Hierarchical softmax: the best leaf for each vector, and its probability.

    A score is the logarithm of a probability.

    `children` has the two children of each node: leaves come first, inner node i is node len(outputs) + i, the last
    node is the root. A walk down the likelier branches gives a score that the best leaf has at least, and so the
    library's order of the search is kept where the search still goes.
    """
    leaves = len(outputs)
    nodes = np.empty(depth + 2, np.int32)
    sums = np.empty(depth + 2, np.float32)
    lowest = _log(np.float32(0))
    for text in range(len(hidden)):
        node, reached = len(children) - 1, np.float32(0)
        while node >= leaves:
            right = _branch(hidden[text], outputs, norms, node - leaves)
            side = 1 if right >= np.float32(0.5) else 0
            reached += _log(right) if side else _log(np.float32(1.0 - np.float64(right)))
            node = children[node, side]
        floor = max(lowest, np.float32(reached - depth * _GROWTH))
        best, label = np.float32(0), -1
        nodes[0], sums[0] = len(children) - 1, np.float32(0)
        size = 1
        while size:
            size -= 1
            node, score = nodes[size], sums[size]
            if score < floor or (label >= 0 and score < best):
                continue
            if node < leaves:
                best, label = score, node
                continue
            right = _branch(hidden[text], outputs, norms, node - leaves)
            nodes[size], sums[size] = children[node, 1], score + _log(right)
            nodes[size + 1], sums[size + 1] = children[node, 0], score + _log(np.float32(1.0 - np.float64(right)))
            size += 2
        labels[text], probabilities[text] = label, np.float32(math.exp(best))


@compiled
def best_of_all(
    hidden: Floats, columns: Floats, norms: Floats, sigmoid: Floats, labels: Rows, probabilities: Floats
) -> None:
    """Softmax (`sigmoid` is empty) or one probability per label: the best label for each vector, and its probability.

    `columns` (dim, labels) has the output vectors as columns, so that all products are summed side by side.
    """
    values = np.empty(columns.shape[1], np.float32)
    for text in range(len(hidden)):
        values[:] = 0
        for row in range(len(columns)):
            factor = hidden[text, row]
            for place in range(len(values)):
                values[place] += factor * columns[row, place]
        for place in range(len(values)):
            values[place] *= norms[place]
        if len(sigmoid):
            for place in range(len(values)):
                values[place] = _sigmoid(values[place], sigmoid)
        else:
            _softmax(values)
        best, label = np.float32(0), -1
        for place in range(len(values)):
            score = _log(values[place])
            if label < 0 or score >= best:
                best, label = score, place
        labels[text], probabilities[text] = label, np.float32(math.exp(best))


@inner
def _sigmoid(value: np.float32, sigmoid: Floats) -> np.float32:
    if value < -8:
        return np.float32(0)
    if value > 8:
        return np.float32(1)
    return sigmoid[np.int64(np.float32(np.float32(value + np.float32(8)) * np.float32(512)) / np.float32(8) / 2)]


@inner
def _softmax(values: Floats) -> None:
    """The library takes this exponential in double precision, and the one of a branch in single precision."""
    top, total = values[0], np.float32(0)
    for place in range(len(values)):
        top = max(top, values[place])
    for place in range(len(values)):
        values[place] = np.float32(math.exp(np.float64(np.float32(values[place] - top))))
        total += values[place]
    for place in range(len(values)):
        values[place] /= total


def sigmoid_table() -> Floats:
    """fastText's table of the logistic function: 513 values from -8 to 8."""
    places = (np.arange(513, dtype=np.float32) * np.float32(16) / np.float32(512) - np.float32(8)).astype(np.float32)
    return np.array([1.0 / (1.0 + float(np.float32(math.exp(-place)))) for place in places.tolist()], np.float32)


def tree(counts: Any) -> tuple[Rows, int]:
    """The children of each node of the Huffman tree over labels with these counts, (nodes, 2), and its depth.

    Labels come in the order of falling counts, as the dictionary has them.
    """
    leaves = len(counts)
    sums = [*map(int, counts), *[10**15] * (leaves - 1)]
    children = np.full((2 * leaves - 1, 2), -1, np.int32)
    depths = [0] * (2 * leaves - 1)
    leaf, node = leaves - 1, leaves
    for new in range(leaves, 2 * leaves - 1):
        for side in range(2):
            if leaf >= 0 and sums[leaf] < sums[node]:
                children[new, side] = leaf
                leaf -= 1
            else:
                children[new, side] = node
                node += 1
        left, right = map(int, children[new])
        sums[new] = sums[left] + sums[right]
        depths[new] = 1 + max(depths[left], depths[right])
    return children, depths[-1]
