import numpy as np

from snakmodel.dedup.buckets import chained, find, forest, group, union
from tests.dedup_run import plain_components


def test_union_finds_connected_components() -> None:
    """Random graphs, a chain of 20,000 in any order and a star give the lowest number of each component."""
    generator = np.random.default_rng(3)
    graphs = [(200, generator.integers(0, 200, (count, 2))) for count in (0, 50, 100, 150, 400)]
    chain = np.stack([np.arange(20000), np.arange(1, 20001)], axis=1)
    graphs += [(20001, chain), (20001, chain[::-1]), (20001, generator.permutation(chain))]
    graphs += [(20001, np.stack([np.full(20000, 20000), np.arange(20000)], axis=1))]
    for size, pairs in graphs:
        parent = np.arange(size)
        for part in np.array_split(pairs, 3):
            union(parent, part[:, 0], part[:, 1])
        assert find(parent, np.arange(size)).tolist() == plain_components(size, pairs.tolist())


def test_buckets_are_the_documents_of_equal_keys() -> None:
    """Keys that agree in one half only, in either, are different keys; lone keys are in no bucket."""
    generator = np.random.default_rng(4)
    for count in (0, 1, 2, 500):
        keys, low = (generator.integers(0, 25, count).astype(np.uint64) for _ in range(2))
        numbers = generator.permutation(count)
        documents, starts = group(keys, low, numbers)
        found = [sorted(part.tolist()) for part in np.split(documents, starts[1:])] if len(starts) else []
        expected: dict[tuple[int, int], list[int]] = {}
        for key, other, number in zip(keys.tolist(), low.tolist(), numbers.tolist(), strict=True):
            expected.setdefault((key, other), []).append(number)
        assert sorted(found) == sorted(sorted(bucket) for bucket in expected.values() if len(bucket) > 1)


def test_a_forest_links_to_the_lowest_and_nothing_twice() -> None:
    """A thousand overlapping buckets are reduced to one link a document that is not the lowest of its component."""
    generator = np.random.default_rng(5)
    documents = np.concatenate([generator.choice(10**9, 5, replace=False) for _ in range(1000)])
    documents[::7] = generator.choice(documents, len(documents[::7]))
    starts = np.arange(0, 5000, 5)
    links = forest(*chained(documents, starts))
    names = np.unique(documents)
    places = np.searchsorted(names, documents).tolist()
    pairs = [(places[start], places[start + step]) for start in range(0, 5000, 5) for step in range(1, 5)]
    lowest = plain_components(len(names), pairs)
    assert {tuple(link) for link in links.tolist()} == {
        (names[node], names[low]) for node, low in enumerate(lowest) if node != low
    }
