"""Replans the shards of a run whose input files changed.

The borders between shards stay where they were, so that a change in one place leaves the other shards as they are. The
documents and their order are those of a fresh plan, because they do not depend on where the borders are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from snakmodel.prepare.input_files import FilePart, Selection, relative, whole_part

Shards = list[list[FilePart]]

_GROWTH = 2
"""A run is planned afresh if its largest shard would become more than this many times larger."""


def read_plan(path: Path) -> Shards | None:
    """The shards in a `shards.json`, or None if the file does not exist or cannot be understood."""
    try:
        return [[FilePart(**part) for part in parts] for parts in json.loads(path.read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class EarlierPlan:
    """The shards that a run was planned with."""

    def __init__(self, shards: Sequence[Sequence[FilePart]], folder: Path) -> None:
        self.largest = max((_bytes(parts) for parts in shards), default=0)
        self.count = len(shards)
        self.ranges: dict[str, list[tuple[int, FilePart]]] = {}
        """Maps a file's name below the data folder to (index of the shard, part) for every shard that reads the
        file."""
        for index, parts in enumerate(shards):
            for part in parts:
                self.ranges.setdefault(_name(folder, part), []).append((index, part))

    def changes(self, found: Selection) -> list[str]:
        """One sentence for each file that is gone, is new or has a different size, to be shown to users."""
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
        """The earlier shards, with the files as they are now.

        A file is taken to grow or shrink at its end, and a new file is read by the shard that reads the file before it.
        Returns None if that makes no good plan: the files come in a different order, the first shard would be empty, or
        the largest shard would become more than `_GROWTH` times larger.
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


def _bytes(parts: Sequence[FilePart]) -> int:
    return sum(part.end - part.start for part in parts)


def _name(folder: Path, part: FilePart) -> str:
    path = Path(part.file)
    return relative(folder, path) if path.is_relative_to(folder) else part.file
