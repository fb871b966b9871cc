"""Encodes a block of documents to token ids and sizes, with the fast encoder where it may be used.

Everything else is encoded by the tokenizer's own library.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_llm.data.document_blocks import offsets
from megatron_llm.tokenizer import agreement_file
from megatron_llm.tokenizer.agreement_file import Agreement
from megatron_llm.tokenizer.base import LONG, Tokenizer
from megatron_llm.tokenizer.gigatoken import Differs, Fast, Unfit
from run_contract.errors import UserError

BACKENDS = ("auto", "gigatoken", "sentencepiece")
SMALL = 4 << 20
"""Bytes of text per thread above which gigatoken saves more time than it takes to load."""
SAMPLE_FIRST, SAMPLE_REST = 16, 1024
"""One document in this number is also encoded by the tokenizer's own library: in the first block, in other blocks."""
SAMPLE_CHARACTERS = 4096
"""Number of characters that are compared of each of these documents."""
FEW = 16
"""Texts are merged piece by piece where fewer than one in this number belongs to the smaller set."""
MEMORY_A_CHARACTER = {"sentencepiece": 50, "tokenizers": 136}
"""Bytes of memory per character that the tokenizer's own library takes to encode a text in one piece."""

Ids = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of all texts, back to back, and the number of ids of each text."""


@dataclass(frozen=True)
class Encoder:
    """The encoder of texts to ids. If `fast` is None, the tokenizer's own library encodes everything."""

    tokenizer: Tokenizer
    fast: Fast | None
    why_not_fast: str
    """The reason why `fast` is None; empty if it is present or was not wanted."""
    mismatches: int = 0
    """Number of sampled documents for which `fast` had given different ids before it was given up."""

    def encode(self, texts: Any, *, first: bool) -> tuple[Ids, NDArray[np.bool_]]:
        """The ids of a large_string array (n,), and which of its texts the tokenizer's own library encoded, (n,) bool.

        Raises Differs when the two libraries disagree on a sample; with `first` the larger sample is taken.
        """
        if self.fast is None:
            return self.encode_slowly(texts), np.ones(len(texts), dtype=np.bool_)
        slowly = self.fast.refuses(texts)
        every = SAMPLE_FIRST if first else SAMPLE_REST
        if not slowly.any():
            return self.encode_fast(texts, self.fast, every), slowly
        quick = self.encode_fast(texts.filter(pa.array(~slowly)), self.fast, every)
        return interleaved(quick, self.encode_slowly(texts.filter(pa.array(slowly))), slowly), slowly

    def encode_fast(self, texts: Any, fast: Fast, every: int) -> Ids:
        """Encode by gigatoken, and also the beginnings of one text in `every`, whose ids are checked."""
        sampled = sample(texts, every)
        fast.check(sampled.to_pylist(), *self.encode_parts(sampled, fast))
        return self.encode_parts(texts, fast)

    def encode_slowly(self, texts: Any) -> Ids:
        """Encode by the tokenizer's own library."""
        if self.tokenizer.extra:
            return flattened([self.tokenizer.encode(text) for text in texts.to_pylist()])
        return self.encode_parts(texts, lambda parts: flattened(self.tokenizer.encode_plain(parts.to_pylist())))

    def encode_parts(self, texts: Any, encode: Any) -> Ids:
        """Encode texts; long texts are encoded in parts."""
        parts, counts = self.parts(texts)
        ids, sizes = encode(parts)
        return (ids, sizes) if counts is None else (ids, np.add.reduceat(sizes, np.cumsum(counts) - counts))

    def parts(self, texts: Any) -> tuple[Any, NDArray[np.int64] | None]:
        """The parts of all texts, and the number of parts of each text (n,); None when no text is long."""
        long = np.flatnonzero(np.diff(offsets(texts)) > LONG)
        if not len(long):
            return texts, None
        pieces, counts, start = [], np.ones(len(texts), dtype=np.int64), 0
        for row in long.tolist():
            cut = self.tokenizer.cut(texts[row].as_py())
            self.forecast(max(map(len, cut)))
            pieces += [texts.slice(start, row - start), pa.array(cut, pa.large_string())]
            counts[row], start = len(cut), row + 1
        return pa.concat_arrays([*pieces, texts.slice(start)]), counts

    def forecast(self, characters: int) -> None:
        """Print how much memory a text that could not be cut will need."""
        if characters > 2 * LONG:
            why = self.tokenizer.uncut or "it has no space to cut at"
            print(
                f"A document has {characters / 1e6:.1f} million characters in one piece ({why}): encoding it takes "
                f"about {characters * MEMORY_A_CHARACTER[self.tokenizer.reference] / 1e9:.2f} GB of memory.",
                file=sys.stderr,
                flush=True,
            )


def open_encoder(tokenizer: Tokenizer, backend: str, size: int) -> Encoder:
    """The encoder of --tokenizer_backend for `size` bytes of text per thread.

    Raises UserError when gigatoken is demanded but unfit.
    """
    if backend == "sentencepiece":
        return Encoder(tokenizer, None, "")
    if backend == "auto" and size < SMALL:
        return Encoder(tokenizer, None, "")
    try:
        return Encoder(tokenizer, open_fast(tokenizer), "")
    except Unfit as why:
        if backend == "auto":
            return Encoder(tokenizer, None, str(why))
        raise UserError(
            f"--tokenizer_backend gigatoken: gigatoken cannot stand in for {tokenizer.reference} here: {why}; "
            "leave the flag out"
        ) from why


def open_fast(tokenizer: Tokenizer) -> Fast:
    """The fast encoder, restricted to the characters for which it may be used. Raises Unfit."""
    name = agreement_file.file_name(tokenizer)
    if (agreement := agreement_file.read(name)) and agreement.why_not:
        raise Unfit(agreement.why_not)
    fast = Fast(tokenizer)
    if agreement is None:
        agreement = compare(fast)
        agreement_file.keep(name, agreement)
        if agreement.why_not:
            raise Unfit(agreement.why_not)
    fast.characters = agreement.characters()
    return fast


def compare(fast: Fast) -> Agreement:
    """Find by trial what the two libraries agree on.

    Raises Unfit if gigatoken fails, which may be a failure that passes.
    """
    from megatron_llm.tokenizer.agreement import establish

    try:
        return Agreement.on(establish(fast))
    except Differs as why:
        return Agreement(why_not=str(why))


def sample(texts: Any, every: int) -> Any:
    """The beginnings of one text in `every`, as a large_string array."""
    return pc.utf8_slice_codeunits(texts.take(pa.array(np.arange(0, len(texts), every))), 0, SAMPLE_CHARACTERS)


def flattened(documents: list[list[int]]) -> Ids:
    """Convert lists of ids to two arrays."""
    sizes = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return np.fromiter(chain.from_iterable(documents), dtype=np.uint32, count=int(sizes.sum())), sizes


def interleaved(a: Ids, b: Ids, is_b: NDArray[np.bool_]) -> Ids:
    """Merge the ids of two sets of texts into one order: the next text is b's where is_b (n,), else a's."""
    sizes = np.empty(len(is_b), dtype=np.int64)
    sizes[~is_b], sizes[is_b] = a[1], b[1]
    rows = np.flatnonzero(is_b)
    if 0 < len(rows) * FEW < len(is_b):  # copied in long pieces
        places = np.concatenate(([0], np.cumsum(a[1])))[rows - np.arange(len(rows))]
        own = np.split(b[0], np.cumsum(b[1])[:-1])
        rest = np.split(a[0], places)
        pieces = [piece for pair in zip(rest, own, strict=False) for piece in pair]
        return np.concatenate([*pieces, rest[-1]]), sizes
    from_b = np.repeat(is_b, sizes)
    ids = np.empty(len(from_b), dtype=np.uint32)
    ids[~from_b], ids[from_b] = a[0], b[0]
    return ids, sizes
