"""The best label of a vector: by hierarchical softmax, softmax or one probability per label."""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import math
from typing import Any

import numpy as np

from snakmodel.filter.fasttext_kernel.cache import compiled, inner
from snakmodel.filter.fasttext_kernel.tables import Floats, Rows

_EPSILON = 1e-5
"""fastText adds it to a probability before it takes the logarithm."""
_GROWTH = 1.1e-5
"""How much a score can grow at a node of the tree: log(1 + _EPSILON), rounded up."""


@inner
def _dot(left: Floats, right: Floats) -> np.float32:
    total = np.float32(0)
    for place in range(len(left)):
        total += left[place] * right[place]
    return total


@inner
def _branch(hidden: Floats, outputs: Floats, norms: Floats, node: int) -> np.float32:
    """The probability of the right branch at an inner node."""
    value = _dot(hidden, outputs[node]) * norms[node]
    return np.float32(1.0 / np.float64(np.float32(1) + np.float32(math.exp(np.float32(-value)))))


@inner
def _log(value: np.float32) -> np.float32:
    return np.float32(math.log(np.float64(value) + _EPSILON))


@compiled
def best_in_tree(
    hidden: Floats, outputs: Floats, norms: Floats, children: Rows, depth: int, labels: Rows, probabilities: Floats
) -> None:
    """Hierarchical softmax: the best leaf for each vector, and its probability.

    A score is the logarithm of a probability.

    `children` has the two children of each node: leaves come first, inner node i is node len(outputs) + i, the last
    node is the root. A walk down the likelier branches gives a score that the best leaf has at least, and so the
    library's order of the search is kept where the search still goes.
    """
    leaves = len(outputs)
    nodes = np.empty(depth + 2, np.int32)
    sums = np.empty(depth + 2, np.float32)
    lowest = _log(np.float32(0))
    for text in range(len(hidden)):
        node, reached = len(children) - 1, np.float32(0)
        while node >= leaves:
            right = _branch(hidden[text], outputs, norms, node - leaves)
            side = 1 if right >= np.float32(0.5) else 0
            reached += _log(right) if side else _log(np.float32(1.0 - np.float64(right)))
            node = children[node, side]
        floor = max(lowest, np.float32(reached - depth * _GROWTH))
        best, label = np.float32(0), -1
        nodes[0], sums[0] = len(children) - 1, np.float32(0)
        size = 1
        while size:
            size -= 1
            node, score = nodes[size], sums[size]
            if score < floor or (label >= 0 and score < best):
                continue
            if node < leaves:
                best, label = score, node
                continue
            right = _branch(hidden[text], outputs, norms, node - leaves)
            nodes[size], sums[size] = children[node, 1], score + _log(right)
            nodes[size + 1], sums[size + 1] = children[node, 0], score + _log(np.float32(1.0 - np.float64(right)))
            size += 2
        labels[text], probabilities[text] = label, np.float32(math.exp(best))


@compiled
def best_of_all(
    hidden: Floats, columns: Floats, norms: Floats, sigmoid: Floats, labels: Rows, probabilities: Floats
) -> None:
    """Softmax (`sigmoid` is empty) or one probability per label: the best label for each vector, and its probability.

    `columns` (dim, labels) has the output vectors as columns, so that all products are summed side by side.
    """
    values = np.empty(columns.shape[1], np.float32)
    for text in range(len(hidden)):
        values[:] = 0
        for row in range(len(columns)):
            factor = hidden[text, row]
            for place in range(len(values)):
                values[place] += factor * columns[row, place]
        for place in range(len(values)):
            values[place] *= norms[place]
        if len(sigmoid):
            for place in range(len(values)):
                values[place] = _sigmoid(values[place], sigmoid)
        else:
            _softmax(values)
        best, label = np.float32(0), -1
        for place in range(len(values)):
            score = _log(values[place])
            if label < 0 or score >= best:
                best, label = score, place
        labels[text], probabilities[text] = label, np.float32(math.exp(best))


@inner
def _sigmoid(value: np.float32, sigmoid: Floats) -> np.float32:
    if value < -8:
        return np.float32(0)
    if value > 8:
        return np.float32(1)
    return sigmoid[np.int64(np.float32(np.float32(value + np.float32(8)) * np.float32(512)) / np.float32(8) / 2)]


@inner
def _softmax(values: Floats) -> None:
    """The library takes this exponential in double precision, and the one of a branch in single precision."""
    top, total = values[0], np.float32(0)
    for place in range(len(values)):
        top = max(top, values[place])
    for place in range(len(values)):
        values[place] = np.float32(math.exp(np.float64(np.float32(values[place] - top))))
        total += values[place]
    for place in range(len(values)):
        values[place] /= total


def sigmoid_table() -> Floats:
    """fastText's table of the logistic function: 513 values from -8 to 8."""
    places = (np.arange(513, dtype=np.float32) * np.float32(16) / np.float32(512) - np.float32(8)).astype(np.float32)
    return np.array([1.0 / (1.0 + float(np.float32(math.exp(-place)))) for place in places.tolist()], np.float32)


def tree(counts: Any) -> tuple[Rows, int]:
    """The children of each node of the Huffman tree over labels with these counts, (nodes, 2), and its depth.

    Labels come in the order of falling counts, as the dictionary has them.
    """
    leaves = len(counts)
    sums = [*map(int, counts), *[10**15] * (leaves - 1)]
    children = np.full((2 * leaves - 1, 2), -1, np.int32)
    depths = [0] * (2 * leaves - 1)
    leaf, node = leaves - 1, leaves
    for new in range(leaves, 2 * leaves - 1):
        for side in range(2):
            if leaf >= 0 and sums[leaf] < sums[node]:
                children[new, side] = leaf
                leaf -= 1
            else:
                children[new, side] = node
                node += 1
        left, right = map(int, children[new])
        sums[new] = sums[left] + sums[right]
        depths[new] = 1 + max(depths[left], depths[right])
    return children, depths[-1]
