"""MinHash without Numba: text-dedup's own function, one document at a time, with the same keys as the kernel."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.dedup.minhash.parameters import (
    KEY_POINTS,
    PRIME,
    RECORD,
    SHORT_TAGS,
    Bytes,
    Numbers,
    Parameters,
    Words,
    permutations,
)

INSTALL = "pip install --no-deps text-dedup==0.4.0 and pip install 'snakmodel-toolkit[text-dedup]'"
"""The commands to install text-dedup and what it imports; `make setup` does the same."""

Signature = Callable[[str], NDArray[np.uint64]]


def reference_0_4_0(parameters: Parameters) -> Signature:
    """The function text -> signature (num_perm,) of text-dedup 0.4.0, as installed.

    Raises UserError if text-dedup is missing or has another version.
    """
    reference = import_text_dedup()

    arguments = {
        "num_perm": parameters.num_perm,
        "ngram_size": parameters.ngram,
        "min_length": parameters.min_length,
        "hashranges": [(0, parameters.num_perm)],
        "permutations": permutations(parameters.compat, parameters.num_perm),
        "hash_func": {"sha1": reference.sha1_hash, "xxh3": reference.xxh3_32hash}[parameters.hash_func],
        "dtype": np.uint64,
        "max_hash": np.uint32((1 << 32) - 1),
        "modulo_prime": np.uint64(PRIME),
    }

    def signature(text: str) -> NDArray[np.uint64]:
        (whole,) = reference.embed_func(text, 0, **arguments)[reference.SIGNATURE_COLUMN]
        return np.frombuffer(whole, ">u8")

    return signature


def import_text_dedup() -> Any:
    """Import the module text_dedup.minhash of version 0.4.0. Raises UserError if it is missing or has another version.

    CAUTION: the import sets multiprocessing's start method to fork, and takes seconds.
    """
    need = "MinHash without Numba needs text-dedup 0.4.0"
    try:
        installed = importlib.metadata.version("text-dedup")
        if installed != "0.4.0":
            raise UserError(f"{need}, and version {installed} is installed. Type: {INSTALL}")
        from text_dedup import minhash
    except ImportError as error:  # also when the package itself is not found
        raise UserError(f"{need}, and {error.name or 'it'} is not installed. Type: {INSTALL}") from error
    return minhash


def formula_0_3_1(parameters: Parameters) -> Signature:
    """The function text -> signature (num_perm,), by the formula of text-dedup 0.3.1.

    That version cannot be installed beside 0.4.0.
    """
    multipliers, offsets = permutations(parameters.compat, parameters.num_perm)

    def signature(text: str) -> NDArray[np.uint64]:
        tokens = tokens_0_3_1(text)
        if len(tokens) < parameters.min_length:
            return np.full(len(multipliers), (1 << 32) - 1, np.uint64)
        width = min(parameters.ngram, len(tokens))
        grams = {" ".join(tokens[first : first + width]) for first in range(len(tokens) - width + 1)}
        hashes = [struct.unpack("<I", hashlib.sha1(gram.encode()).digest()[:4])[0] for gram in grams]
        values = (np.array(hashes, np.uint64)[:, None] * multipliers + offsets) % np.uint64(PRIME)
        return (values & np.uint64((1 << 32) - 1)).min(axis=0)  # type: ignore[no-any-return]

    return signature


def tokens_0_4_0(text: str) -> list[str]:
    return re.split(r"\W", text.lower())


def tokens_0_3_1(text: str) -> list[str]:
    return re.split("[^A-Za-z_0-9]", text)


class ReferenceEngine:
    """An `Engine` at the speed of Python."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        old = parameters.compat == "text-dedup-0.3.1"
        self._tokens = tokens_0_3_1 if old else tokens_0_4_0
        self._signature = (formula_0_3_1 if old else reference_0_4_0)(parameters)

    def sign(self, data: Bytes, offsets: Numbers) -> tuple[Numbers, Words]:
        """See `Engine`."""
        documents = [text.decode() for text in cut(data, offsets)]
        tokens = np.cumsum([0, *(len(self._tokens(text)) for text in documents)])
        signatures = np.empty((len(documents), self._parameters.num_perm), np.uint32)
        for place, text in enumerate(documents):
            signatures[place] = self._signature(text)
        return tokens, signatures

    def keys(self, data: Bytes, offsets: Numbers, tokens: Numbers, signatures: Words, first_row: int) -> NDArray[Any]:
        """See `Engine`."""
        bands, rows = self._parameters.banding()
        policy = self._parameters.short_docs
        found: list[tuple[int, int, int]] = []
        for place, text in enumerate(cut(data, offsets)):
            if tokens[place + 1] - tokens[place] >= self._parameters.min_length:
                parts = signatures[place, : bands * rows].reshape(bands, rows).tolist()
                found += [(*key(band, values), first_row + place) for band, values in enumerate(parts)]
            elif policy in SHORT_TAGS:
                words = words_of(text if policy == "exact" else b"")
                found.append((*key(SHORT_TAGS[policy], words), first_row + place))
        return np.array(found, RECORD)


def cut(data: Bytes, offsets: Numbers) -> list[bytes]:
    """The UTF-8 of each document."""
    return [data[begin:end].tobytes() for begin, end in itertools.pairwise(offsets.tolist())]


def words_of(text: bytes) -> list[int]:
    """A text as the kernel's `text_key` takes it.

    It consists of groups of four bytes (little-endian, filled up with zeros), and then the length.
    """
    filled = text.ljust(-(-len(text) // 4) * 4, b"\0")
    return [*np.frombuffer(filled, "<u4").tolist(), len(text)]


def key(tag: int, words: Sequence[int]) -> tuple[int, int]:
    """Both halves of the key of a band or a text."""
    high, low = (half_key(tag, words, point) for point in KEY_POINTS)
    return high, low


def half_key(tag: int, words: Sequence[int], point: int) -> int:
    """One half of the key of a band or a text.

    It is the value at `point`, modulo 2⁶¹ - 1, of the polynomial with the coefficients tag + 1, words …, spread over 64
    bits by SplitMix64's finaliser.
    """
    value = tag + 1
    for word in words:
        value = (value * point + word) % PRIME
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> shift) * factor % (1 << 64)
    return value ^ value >> 31
