"""The rows of a word: its own, and those of the n-grams of its characters."""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers
from snakmodel.filter.fasttext_kernel.cache import compiled, inner
from snakmodel.filter.fasttext_kernel.dictionary import BASIS, hashed
from snakmodel.filter.fasttext_kernel.tables import Floats, Rows, Tables


@inner
def row_of(bucket: int, bucket_rows: Rows, present: Bytes) -> int:
    """The row of a bucket, counted from the first bucket's, or -1."""
    if not len(bucket_rows):
        return bucket
    if not present[bucket >> 3] >> (bucket & 7) & 1:
        return -1
    return np.int64(bucket_rows[bucket])


@inner
def add_rows(inputs: Floats, found: Rows, count: int, hidden: Floats, total: Numbers) -> int:
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
def ngrams(word: Bytes, size: int, tables: Tables, found: Rows, count: int, hidden: Floats, total: Numbers) -> int:
    """Append the rows of the n-grams of `<word>` (its first `size` bytes) to `found`; returns how many it holds."""
    buckets = np.uint32(tables.buckets)
    for first in range(size):
        if word[first] & 0xC0 == 0x80:
            continue
        if count + tables.longest > len(found):
            count = add_rows(tables.inputs, found, count, hidden, total)
        state = BASIS
        at = first
        for n in range(1, tables.longest + 1):
            if at >= size:
                break
            state = hashed(state, word[at])
            at += 1
            while at < size and word[at] & 0xC0 == 0x80:
                state = hashed(state, word[at])
                at += 1
            if n >= tables.shortest and not (n == 1 and (first == 0 or at == size)):
                row = row_of(np.int64(state % buckets), tables.bucket_rows, tables.present)
                if row >= 0:
                    found[count] = tables.n_words + row
                    count += 1
    return count


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
            count = ngrams(word, size + 2, tables, subwords, count, nothing, total)
    starts[tables.n_words] = count
