"""The arrays that define Megatron's order of training samples: sizes of documents -> doc_idx, sample_idx, shuffle_idx.

An `Order` holds everything that the arrays depend on besides the sizes. Time and memory grow with the number of
documents that are read; no loop runs over single tokens, and everything that counts tokens is int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 22
"""Number of documents whose sizes are summed at once."""


@dataclass(frozen=True)
class Order:
    """The order in which the documents [first, last) of a dataset are read."""

    first: int
    last: int
    epochs: int
    samples: int
    """Number of samples in all epochs; at least the number asked for."""
    together: int
    """Number of samples that the first shuffle covers.

    These are all samples, unless only a small part of the last epoch is needed; then the last epoch is shuffled
    separately.
    """
    seq_length: int
    seed: int

    @classmethod
    def of(cls, sizes: NDArray[np.int32], first: int, last: int, wanted: int, seq_length: int, seed: int) -> Order:
        """The order in which `wanted` samples are read. The documents must have more than seq_length tokens."""
        tokens = int(sizes[first:last].sum(dtype=np.int64))
        epochs = max(1, -(-(wanted * seq_length + 1) // tokens))
        samples = (epochs * tokens - 1) // seq_length
        before_last = ((epochs - 1) * tokens - 1) // seq_length
        apart = epochs > 1 and wanted - before_last < int(0.80 * ((tokens - 1) // seq_length))
        return cls(first, last, epochs, samples, before_last if apart else samples, seq_length, seed)

    @property
    def apart(self) -> bool:
        """Whether the samples of the last epoch are shuffled separately."""
        return self.together < self.samples

    def bytes(self) -> int:
        """Size of the three arrays in bytes."""
        number = 4 if shuffle_dtype(self.samples) == np.uint32 else 8
        return 4 * self.epochs * (self.last - self.first) + 16 * (self.samples + 1) + number * self.samples


class SampleIndex(NamedTuple):
    """The index: sample k covers the tokens from sample_idx[row] to sample_idx[row + 1], both included, row =
    shuffle_idx[k]."""

    doc_idx: NDArray[np.int32]
    """Document numbers in the order of reading, (epochs * documents,)."""
    sample_idx: NDArray[np.int64]
    """A position in doc_idx and an offset in that document, (samples + 1, 2)."""
    shuffle_idx: NDArray[np.uint32 | np.int64]
    """A permutation of the samples, (samples,)."""


class Routes(NamedTuple):
    """The route of each sample of a blend: its dataset and its number in that dataset."""

    dataset_index: NDArray[np.uint16]
    dataset_sample_index: NDArray[np.int64]


def build(sizes: NDArray[np.int32], order: Order) -> SampleIndex:
    """Build the three arrays; all shuffles are drawn from one RandomState, in the order of the code."""
    random = np.random.RandomState(order.seed)
    doc_idx = _shuffled_documents(order, random)
    sample_idx = _sample_starts(sizes, doc_idx, order.samples, order.seq_length)
    shuffle_idx: NDArray[Any] = np.arange(order.samples, dtype=shuffle_dtype(order.samples))
    random.shuffle(shuffle_idx[: order.together])
    if order.apart:
        random.shuffle(shuffle_idx[order.together :])
    return SampleIndex(doc_idx, sample_idx, shuffle_idx)


def shuffle_dtype(samples: int) -> type[np.uint32] | type[np.int64]:
    """The dtype of shuffle_idx: uint32 if it can hold the number of samples, else int64."""
    return np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64


def build_routes(weights: Sequence[float], samples: int) -> Routes:
    """Route each sample in turn to the dataset that is furthest behind its share; of equal ones, to the first.

    The weights are normalised once more, as upstream does, because the last bit of a weight decides between datasets
    that are almost equally far behind.
    """
    shares = np.array(weights, dtype=np.float64)
    routes = Routes(np.empty(samples, dtype=np.uint16), np.empty(samples, dtype=np.int64))
    _compiled_route()(shares / np.sum(shares), *routes)
    return routes


def _shuffled_documents(order: Order, random: np.random.RandomState) -> NDArray[np.int32]:
    documents = np.arange(order.first, order.last, dtype=np.int32)
    doc_idx = np.tile(documents, order.epochs) if order.epochs > 1 else documents
    whole = (order.epochs - order.apart) * len(documents)
    random.shuffle(doc_idx[:whole])
    if order.apart:
        random.shuffle(doc_idx[whole:])
    return doc_idx


def _sample_starts(
    sizes: NDArray[np.int32], doc_idx: NDArray[np.int32], samples: int, seq_length: int
) -> NDArray[np.int64]:
    """Build sample_idx: sample k starts at token k * seq_length of the documents laid end to end. Works block by block.

    The first entry is (0, 0) even where documents without a token come first.
    """
    sample_idx = np.empty((samples + 1, 2), dtype=np.int64)
    tokens = done = 0
    for first in range(0, len(doc_idx), BLOCK):
        lengths = sizes[doc_idx[first : first + BLOCK]]
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        tokens = int(ends[-1])
        here = slice(done, min(samples, (tokens - 1) // seq_length) + 1)
        starts = np.arange(here.start, here.stop, dtype=np.int64) * seq_length
        positions = np.searchsorted(ends, starts, side="right")
        sample_idx[here, 0] = first + positions
        sample_idx[here, 1] = starts - ends[positions] + lengths[positions]
        done = here.stop
    sample_idx[0] = 0
    return sample_idx


@cache
def _compiled_route() -> Callable[..., None]:
    import numba  # takes a second with the compilation; only blends without an index need it

    return cast(Callable[..., None], numba.njit(nogil=True)(_route))


def _route(weights: Any, dataset_index: Any, dataset_sample_index: Any) -> None:
    """Fill the two arrays of the routes."""
    taken = np.zeros(len(weights), dtype=np.int64)
    for sample in range(len(dataset_index)):
        scale = max(float(sample), 1.0)
        most, source = weights[0] * scale - taken[0], 0
        for dataset in range(1, len(weights)):
            behind = weights[dataset] * scale - taken[dataset]
            if behind > most:
                most, source = behind, dataset
        dataset_index[sample], dataset_sample_index[sample] = source, taken[source]
        taken[source] += 1
