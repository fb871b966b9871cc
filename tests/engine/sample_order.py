"""CONTRACTS' rules for the order of training samples, written down in plain Python, sample by sample and slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def boundaries(split: str, documents: int) -> list[int]:
    """The four documents that bound train, valid and test."""
    shares = [float(share) for share in split.split(",")]
    shares = [*shares, 0.0, 0.0][:3]
    total = 0.0
    for share in shares:
        total += share
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * documents))
    overshoot = bounds[3] - documents
    return [0] + [bound - overshoot for bound in bounds[1:]]


def indices(
    sizes: Sequence[int], first: int, last: int, wanted: int, length: int, seed: int
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """doc_idx, sample_idx and shuffle_idx of the documents [first, last), for `wanted` samples."""
    tokens = sum(sizes[first:last])
    epochs = 1
    while (epochs * tokens - 1) // length < wanted:
        epochs += 1
    before_last = ((epochs - 1) * tokens - 1) // length
    separate = epochs > 1 and wanted - before_last < int(0.80 * ((tokens - 1) // length))
    random = np.random.RandomState(seed)

    def shuffled(epochs: int) -> list[int]:
        documents = np.array(list(range(first, last)) * epochs, dtype=np.int32)
        random.shuffle(documents)
        return documents.tolist()

    doc_idx = shuffled(epochs - 1) + shuffled(1) if separate else shuffled(epochs)
    total = (epochs * tokens - 1) // length
    sample_idx, position, offset = [(0, 0)], 0, 0
    for _ in range(total):
        left = length + 1
        while left:
            here = sizes[doc_idx[position]] - offset
            if here < left:
                left, position, offset = left - here, position + 1, 0
            else:
                left, offset = 0, offset + left - 1
        sample_idx.append((position, offset))
    shuffle_idx: list[int] = []
    for low, high in [(0, before_last), (before_last, total)] if separate else [(0, total)]:
        part = np.arange(low, high, dtype=np.uint32)
        random.shuffle(part)
        shuffle_idx += part.tolist()
    return doc_idx, sample_idx, shuffle_idx


def samples(
    documents: Sequence[Sequence[int]], first: int, last: int, wanted: int, length: int, seed: int
) -> list[list[int]]:
    """The tokens of all samples, in order."""
    sizes = [len(document) for document in documents]
    doc_idx, sample_idx, shuffle_idx = indices(sizes, first, last, wanted, length, seed)
    stream = [token for document in doc_idx for token in documents[document]]
    starts = [sum(sizes[document] for document in doc_idx[:position]) + offset for position, offset in sample_idx]
    return [stream[starts[row] : starts[row] + length + 1] for row in shuffle_idx]


def normalised(weights: Sequence[float]) -> list[float]:
    """Each over their sum, added from left to right."""
    total = 0.0
    for weight in weights:
        total += weight
    return [weight / total for weight in weights]


def wanted_of(share: float, samples: int) -> int:
    """What a blend asks of a dataset."""
    return math.ceil(samples * share * 1.005)


def routes(weights: Sequence[float], length: int) -> list[tuple[int, int]]:
    """(dataset, its sample) of each sample of a blend; upstream's blend normalises the normalised weights once more."""
    shares = [float(share) for share in np.array(weights) / np.sum(np.array(weights))]
    taken, found = [0] * len(shares), []
    for s in range(length):
        errors = [share * max(s, 1) - count for share, count in zip(shares, taken, strict=True)]
        source = errors.index(max(errors))
        found.append((source, taken[source]))
        taken[source] += 1
    return found
