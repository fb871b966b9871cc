"""What a task read, of other tasks and from outside the run: by it a marker is renewed without doing the task again.

A key changes when anything before a task changes; often its inputs come out byte for byte as they were all the same,
such as a shard of which no document was removed, before and after.
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
    """The tasks of another stage that an input means."""
    return range(len(tasks.keys[source.stage])) if source.index is None else [source.index]


def content(tasks: TaskList, index: int, markers: Mapping[tuple[str, int], Marker]) -> str:
    """What a task does and the bytes that it reads, as a digest. `markers`: those of the tasks that it reads from."""
    task = tasks.tasks[index]
    digest = xxhash.xxh3_128(task.meaning.encode())
    for source in task.inputs:
        for number in numbers(tasks, source):
            outputs = sorted(markers[source.stage, number].chosen(source.only).items())
            digest.update(json.dumps(outputs).encode())
    return digest.hexdigest() if task.meaning else ""


def renewed(tasks: TaskList, index: int, found: str) -> Marker | None:
    """A marker with the task's present key, if what it reads is as it was when it was done, and its outputs verify."""
    marker = Marker.read(tasks.marker_path(tasks.stage, index))
    if marker is None or not found or marker.content != found or marker.problem(tasks.root, full=True):
        return None
    return replace(marker, key=tasks.tasks[index].key)


def versions(names: Sequence[str]) -> list[tuple[int, int]]:
    """Size and modification time of files from outside; zeros where one is not there."""
    found = [Path(name).stat() if Path(name).exists() else None for name in names]
    return [(one.st_size, one.st_mtime_ns) if one else (0, 0) for one in found]


def digests(names: Sequence[str], before: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Name -> digest of files from outside. Raises ValueError if one is no longer what it was before it was read."""
    found = {Path(name).name: checksum(Path(name)) for name in names}
    if versions(names) != before:
        raise ValueError(f"one of {', '.join(names)} was changed while it was read")
    return found
