"""Training samples in Megatron's exact order: prefixes -> split -> documents shuffled -> samples shuffled -> tokens.

`build` gives three map-style datasets (train, valid, test). Sample k depends only on the data, the split, the seed, the
sequence length and the number of samples asked for: not on the number of ranks, and not on what was consumed before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_llm.files import UserError
from megatron_llm.indexed_dataset import IndexedDataset

SPLITS = ("train", "valid", "test")


class Samples(Protocol):
    """What training reads: `samples[k]` are the seq_length + 1 int64 tokens of global sample k."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> NDArray[np.int64]: ...


Datasets = tuple[Samples | None, Samples | None, Samples | None]
"""Train, valid, test; None for a split of which no samples were asked."""


def build(data_path: Sequence[str], split: str, seed: int, seq_length: int, samples: tuple[int, int, int]) -> Datasets:
    """Datasets that hold at least `samples` samples for train, valid and test.

    data_path is one prefix or `weight prefix weight prefix …`; split is proportions of documents, `969,30,1`.
    Raises UserError for a wrong data_path or split, or a split whose documents do not fill one sample.
    """
    weights, prefixes = parse_data_path(data_path)
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    built = [_build_split(parts, weights, index, split, seed, seq_length, samples[index]) for index in range(3)]
    return built[0], built[1], built[2]


def data_fingerprint(data_path: Sequence[str]) -> str:
    """Names the data of a run without reading the tokens: weights and the .idx headers and sizes, in order."""
    weights, prefixes = parse_data_path(data_path)
    parts = [
        f"{weight!r} {IndexedDataset(prefix).fingerprint()}" for weight, prefix in zip(weights, prefixes, strict=True)
    ]
    return xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()


def parse_data_path(data_path: Sequence[str]) -> tuple[list[float], list[Path]]:
    """Weights (normalised) and prefixes of --data_path."""
    if len(data_path) == 1:
        return [1.0], [Path(data_path[0])]
    try:
        weights = [float(weight) for weight in data_path[0::2]]
    except ValueError:
        weights = []
    if len(data_path) % 2 or not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"--data_path {' '.join(data_path)}: give one prefix, or pairs `weight prefix weight prefix …` "
            "in which every weight is a number above 0"
        )
    total = reduce(add, weights)  # sum() rounds differently from Python 3.12 on, and the order of samples hangs on it
    return [weight / total for weight in weights], [Path(prefix) for prefix in data_path[1::2]]


def split_boundaries(split: str, documents: int) -> list[int]:
    """The four document numbers that bound train, valid and test, from proportions such as `969,30,1` or `9/1`."""
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"--split {split}: give one to three proportions of the documents, such as 969,30,1")
    total = sum(shares)
    boundaries = [0]
    for share in [*shares, 0.0, 0.0][:3]:
        boundaries.append(boundaries[-1] + round(share / total * documents))
    overshoot = boundaries[-1] - documents
    return [0, *(max(0, boundary - overshoot) for boundary in boundaries[1:])]


def _build_split(
    parts: list[IndexedDataset], weights: list[float], index: int, split: str, seed: int, seq_length: int, samples: int
) -> Samples | None:
    """One of train (0), valid (1), test (2): a GPTDataset, or a Blend of several."""
    if samples == 0:
        return None
    datasets = []
    for part, weight in zip(parts, weights, strict=True):
        first, last = split_boundaries(split, len(part))[index : index + 2]
        _check_tokens(part, first, last, f"--split {split} gives {SPLITS[index]}", seq_length)
        wanted = samples if len(parts) == 1 else int(np.ceil(samples * weight * 1.005))
        datasets.append(GPTDataset(part, first, last, wanted, seq_length, seed))
    return datasets[0] if len(datasets) == 1 else Blend(datasets, weights)


def _check_tokens(part: IndexedDataset, first: int, last: int, what: str, seq_length: int) -> None:
    """One pass over the split's documents must fill at least one sample."""
    tokens = int(part.sizes[first:last].sum(dtype=np.int64))
    if tokens <= seq_length:
        raise UserError(
            f"{part.prefix}: {what} {last - first} of {len(part)} documents with {tokens} tokens in all, "
            f"and one sample needs {seq_length + 1}; give it a larger share in --split, use more data "
            "or a smaller --seq_length, or ask for none of its samples (--eval_iters 0)"
        )


class GPTDataset:
    """Samples of the documents [first, last) of one dataset, as many epochs as the wanted samples need."""

    def __init__(
        self, dataset: IndexedDataset, first: int, last: int, samples: int, seq_length: int, seed: int
    ) -> None:
        self.dataset = dataset
        documents = np.arange(first, last, dtype=np.int32)
        tokens = int(dataset.sizes[first:last].sum(dtype=np.int64))
        epochs = max(1, -(-(samples * seq_length + 1) // tokens))
        together = samples_shuffled_together(tokens, epochs, samples, seq_length)
        total = (epochs * tokens - 1) // seq_length
        random = np.random.RandomState(seed)
        self.doc_idx = build_doc_idx(documents, epochs, random, separate=together < total)
        self.sample_idx = build_sample_idx(dataset.sizes, self.doc_idx, total, seq_length)
        self.shuffle_idx = build_shuffle_idx(together, total, random)

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of sample k, int64."""
        row = int(self.shuffle_idx[k])
        (first, start), (last, end) = self.sample_idx[row].tolist(), self.sample_idx[row + 1].tolist()
        pieces = []
        for position in range(first, last + 1):
            offset = start if position == first else 0
            length = end + 1 - offset if position == last else None
            pieces.append(self.dataset.get(int(self.doc_idx[position]), offset, length))
        return np.concatenate(pieces).astype(np.int64)


class Blend:
    """Samples of several datasets in proportion to their weights: each next one goes to the dataset most behind.

    Who gets sample s depends on all before it, so the routes are worked out up to the largest sample asked for so far.
    """

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float]) -> None:
        self.datasets, self.weights = datasets, weights
        self._taken = [0] * len(datasets)
        self._source = array("H")
        self._number = array("q")

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of sample k, int64; IndexError when its dataset has no more samples."""
        self._route(k)
        return self.datasets[self._source[k]][self._number[k]]

    def _route(self, k: int) -> None:
        taken, weights, indices = self._taken, self.weights, range(len(self.datasets))
        for s in range(len(self._source), k + 1):
            scale = max(s, 1)
            source = max(indices, key=lambda i: weights[i] * scale - taken[i])  # the first of equals
            self._source.append(source)
            self._number.append(taken[source])
            taken[source] += 1


def samples_shuffled_together(tokens: int, epochs: int, samples: int, seq_length: int) -> int:
    """How many samples the first shuffle covers: all, unless little of the last epoch is needed, which stays apart."""
    total = (epochs * tokens - 1) // seq_length
    if epochs == 1:
        return total
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    apart = samples - before_last < int(0.80 * ((tokens - 1) // seq_length))
    return before_last if apart else total


def build_doc_idx(
    documents: NDArray[np.int32], epochs: int, random: np.random.RandomState, separate: bool
) -> NDArray[np.int32]:
    """Document numbers (epochs * n,) int32 in the order of reading; the last epoch shuffled by itself if separate."""
    runs = [epochs - 1, 1] if separate else [epochs]
    shuffled = [np.tile(documents, run) for run in runs]
    for run in shuffled:
        random.shuffle(run)
    return np.concatenate(shuffled)


def build_sample_idx(
    sizes: NDArray[np.int32], doc_idx: NDArray[np.int32], samples: int, seq_length: int
) -> NDArray[np.int64]:
    """Where each sample starts, (samples + 1, 2) int64: the position in doc_idx and the offset in that document.

    Sample k starts at token k * seq_length of the documents laid end to end, which is also the last token of k - 1.
    """
    lengths = sizes[doc_idx]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = np.arange(samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, starts, side="right")
    return np.stack([positions, starts - ends[positions] + lengths[positions]], axis=1)


def build_shuffle_idx(together: int, total: int, random: np.random.RandomState) -> NDArray[np.uint32 | np.int64]:
    """A permutation (total,) of the samples: [0, together) and [together, total) shuffled apart."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    shuffle_idx = np.arange(total, dtype=dtype)
    random.shuffle(shuffle_idx[:together])
    if together < total:
        random.shuffle(shuffle_idx[together:])
    return shuffle_idx
