"""Digests of what a task has read, by which its marker can be renewed without repeating the task.

A task's key changes when anything before the task changes. Often the task's inputs are nevertheless the same, byte for
byte: for example a shard from which no document was removed, neither before the change nor after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from run_contract.publish import checksum
from snakmodel.run.markers import Marker
from snakmodel.run.task_list import InputSpec, TaskList


def numbers(tasks: TaskList, source: InputSpec) -> Sequence[int]:
    """The indices of the tasks of another stage that an input refers to."""
    return range(len(tasks.keys[source.stage])) if source.index is None else [source.index]


def content(tasks: TaskList, index: int, markers: Mapping[tuple[str, int], Marker]) -> str:
    """A digest of what a task does and of the bytes that it reads; empty if the task list gives no `meaning`.

    `markers` holds the markers of the tasks that it reads from, by stage and index.
    """
    task = tasks.tasks[index]
    digest = xxhash.xxh3_128(task.meaning.encode())
    for source in task.inputs:
        for number in numbers(tasks, source):
            outputs = sorted(markers[source.stage, number].chosen(source.only).items())
            digest.update(json.dumps(outputs).encode())
    return digest.hexdigest() if task.meaning else ""


def renewed(tasks: TaskList, index: int, found: str) -> Marker | None:
    """The task's marker with its present key, or None if the task has to be done again.

    The marker is renewed if the task's `content`, given as `found`, is what it was when the task was done, and the
    outputs verify with their checksums.
    """
    marker = Marker.read(tasks.marker_path(tasks.stage, index))
    if marker is None or not found or marker.content != found or marker.problem(tasks.root, full=True):
        return None
    return replace(marker, key=tasks.tasks[index].key)


def versions(names: Sequence[str]) -> list[tuple[int, int]]:
    """The size and modification time (in ns) of each file from outside the run; zeros for one that does not exist."""
    found = [Path(name).stat() if Path(name).exists() else None for name in names]
    return [(one.st_size, one.st_mtime_ns) if one else (0, 0) for one in found]


def digests(names: Sequence[str], before: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Maps the name of each file from outside the run to its digest. Raises ValueError if a file was changed meanwhile.

    `before` holds the `versions` of the files before they were read.
    """
    found = {Path(name).name: checksum(Path(name)) for name in names}
    if versions(names) != before:
        raise ValueError(f"one of {', '.join(names)} was changed while it was read")
    return found
