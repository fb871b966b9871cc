from collections import Counter

import numpy as np

from snakmodel.dedup import components
from snakmodel.dedup.components import DROPPED, cluster_sizes


def test_cluster_sizes_are_counted_in_place(monkeypatch: object) -> None:
    """Sizes and the largest clusters are those of a plain count, across blocks, with dropped documents left out."""
    generator = np.random.default_rng(6)
    roots = np.sort(generator.choice(5000, 700, replace=False))
    labels = np.arange(5000)
    for number in generator.choice(5000, 2500, replace=False).tolist():
        if number not in set(roots.tolist()):
            labels[number] = generator.choice(roots[roots < number]) if number > roots[0] else DROPPED
    plain = Counter(label for label in labels.tolist() if label != DROPPED)
    expected = Counter(size for size in plain.values() if size > 1)
    ordered = sorted(((-size, root) for root, size in plain.items() if size > 1))[:20]
    original, components._BLOCK = components._BLOCK, 300
    try:
        sizes, largest = cluster_sizes(labels)
    finally:
        components._BLOCK = original
    assert sizes == expected
    assert [(-size, -negative) for size, negative in largest] == ordered
