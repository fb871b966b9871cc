"""The shards of a run whose files changed: borders stay where they were, so that other shards stay as they are.

The documents and their order are those of a fresh plan, since these do not depend on where the borders are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from snakmodel.prepare.input_files import Part, Selection, relative, whole_part

Shards = list[list[Part]]

_GROWTH = 2
"""A plan whose largest shard would become so many times larger is made afresh."""


def read_plan(path: Path) -> Shards | None:
    """The shards of a `shards.json`, or None if it is not there or cannot be understood."""
    try:
        return [[Part(**part) for part in parts] for parts in json.loads(path.read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class EarlierPlan:
    """The shards that a run was planned with."""

    def __init__(self, shards: Sequence[Sequence[Part]], folder: Path) -> None:
        self.largest = max((_bytes(parts) for parts in shards), default=0)
        self.count = len(shards)
        self.ranges: dict[str, list[tuple[int, Part]]] = {}
        """File, by its name below the data folder -> the shards that read it, and its parts."""
        for index, parts in enumerate(shards):
            for part in parts:
                self.ranges.setdefault(_name(folder, part), []).append((index, part))

    def changes(self, found: Selection) -> list[str]:
        """What differs in the names and sizes of the files, for people."""
        now = {relative(found.folder, one.path): one.size for one in found.files}
        before = {name: ranges[-1][1].end for name, ranges in self.ranges.items()}
        return [
            *(f"{name} is gone" for name in before if name not in now),
            *(f"{name} is new" for name in now if name not in before),
            *(
                f"{name} has {now[name]:,} bytes, not {size:,}"
                for name, size in before.items()
                if now.get(name, size) != size
            ),
        ]

    def kept(self, found: Selection, seed: int) -> Shards | None:
        """The same shards with the files as they are now: a file that grew or shrank does so at its end, and a new one
        is read by the shard that reads the file before it.

        None where that is no good plan: the files come in another order, or there is far more or hardly anything.
        """
        plan: Shards = [[] for _ in range(self.count)]
        at = 0
        for one in found.files:
            whole = whole_part(found.folder, one, seed)
            ranges = self.ranges.get(relative(found.folder, one.path)) or [(at, whole)]
            if ranges[0][0] < at:
                return None
            ranges = [(index, part) for index, part in ranges if part.start < one.size] or ranges[:1]
            at = ranges[-1][0]
            for index, part in ranges[:-1]:
                plan[index].append(replace(whole, start=part.start, end=part.end))
            plan[at].append(replace(whole, start=ranges[-1][1].start))
        if max(map(_bytes, plan)) > _GROWTH * self.largest or not _bytes(plan[0]):
            return None
        return plan


def _bytes(parts: Sequence[Part]) -> int:
    return sum(part.end - part.start for part in parts)


def _name(folder: Path, part: Part) -> str:
    path = Path(part.file)
    return relative(folder, path) if path.is_relative_to(folder) else part.file
