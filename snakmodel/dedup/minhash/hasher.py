"""Computes the band keys of texts, which decide which documents MinHash links; it reads and writes no files.

A document of at least `min_length` tokens gets one 128-bit key for each band of its signature, and documents that share
a key are linked. The signatures are text-dedup's own. Shorter documents have no signature and follow `short_docs`.

A key consists of two hashes of 61 bits, each spread over 64. A hash is the value, at a fixed point modulo 2⁶¹ - 1, of
the polynomial whose coefficients are a tag, which names the band, and the values of the band. Two different bands of r
values agree at no more than r of all points, so both hashes agree with a probability of at most (r / 2⁶¹)²: among the
1.4 thousand million keys of 350 million documents (2⁶⁰ pairs, r = 15), any two collide with probability 2⁻⁵⁴.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.dedup.minhash.parameters import RECORD, Bytes, Engine, Numbers, Parameters, Words

SLICE = 1 << 18
"""The bytes of text that are hashed at a time (or a single larger document), chosen so that what is computed from them
stays in the processor's cache."""


@functools.cache
def engine(parameters: Parameters) -> Engine:
    """The compiled kernel or, if Numba does not work here, text-dedup's own function, with a message on stderr."""
    try:
        from snakmodel.dedup.minhash.numba_engine import NumbaEngine

        compiled: Engine = NumbaEngine(parameters)
        data, offsets = np.frombuffer(b"a b c d ex", np.uint8), np.array([0, 9, 10])
        compiled.keys(data, offsets, *compiled.sign(data, offsets), 0)
    except Exception as error:  # whatever a broken Numba, LLVM or cache may raise
        from snakmodel.dedup.minhash.text_dedup_engine import ReferenceEngine

        explain(f"{type(error).__name__}: {error}".splitlines()[0])
        return ReferenceEngine(parameters)
    return compiled


@functools.cache
def explain(reason: str) -> None:
    """Print, only once, that the slow way is taken."""
    print(
        f"minhash: Numba does not work here ({reason}); signatures come from text-dedup's own function instead: "
        "the same, but 20 times slower",
        file=sys.stderr,
        flush=True,
    )


class BandHasher:
    """Computes signatures and band keys of documents.

    Threads and processes may share one, since it keeps no state between calls. The compiled kernel runs without the
    interpreter's lock and on one core; callers work on batches or shards in parallel.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.bands, self.rows = parameters.banding()

    def signatures(self, texts: Any) -> Words:
        """The signatures (n, num_perm) of an Arrow array of strings; all values are 2³² - 1 for short documents."""
        found = [signatures for _, _, _, _, signatures in self._signed(texts)]
        return np.concatenate([np.empty((0, self.parameters.num_perm), np.uint32), *found])

    def records(self, texts: Any, first_row: int) -> tuple[NDArray[np.void], Words]:
        """The records (k,) of dtype RECORD in the order of documents, and the rows (m,) of the short documents.

        `texts` is an Arrow array of `string` or `large_string` without nulls. Rows count up from `first_row`. With the
        policies `keep` and `drop`, short documents have no record. Raises UserError if a text is not valid UTF-8.
        """
        records, short = [np.empty(0, RECORD)], [np.empty(0, np.uint32)]
        for first, data, offsets, tokens, signatures in self._signed(texts, first_row):
            records.append(engine(self.parameters).keys(data, offsets, tokens, signatures, first_row + first))
            rows = np.flatnonzero(np.diff(tokens) < self.parameters.min_length) + first_row + first
            short.append(rows.astype(np.uint32))
        return np.concatenate(records), np.concatenate(short)

    def _signed(self, texts: Any, first_row: int = 0) -> Iterator[tuple[int, Bytes, Numbers, Numbers, Words]]:
        """Yield for each slice its first document, the data, its offsets, and what `Engine.sign` returns for it."""
        data, offsets = buffers(texts, first_row)
        first = 0
        while first < len(offsets) - 1:
            end = int(np.searchsorted(offsets, offsets[first] + SLICE, "right")) - 1
            part = offsets[first : max(first + 1, end) + 1]
            yield first, data, part, *engine(self.parameters).sign(data, part)
            first += len(part) - 1


def buffers(texts: Any, first_row: int) -> tuple[Bytes, Numbers]:
    """The bytes of an Arrow array of strings, and its offsets (n + 1,). Raises UserError on invalid UTF-8."""
    if texts.null_count:
        raise ValueError(f"{texts.null_count} of the texts are null")
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"the {len(texts)} documents from row {first_row} on are not all valid UTF-8 ({error}); "
            "write them again, with a policy for bytes that are not text"
        ) from error
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    if not len(texts):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, width, len(texts) + 1, texts.offset * np.dtype(width).itemsize)
    view = np.frombuffer(data or b"", np.uint8)
    view.setflags(write=False)
    return view, ends.astype(np.int64)
