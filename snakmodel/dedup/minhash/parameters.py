"""The parameters that decide which documents MinHash links, and the interface of an engine."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import UserError

Bytes = NDArray[np.uint8]


Words = NDArray[np.uint32]


Longs = NDArray[np.uint64]


Numbers = NDArray[np.int64]


RECORD = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("row", "<u4")])
"""A 128-bit key in two halves, and the row, within the shard, of the document that has the key."""


SHORT_POLICIES = ("exact", "keep", "drop", "collapse")


COMPATIBILITIES = ("text-dedup-0.4.0", "text-dedup-0.3.1")


HASH_FUNCTIONS = ("sha1", "xxh3")


PRIME = (1 << 61) - 1


SHORT_TAGS = {"exact": 1 << 32, "collapse": (1 << 32) + 1}
"""Tags of the keys of short documents. The tag of a band is the band's number."""


KEY_POINTS = (0x043F6A8885A308D3, 0x13198A2E03707344)
"""The points at which the polynomials of the two halves of a key are evaluated: the first bits of pi after the point,
modulo 2⁶¹."""


@dataclass(frozen=True)
class Parameters:
    """The parameters that decide which documents are linked. Raises UserError on values that make no sense."""

    num_perm: int = 64
    threshold: float = 0.85
    ngram: int = 5
    min_length: int = 5
    short_docs: str = "exact"
    """exact: link identical texts; keep: link none; drop: remove them all; collapse: link them all."""
    compat: str = COMPATIBILITIES[0]
    """The version of text-dedup. 0.3.1 splits at [^A-Za-z_0-9], does not lower-case, and has different permutations."""
    hash_func: str = "sha1"
    b: int | None = None
    r: int | None = None
    """The number of bands, and of rows per band; without them, text-dedup's optimum for the threshold is taken."""

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
        """The number of bands, and the number of rows per band."""
        return optimal_bands(self.threshold, self.num_perm) if self.b is None or self.r is None else (self.b, self.r)

    def described(self) -> dict[str, Any]:
        """The parameters, with `b` and `r` as they are actually used."""
        bands, rows = self.banding()
        return {**asdict(self), "b": bands, "r": rows}

    def fingerprint(self) -> str:
        """A digest that differs when any parameter differs."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def optimal_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """The numbers of bands and rows with the least expected error, where false links and missed ones weigh the same.

    Documents of similarity s share a band with probability 1 - (1 - sʳ)ᵇ (from datasketch, as adopted by text-dedup).
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
    """Multipliers in [1, 2⁶¹ - 1) and offsets in [0, 2⁶¹ - 1), (num_perm,) each.

    They are drawn as the version of text-dedup that `compat` names draws them.
    """
    random = np.random.RandomState(42)
    limits = ((1, PRIME), (0, PRIME))
    if compat == "text-dedup-0.3.1":
        pairs = [[random.randint(*limit, dtype=np.uint64) for limit in limits] for _ in range(num_perm)]
        multipliers, offsets = np.array(pairs, np.uint64).T.copy()
    else:
        multipliers, offsets = (random.randint(*limit, size=num_perm, dtype=np.uint64) for limit in limits)
    return multipliers, offsets


class Engine(Protocol):
    """The interface for hashing a slice of n documents.

    `data` is UTF-8, and document i is data[offsets[i] : offsets[i + 1]].
    """

    def sign(self, data: Bytes, offsets: Numbers) -> tuple[Numbers, Words]:
        """The number of tokens before each document and in all, (n + 1,), and the signatures (n, num_perm)."""

    def keys(self, data: Bytes, offsets: Numbers, tokens: Numbers, signatures: Words, first_row: int) -> NDArray[Any]:
        """The records of the documents in order: one per band, or for a short document one of its text, if any."""
