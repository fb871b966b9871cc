"""The mean vector of a text.

A text is cut into words at white space; each word of the dictionary adds its vector and those of its n-grams, any other
word those of its n-grams.
"""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers
from snakmodel.filter.fasttext_kernel.cache import compiled, inner
from snakmodel.filter.fasttext_kernel.dictionary import BASIS, entry_of, hashed, is_label, is_space
from snakmodel.filter.fasttext_kernel.subwords import add_rows, ngrams, row_of
from snakmodel.filter.fasttext_kernel.tables import Floats, Rows, Tables

_END = np.frombuffer(b"</s>", np.uint8)


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
        while at < stop and is_space(data[at]):
            at += 1
        start, state = at, BASIS
        word[0] = 60
        while at < stop and not is_space(data[at]):
            word[1 + at - start] = data[at]
            state = hashed(state, data[at])
            at += 1
        size = at - start
        if size:
            entry = entry_of(data, start, at, state, tables)
            ended = size == 4 and word[1] == 60 and word[2] == 47 and word[3] == 115 and word[4] == 62  # </s> ends it
        else:
            entry, ended = tables.end, True
            for place in range(4):
                state = hashed(state, _END[place])
        if entry >= tables.n_words or (entry < 0 and not ended and is_label(data, start, at)):
            continue
        if tables.word_ngrams > 1:
            hashes[words] = np.int32(state)
            words += 1
        if entry >= 0:
            for place in range(tables.subword_starts[entry], tables.subword_starts[entry + 1]):
                if count == len(found):
                    count = add_rows(tables.inputs, found, count, hidden, total)
                found[count] = tables.subwords[place]
                count += 1
        elif not ended and tables.longest > 0:
            word[1 + size] = 62
            count = ngrams(word, size + 2, tables, found, count, hidden, total)
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
            row = row_of(np.int64(state % np.uint64(tables.buckets)), tables.bucket_rows, tables.present)
            if row >= 0:
                if count == len(found):
                    count = add_rows(tables.inputs, found, count, hidden, total)
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
        add_rows(tables.inputs, found, left, hidden[text], total)
        if total[0]:
            known[text] = True
            scale = np.float32(1.0 / total[0])
            for column in range(hidden.shape[1]):
                hidden[text, column] *= scale
    return known
