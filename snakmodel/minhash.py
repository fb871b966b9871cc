"""Text -> band keys: the MinHash kernel, no I/O.

A document of `min_length` or more tokens gets one 128-bit key for each band of its signature; documents that share a
key are linked. The signatures are text-dedup 0.4.0's own. Shorter documents, which have none, follow `short_docs`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from snakmodel.publish import UserError

COMPATIBILITY = "text-dedup-0.4.0"
RECORD = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("row", "<u4")])
"""A 128-bit key in two halves, and the row within the shard of the document that has it."""
SHORT_POLICIES = ("exact", "keep", "drop", "collapse")
SEED_EXACT = 1 << 32
SEED_COLLAPSE = SEED_EXACT + 1
"""Seeds of the digests of short documents; the band's number seeds the digest of a band."""


@dataclass(frozen=True)
class Parameters:
    """What decides which documents are linked. Raises UserError on values without a meaning."""

    num_perm: int = 64
    threshold: float = 0.85
    ngram: int = 5
    min_length: int = 5
    short_docs: str = "exact"
    """exact: link identical texts; keep: link none; drop: remove them all; collapse: link them all."""

    def __post_init__(self) -> None:
        for name, lowest in (("num_perm", 1), ("ngram", 1), ("min_length", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} = {getattr(self, name)}: must be {lowest} or more")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold = {self.threshold}: must lie above 0 and be at most 1")
        if self.short_docs not in SHORT_POLICIES:
            raise UserError(f"short_docs = {self.short_docs!r}: must be one of {', '.join(SHORT_POLICIES)}")

    def described(self) -> dict[str, Any]:
        """The parameters with the compatibility they are for."""
        return {"compatibility": COMPATIBILITY, **asdict(self)}

    def fingerprint(self) -> str:
        """A digest that differs when any parameter differs."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:32]


class BandHasher:
    """Band keys of documents; `bands` and `rows` are text-dedup's optimum for the threshold."""

    def __init__(self, parameters: Parameters) -> None:
        installed = importlib.metadata.version("text-dedup")
        if f"text-dedup-{installed}" != COMPATIBILITY:
            raise UserError(
                f"text-dedup {installed} is installed; this needs {COMPATIBILITY}: pip install text-dedup==0.4.0"
            )
        # CAUTION: importing this sets multiprocessing's start method to fork, and takes seconds.
        from text_dedup import minhash as reference

        self.parameters = parameters
        self.bands, self.rows = reference.optimal_param(parameters.threshold, parameters.num_perm, 0.5, 0.5)
        self._split = reference.NON_ALPHA.split
        self._embed = reference.embed_func
        self._column = reference.SIGNATURE_COLUMN
        prime = np.uint64((1 << 61) - 1)
        random = np.random.RandomState(42)
        multipliers = random.randint(1, prime, size=(parameters.num_perm,), dtype=np.uint64)
        offsets = random.randint(0, prime, size=(parameters.num_perm,), dtype=np.uint64)
        self._arguments = {
            "num_perm": parameters.num_perm,
            "ngram_size": parameters.ngram,
            "min_length": parameters.min_length,
            "hashranges": [(band * self.rows, (band + 1) * self.rows) for band in range(self.bands)],
            "permutations": (multipliers, offsets),
            "hash_func": reference.sha1_hash,
            "dtype": np.uint64,
            "max_hash": np.uint32((1 << 32) - 1),
            "modulo_prime": prime,
        }

    def is_short(self, text: str) -> bool:
        """Whether the document has fewer than `min_length` tokens (empty ones count)."""
        return len(self._split(text.lower())) < self.parameters.min_length

    def bands_of(self, text: str) -> list[bytes]:
        """The signature of a document that is not short, cut into bands of `rows` big-endian uint64."""
        return self._embed(text, 0, **self._arguments)[self._column]  # type: ignore[no-any-return]

    def records(self, texts: Iterable[str], first_row: int) -> tuple[NDArray[np.void], NDArray[np.uint32]]:
        """Records (k,) of dtype RECORD in document order, and the rows (m,) of the short documents.

        Rows count up from `first_row`. Under `keep` and `drop` short documents have no record.
        """
        digests: list[bytes] = []
        rows: list[int] = []
        short: list[int] = []
        for row, text in enumerate(texts, first_row):
            if is_short := self.is_short(text):
                short.append(row)
            keys = list(self._short_keys(text) if is_short else self._band_keys(text))
            digests += keys
            rows += [row] * len(keys)
        records = np.empty(len(rows), RECORD)
        halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
        records["hi"], records["lo"], records["row"] = halves[:, 0], halves[:, 1], rows
        return records, np.array(short, np.uint32)

    def _band_keys(self, text: str) -> Iterator[bytes]:
        for band, signature in enumerate(self.bands_of(text)):
            yield xxhash.xxh3_128_digest(signature, seed=band)

    def _short_keys(self, text: str) -> Iterator[bytes]:
        if self.parameters.short_docs == "exact":
            yield xxhash.xxh3_128_digest(text.encode(), seed=SEED_EXACT)
        elif self.parameters.short_docs == "collapse":
            yield xxhash.xxh3_128_digest(b"", seed=SEED_COLLAPSE)
