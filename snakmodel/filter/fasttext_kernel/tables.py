"""A model as the kernel needs it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers, Words

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]


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
