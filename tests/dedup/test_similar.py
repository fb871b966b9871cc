import random

import numpy as np
import pytest
from numpy.typing import NDArray

from snakmodel.dedup import similar
from snakmodel.dedup.jaccard import Verifier
from snakmodel.dedup.similar import Hashes, similar_pairs
from tests.dedup_run import plain_components

FORM = [f"ord{number}" for number in range(400)]


def families(seed: int, spread: int) -> list[Hashes]:
    """Sets that differ from others in members that are rare, that few share, or that many share; and empty ones."""
    random_ = random.Random(seed)
    common = random_.sample(range(spread), 60)
    made: set[frozenset[int]] = {frozenset()}
    for _ in range(25):
        one = set(random_.sample(common, random_.randrange(1, 60)))
        for _ in range(8):
            made.add(frozenset(one))
            one ^= set(random_.sample(range(spread), random_.randrange(1, 6)))
    return [np.array(sorted(one), np.uint64) for one in sorted(made, key=lambda one: (len(one), sorted(one)))]


def quotients(sets: list[Hashes], spread: int) -> NDArray[np.float64]:
    """The Jaccard index of every two sets, (n, n)."""
    has = np.zeros((len(sets), spread))
    for row, one in zip(has, sets, strict=True):
        row[one] = 1
    both = has @ has.T
    sizes = both.diagonal()
    return both / np.maximum(1, sizes[:, None] + sizes - both)


@pytest.mark.parametrize("spread", [100, 300, 10_000])
@pytest.mark.parametrize("slots", [8, 1 << 24])
def test_the_pairs_connect_what_comparing_all_pairs_connects(
    monkeypatch: pytest.MonkeyPatch, slots: int, spread: int
) -> None:
    """No pair is missed or made up, at thresholds that quotients of small numbers hit exactly; as few as will do.

    With eight slots almost every member shares its slot with others.
    """
    monkeypatch.setattr(similar, "_SLOTS", slots)
    sets = families(spread, spread)
    jaccard = quotients(sets, spread)
    for threshold in (0.01, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 1.0):
        found = similar_pairs(sets, threshold)
        expected = plain_components(len(sets), np.argwhere(np.tril(jaccard >= threshold, -1)).tolist())
        assert plain_components(len(sets), found) == expected
        assert len(found) == len(sets) - len(set(expected))
        assert all(jaccard[pair] >= threshold for pair in found)
        for a, b in zip(range(1, 40), range(2, 41), strict=True):
            assert similar_pairs([sets[a], sets[b]], threshold) == [(1, 0)] * int(jaccard[a, b] >= threshold)
    assert similar_pairs(sets[:1], 0.5) == similar_pairs([], 0.5) == []


def boilerplate(documents: int, places: int, tail: int = 0) -> list[str]:
    """A form, filled in at so many places and followed by so many words that are in no other document."""
    made = []
    for number in range(documents):
        words = list(FORM)
        for place in range(places):
            words[(place * len(words)) // places + 3] = f"nr{number}felt{place}"
        made.append(" ".join([*words, *(f"nr{number}ord{word}" for word in range(number % (tail + 1)))]))
    return made


@pytest.mark.parametrize(("places", "tail", "passing"), [(10, 0, 0), (0, 150, 1), (2, 3, 1), (5, 60, 1)])
def test_boilerplate_is_compared_in_linear_time(
    monkeypatch: pytest.MonkeyPatch, places: int, tail: int, passing: int
) -> None:
    """Twice the documents of a form are twice the comparisons, a few for each, whether they pass or not."""
    compared = [0]
    similar_, intersect = similar._Join._similar, np.intersect1d

    def counted(self, new, others):  # type: ignore[no-untyped-def]
        compared[0] += len(others)
        return similar_(self, new, others)

    def intersected(*args, **settings):  # type: ignore[no-untyped-def]
        compared[0] += 1
        return intersect(*args, **settings)

    monkeypatch.setattr(similar._Join, "_similar", counted)
    monkeypatch.setattr(np, "intersect1d", intersected)
    parameters = {"threshold": 0.85, "ngram": 5, "min_length": 5, "compat": "text-dedup-0.4.0"}
    for count in (300, 600):
        compared[0] = 0
        verifier = Verifier(boilerplate(count, places, tail), parameters)  # type: ignore[arg-type]
        found = verifier.links(np.arange(count))
        assert compared[0] <= 20 * count, count
        assert verifier.counts == {"checked": count - 1, "kept": len(found), "rejected": count - 1 - len(found)}
        assert bool(found) == bool(passing)
