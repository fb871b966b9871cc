"""Text -> band keys: which documents MinHash links, no I/O.

A document of `min_length` or more tokens gets one 128-bit key for each band of its signature; documents that share a
key are linked. The signatures are text-dedup's own. Shorter documents, which have none, follow `short_docs`.

A key is two hashes of 61 bits, each spread over 64. A hash is the polynomial whose coefficients are a tag, which names
the band, and the values of the band, taken at a fixed point modulo 2⁶¹ - 1. Two different bands of r values agree at no
more than r of all points, so both hashes agree with probability (r / 2⁶¹)² at most: among the 1.4 thousand million keys
of 350 million documents (2⁶⁰ pairs, r = 15) any two collide with probability 2⁻⁵⁴.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from snakmodel.publish import UserError

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Longs = NDArray[np.uint64]
Numbers = NDArray[np.int64]

RECORD = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("row", "<u4")])
"""A 128-bit key in two halves, and the row within the shard of the document that has it."""
SHORT_POLICIES = ("exact", "keep", "drop", "collapse")
COMPATIBILITIES = ("text-dedup-0.4.0", "text-dedup-0.3.1")
HASH_FUNCTIONS = ("sha1", "xxh3")
PRIME = (1 << 61) - 1
SHORT_TAGS = {"exact": 1 << 32, "collapse": (1 << 32) + 1}
"""Tags of the keys of short documents; the band's number is the tag of a band."""
KEY_POINTS = (0x043F6A8885A308D3, 0x13198A2E03707344)
"""Where the polynomials of the two halves of a key are taken: the first bits of pi after the point, modulo 2⁶¹."""
SLICE = 1 << 18
"""Bytes of text hashed at a time (or one document), so that what is made of them stays in the processor's cache."""


@dataclass(frozen=True)
class Parameters:
    """What decides which documents are linked. Raises UserError on values without a meaning."""

    num_perm: int = 64
    threshold: float = 0.85
    ngram: int = 5
    min_length: int = 5
    short_docs: str = "exact"
    """exact: link identical texts; keep: link none; drop: remove them all; collapse: link them all."""
    compat: str = COMPATIBILITIES[0]
    """text-dedup-0.3.1 splits at [^A-Za-z_0-9], does not lower-case, and permutes otherwise."""
    hash_func: str = "sha1"
    b: int | None = None
    r: int | None = None
    """Bands and rows a band; without them text-dedup's optimum for the threshold."""

    def __post_init__(self) -> None:
        for name, lowest in (("num_perm", 1), ("ngram", 1), ("min_length", 0), ("b", 1), ("r", 1)):
            if (value := getattr(self, name)) is not None and value < lowest:
                raise UserError(f"{name} = {value}: must be {lowest} or more")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold = {self.threshold}: must lie above 0 and be at most 1")
        valid = {"short_docs": SHORT_POLICIES, "compat": COMPATIBILITIES, "hash_func": HASH_FUNCTIONS}
        for name, values in valid.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(values)}")
        if self.compat == "text-dedup-0.3.1" and self.hash_func != "sha1":
            raise UserError(f"hash_func = {self.hash_func!r}: text-dedup 0.3.1 has sha1 only")
        if (self.b is None) != (self.r is None):
            raise UserError(f"b = {self.b}, r = {self.r}: give both, or neither for the optimum of the threshold")
        if self.b is not None and self.r is not None and self.b * self.r > self.num_perm:
            raise UserError(
                f"b = {self.b}, r = {self.r}: b * r = {self.b * self.r} must be at most num_perm = {self.num_perm}"
            )

    def banding(self) -> tuple[int, int]:
        """Bands, and rows a band."""
        return optimal_bands(self.threshold, self.num_perm) if self.b is None or self.r is None else (self.b, self.r)

    def described(self) -> dict[str, Any]:
        """The parameters, with `b` and `r` as they come out."""
        bands, rows = self.banding()
        return {**asdict(self), "b": bands, "r": rows}

    def fingerprint(self) -> str:
        """A digest that differs when any parameter differs."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def optimal_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """The bands and rows with the least expected error, false links and missed ones weighing the same.

    Documents of similarity s share a band with probability 1 - (1 - sʳ)ᵇ (datasketch, as text-dedup takes it over).
    """
    from scipy.integrate import quad  # type: ignore[import-untyped]  # takes half a second

    def error(banding: tuple[int, int]) -> float:
        bands, rows = map(float, banding)
        wrong = quad(lambda s: 1 - (1 - s**rows) ** bands, 0.0, threshold)[0]
        missed = quad(lambda s: 1 - (1 - (1 - s**rows) ** bands), threshold, 1.0)[0]
        return float(wrong * 0.5 + missed * 0.5)

    bandings = ((b, r) for b in range(1, num_perm + 1) for r in range(1, num_perm // b + 1))
    return min(bandings, key=error)


def permutations(compat: str, num_perm: int) -> tuple[Longs, Longs]:
    """Multipliers in [1, 2⁶¹ - 1) and offsets in [0, 2⁶¹ - 1), (num_perm,) each, as that version draws them."""
    random = np.random.RandomState(42)
    limits = ((1, PRIME), (0, PRIME))
    if compat == "text-dedup-0.3.1":
        pairs = [[random.randint(*limit, dtype=np.uint64) for limit in limits] for _ in range(num_perm)]
        multipliers, offsets = np.array(pairs, np.uint64).T.copy()
    else:
        multipliers, offsets = (random.randint(*limit, size=num_perm, dtype=np.uint64) for limit in limits)
    return multipliers, offsets


class Engine(Protocol):
    """What hashes a slice of n documents: `data` is UTF-8, and document i is data[offsets[i] : offsets[i + 1]]."""

    def sign(self, data: Bytes, offsets: Numbers) -> tuple[Numbers, Words]:
        """The number of tokens before each document and in all, (n + 1,), and the signatures (n, num_perm)."""

    def keys(self, data: Bytes, offsets: Numbers, tokens: Numbers, signatures: Words, first_row: int) -> NDArray[Any]:
        """Records of the documents in order: one a band, or one of the text of a short one where it has one."""


@functools.cache
def engine(parameters: Parameters) -> Engine:
    """The compiled kernel, or, with a word on stderr, text-dedup's own function if Numba does not work here."""
    try:
        from snakmodel.minhash_engine import NumbaEngine

        compiled: Engine = NumbaEngine(parameters)
        data, offsets = np.frombuffer(b"a b c d ex", np.uint8), np.array([0, 9, 10])
        compiled.keys(data, offsets, *compiled.sign(data, offsets), 0)
    except Exception as error:  # whatever a broken Numba, LLVM or cache may raise
        from snakmodel.minhash_fallback import ReferenceEngine

        explain(f"{type(error).__name__}: {error}".splitlines()[0])
        return ReferenceEngine(parameters)
    return compiled


@functools.cache
def explain(reason: str) -> None:
    """Say once that the slow way is taken."""
    print(
        f"minhash: Numba does not work here ({reason}); signatures come from text-dedup's own function instead: "
        "the same, but 20 times slower",
        file=sys.stderr,
        flush=True,
    )


class BandHasher:
    """Signatures and band keys of documents. Threads and processes may share one: it keeps no state between calls.

    The compiled kernel runs without the interpreter's lock, on one core: callers parallelise over batches or shards.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.bands, self.rows = parameters.banding()

    def signatures(self, texts: Any) -> Words:
        """The signatures (n, num_perm) of an Arrow array of strings; 2³² - 1 throughout for short documents."""
        found = [signatures for _, _, _, _, signatures in self._signed(texts)]
        return np.concatenate([np.empty((0, self.parameters.num_perm), np.uint32), *found])

    def records(self, texts: Any, first_row: int) -> tuple[NDArray[np.void], Words]:
        """Records (k,) of dtype RECORD in document order, and the rows (m,) of the short documents.

        texts: an Arrow array of `string` or `large_string` without nulls. Rows count up from `first_row`. Under `keep`
        and `drop` short documents have no record. Raises UserError if a text is not valid UTF-8.
        """
        records, short = [np.empty(0, RECORD)], [np.empty(0, np.uint32)]
        for first, data, offsets, tokens, signatures in self._signed(texts, first_row):
            records.append(engine(self.parameters).keys(data, offsets, tokens, signatures, first_row + first))
            rows = np.flatnonzero(np.diff(tokens) < self.parameters.min_length) + first_row + first
            short.append(rows.astype(np.uint32))
        return np.concatenate(records), np.concatenate(short)

    def _signed(self, texts: Any, first_row: int = 0) -> Iterator[tuple[int, Bytes, Numbers, Numbers, Words]]:
        """For each slice its first document, the data, its offsets, and what `Engine.sign` makes of them."""
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
