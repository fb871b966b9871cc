"""Calls the functions of the compiled kernel in their order; see kernel.py for what each does."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.minhash.case_table import table
from snakmodel.dedup.minhash.kernel import SLACK, keys, minima, normalise
from snakmodel.dedup.minhash.parameters import (
    KEY_POINTS,
    RECORD,
    SHORT_TAGS,
    Bytes,
    Numbers,
    Parameters,
    Words,
    permutations,
)


class NumbaEngine:
    """An `Engine` that runs the compiled kernel. Raises RuntimeError if Numba is set not to compile."""

    def __init__(self, parameters: Parameters) -> None:
        if numba.config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        if parameters.hash_func == "sha1":
            from snakmodel.dedup.minhash.sha1 import sha1_grams as grams
        else:
            from snakmodel.dedup.minhash.xxh3 import xxh3_grams as grams
        self._grams = grams
        self._parameters = parameters
        self._table = table(lower=parameters.compat != "text-dedup-0.3.1")
        self._permutations = permutations(parameters.compat, parameters.num_perm)

    def sign(self, data: Bytes, offsets: Numbers) -> tuple[Numbers, Words]:
        """See `Engine`. Takes up to 14 bytes of memory per byte of text, of which about 4 are touched for prose."""
        documents, size = len(offsets) - 1, int(offsets[-1] - offsets[0])
        ngram, min_length = self._parameters.ngram, self._parameters.min_length
        text = np.empty(size * 3 // 2 + documents + SLACK, np.uint8)
        starts = np.empty(size + documents + 1, np.int64)
        tokens = np.empty(documents + 1, np.int64)
        normalise(data, offsets, self._table, text, starts, tokens)
        hashes = np.empty(tokens[-1], np.uint32)
        self._grams(text, starts, tokens, ngram, min_length, hashes)
        signatures = np.empty((documents, self._parameters.num_perm), np.uint32)
        minima(hashes, tokens, ngram, min_length, *self._permutations, signatures)
        return tokens, signatures

    def keys(self, data: Bytes, offsets: Numbers, tokens: Numbers, signatures: Words, first_row: int) -> NDArray[Any]:
        """See `Engine`."""
        bands, rows = self._parameters.banding()
        tag = SHORT_TAGS.get(self._parameters.short_docs, -1)
        short = int((np.diff(tokens) < self._parameters.min_length).sum())
        records = np.empty((len(signatures) - short) * bands + (short if tag >= 0 else 0), RECORD)
        keys(
            data,
            offsets,
            tokens,
            self._parameters.min_length,
            tag,
            self._parameters.short_docs == "exact",
            signatures,
            bands,
            rows,
            np.array(KEY_POINTS, np.uint64),
            first_row,
            records.view("<u4").reshape(-1, 5),
        )
        return records
