"""The counts of contamination by evaluation file: how they are bounded, and how those of shards are added.

  items_hit       the number of items that share a gram with a document
  hit_items       number of an item -> source -> the documents of the source that hit it, of at most MOST_ITEMS items
  further_items   all other items that were hit: their documents together, and their numbers

The items that are counted one by one are those with the lowest numbers. An item that is among them for the whole corpus
is among them in each shard, so that it makes no difference whether counts are bounded before or after they are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from snakmodel.shards.counts import bounded, merged

MOST_ITEMS = 2000
"""The number of items of each evaluation file that are counted one by one."""
FIXED = ("items", "whole", "too_short")
"""What an evaluation file holds, which does not depend on the documents."""


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sum of two counts of an evaluation file, both as `bounded_file` gives them."""
    apart = (*FIXED, "items_hit", "further_items")
    sums = [{key: value for key, value in part.items() if key not in apart} for part in (one, other)]
    fixed = {key: one[key] for key in FIXED}
    return bounded_file({**fixed, **merged(*sums)}, [one["further_items"], other["further_items"]])


def bounded_file(counts: dict[str, Any], further: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """The counts of an evaluation file with bounded sources and items; `further` are items beyond the bound so far."""
    hit = {int(number): bounded(sources) for number, sources in counts["hit_items"].items()}
    chosen = sorted(hit)[:MOST_ITEMS]
    rest = set(hit) - set(chosen)
    documents = sum(sum(hit[number].values()) for number in rest)
    for part in further:
        documents += part["documents"]
        rest.update(numbers_of(part["numbers"]))
    return {
        **counts,
        "by_source": bounded(dict(sorted(counts["by_source"].items()))),
        "items_hit": len(chosen) + len(rest),
        "hit_items": {str(number): dict(sorted(hit[number].items())) for number in chosen},
        "further_items": {"documents": documents, "numbers": ranges_of(rest)},
    }


def ranges_of(numbers: Iterable[int]) -> str:
    """Numbers as text in which runs are written as their ends: 3,7-9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def numbers_of(ranges: str) -> list[int]:
    """The numbers that `ranges_of` has written."""
    found: list[int] = []
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
