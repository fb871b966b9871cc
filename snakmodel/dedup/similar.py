"""Finds the fewest pairs that connect the sets of hashes whose Jaccard index reaches a threshold.

The result is exact, although hardly any pair is compared. Two sets that are similar enough share one of their rarest
members (prefix filtering, as in PPJoin: Xiao et al., "Efficient similarity joins for near-duplicate detection", 2011):
at the threshold t, one of the n - ceil(2t / (1 + t) n) + 1 rarest members of the smaller set, which has n, is among the
m - ceil(t m) + 1 rarest members of the larger set, which has m. So a set is compared only with sets that have such a
member in common, and in a group that is connected already, only until one of the group reaches the threshold.

The work grows in proportion to the number of sets if the members that distinguish them are rare, as in copies of a form
that are filled in differently. It grows with the square of that number only if many sets share the members in which
they differ and still no pair reaches the threshold.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from snakmodel.dedup.signature_file import Numbers

Hashes = NDArray[np.uint64]
_SLOTS = 1 << 24
_AT_ONCE = 1 << 8
"""The number of sets that are compared with a set in one step."""
_SLACK = 1e-6
"""A margin for the rounding of a bound. It makes the bound a little too low, which costs a comparison and changes no
result."""


def similar_pairs(sets: Sequence[Hashes], threshold: float) -> list[tuple[int, int]]:
    """The pairs of positions in `sets` that connect similar sets.

    The sets have to be distinct, with ascending members, and the smaller sets have to come first.
    """
    if len(sets) < 3:  # by far the most buckets
        return [(1, 0)] if len(sets) == 2 and _similar(sets[0], sets[1], threshold) else []
    join = _Join(sets, threshold)
    return [(new, other) for new in range(len(sets)) for other in join.partners(new)]


def _similar(one: Hashes, other: Hashes, threshold: float) -> bool:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both) >= threshold


class _Join:
    """The sets that were met so far, by their rarest members."""

    def __init__(self, sets: Sequence[Hashes], threshold: float) -> None:
        self.sets = sets
        self.threshold = threshold
        self.sizes = np.array([len(one) for one in sets])
        self.slots = min(_SLOTS, 2 << int(self.sizes.sum()).bit_length())
        self.counts = np.zeros(self.slots, np.uint32)
        """The number of sets that have any member in each slot. For a member's slot, it is 1 if no other set may have
        the member, and it is never smaller than the number of sets that have the member."""
        for one in sets:
            self.counts[self._slot(one)] += 1
        self.common = np.array([int(np.count_nonzero(self.counts[self._slot(one)] > 1)) for one in sets])
        """The number of members of each set that another set may have too."""
        self.marked = np.zeros(self.slots, np.bool_)
        self.met = np.full(len(sets), -1)
        """For each set, the last set that it was compared with."""
        self.parent = list(range(len(sets)))
        self.having: dict[int, dict[int, list[int]]] = {}
        """Maps a member to a group (by its root) to those sets of the group that have the member among their rarest."""

    def partners(self, new: int) -> Iterator[int]:
        """Yield one similar set from each group that the set `new` joins. The sets have to be passed in order."""
        members, size = self.sets[new], len(self.sets[new])
        slots = self._slot(members)
        counts = self.counts[slots]
        alone = size - int(self.common[new])
        probed = size - math.ceil(self.threshold * size - _SLACK) + 1
        kept = size - math.ceil(2 * self.threshold / (1 + self.threshold) * size - _SLACK) + 1
        rarest = members[np.argsort(counts, kind="stable")[alone:probed]].tolist()
        self.marked[slots] = True
        for batch in self._candidates(new, rarest):
            for other in self._similar(new, batch):
                self.parent[self._root(new)] = self._root(other)
                yield other
        self.marked[slots] = False
        root = self._root(new)
        for member in rarest[: max(0, kept - alone)]:
            self.having.setdefault(member, {}).setdefault(root, []).append(new)

    def _slot(self, members: Hashes) -> Numbers:
        slots: Numbers = (members & np.uint64(self.slots - 1)).astype(np.int64)
        return slots

    def _candidates(self, new: int, rarest: Sequence[int]) -> Iterator[Numbers]:
        """Yield arrays of sets to compare with the set `new`, at most _AT_ONCE in each.

        They are the smallest and the largest sets of every group, four times as many in each round, until no group is
        left that the new set has not joined and that has further sets. Sets that are too small for the new one are
        passed over.
        """
        first = int(np.searchsorted(self.sizes, self.threshold * len(self.sets[new]) - _SLACK))
        groups = [(sets, bisect_left(sets, first), len(sets)) for member in rarest for sets in self._groups(member)]
        count = 1
        while groups := [one for one in groups if one[1] < one[2] and self._root(one[0][0]) != self._root(new)]:
            ends = [sets[start : start + count] + sets[max(start, end - count) : end] for sets, start, end in groups]
            some = np.unique(np.concatenate(ends))
            some = some[self.met[some] != new]
            self.met[some] = new
            some = some[self._reaches(new, some, np.minimum(self.common[some], self.common[new]))]
            for begin in range(0, len(some), _AT_ONCE):
                yield some[begin : begin + _AT_ONCE]
            groups = [(sets, start + count, end - count) for sets, start, end in groups]
            count *= 4

    def _groups(self, member: int) -> Iterator[list[int]]:
        """The sets that have a member among their rarest, ascending, with one list per group as connected by now."""
        groups = self.having.get(member, {})
        for root in [root for root in groups if self.parent[root] != root]:
            moved, there = groups.pop(root), groups.get(self._root(root), [])
            few, many = sorted((moved, there), key=len)
            for one in few:
                insort(many, one)
            groups[self._root(root)] = many
        return iter(groups.values())

    def _similar(self, new: int, others: Numbers) -> Iterator[int]:
        """Yield those of the other sets that reach the threshold, but none from a group that the new set has joined."""
        starts = np.cumsum(self.sizes[others]) - self.sizes[others]
        shared = self.marked[self._slot(np.concatenate([self.sets[other] for other in others]))]
        most = np.add.reduceat(shared, starts, dtype=np.int64)  # different members may share a slot
        for other in others[self._reaches(new, others, most)].tolist():
            if self._root(other) != self._root(new) and _similar(self.sets[new], self.sets[other], self.threshold):
                yield other

    def _reaches(self, new: int, others: Numbers, both: Numbers) -> NDArray[np.bool_]:
        """A mask of the other sets that reach the threshold if they have `both` members in common with the new one."""
        reached: NDArray[np.bool_] = both / (self.sizes[new] + self.sizes[others] - both) >= self.threshold
        return reached

    def _root(self, node: int) -> int:
        while (up := self.parent[node]) != node:
            self.parent[node] = node = self.parent[up]
        return node
