"""The second pass over buckets: documents that share a key are linked only if they are similar enough.

Similarity is the Jaccard index of the documents' sets of n-grams, which are cut from the same tokens as the
signature's. The final result equals the connected components of all pairs of a bucket that reach the threshold, without
comparing all pairs; see similar.py. The counts are therefore of links and not of comparisons: without the texts, n - 1
links would connect a bucket of n documents, and some of them are kept.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.dedup.signature_file import Numbers
from snakmodel.dedup.similar import similar_pairs
from snakmodel.shards.arrow_stream import Rows, columns

_NO_WORD = {"text-dedup-0.4.0": re.compile(r"\W"), "text-dedup-0.3.1": re.compile(r"[^A-Za-z_0-9]")}


class Texts:
    """The documents by their numbers; they are read from disk when they are asked for."""

    def __init__(self, bases: Sequence[int], shards: Sequence[Rows], column: str) -> None:
        self.bases = bases
        self.shards = shards
        self.column = column
        self._opened: dict[int, tuple[list[int], list[Any]]] = {}

    def __getitem__(self, number: int) -> str:
        shard = bisect_right(self.bases, number) - 1
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)
        firsts, values = self._opened[shard]
        row = number - self.bases[shard]
        batch = bisect_right(firsts, row) - 1
        return str(values[batch][row - firsts[batch]].as_py())

    def _open(self, shard: int) -> tuple[list[int], list[Any]]:
        """The first row of each batch of a shard, and the batches, which are mapped into memory."""
        values = list(columns(self.shards[shard], self.column))
        firsts = np.cumsum([0, *map(len, values)]).tolist()
        documents = self.bases[shard + 1] - self.bases[shard]
        if firsts[-1] != documents:
            raise UserError(
                f"{self.shards[shard].path} has {firsts[-1]} documents, its signatures are of {documents}: "
                "give the texts that the signatures were made from"
            )
        return firsts, values


class Verifier:
    """Compares the documents of buckets. `parameters` are those in the header of a signature file."""

    def __init__(self, texts: Texts, parameters: Mapping[str, Any]) -> None:
        self.texts = texts
        self.threshold = float(parameters["threshold"])
        self.ngram = int(parameters["ngram"])
        self.min_length = int(parameters["min_length"])
        self.compat = str(parameters["compat"])
        self.counts = {"checked": 0, "kept": 0, "rejected": 0}

    def links(self, documents: Numbers) -> list[tuple[int, int]]:
        """The fewest links that connect the similar documents of one bucket, whose numbers have to be ascending.

        Short documents have no signature. They share a key only because of `short_docs`, and are linked without a
        comparison.
        """
        numbers = documents.tolist()
        first = self.tokens(self.texts[numbers[0]])
        if len(first) < self.min_length:
            return [(number, numbers[0]) for number in numbers[1:]]
        found: list[tuple[int, int]] = []
        distinct: list[tuple[int, NDArray[np.uint64]]] = []
        by_text: dict[bytes, int] = {}
        by_grams: dict[bytes, int] = {}
        for number in numbers:
            text = self.texts[number]
            same = by_text.setdefault(xxhash.xxh3_128_digest(text.encode()), number)
            if same == number:
                grams = self.grams(text)
                same = by_grams.setdefault(xxhash.xxh3_128_digest(grams.tobytes()), number)
                if same == number:
                    distinct.append((number, grams))
                    continue
            found.append((number, same))
        distinct.sort(key=lambda one: (len(one[1]), one[0]))
        pairs = similar_pairs([grams for _, grams in distinct], self.threshold)
        found += [(distinct[new][0], distinct[other][0]) for new, other in pairs]
        self.counts["checked"] += len(numbers) - 1
        self.counts["kept"] += len(found)
        self.counts["rejected"] += len(numbers) - 1 - len(found)
        return found

    def tokens(self, text: str) -> list[str]:
        """The words from which the signature is made."""
        return _NO_WORD[self.compat].split(text.lower() if self.compat == "text-dedup-0.4.0" else text)

    def grams(self, text: str) -> NDArray[np.uint64]:
        """The set of n-grams, as their xxh3-64 in ascending order."""
        words = self.tokens(text)
        count = max(1, len(words) - self.ngram + 1)
        grams = {" ".join(words[first : first + self.ngram]) for first in range(count)}
        return np.sort(np.fromiter((xxhash.xxh3_64_intdigest(gram.encode()) for gram in grams), np.uint64, len(grams)))
