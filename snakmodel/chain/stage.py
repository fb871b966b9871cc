"""Tasks, stages and their keys: what is to be run, what it needs, and when a done marker still speaks of it.

A task is a command line with the files it reads and writes. A stage is an array of tasks with their resources and the
stages it waits for. A task's key digests the meaning of its command line, the inputs from outside the run, and the
keys of the tasks it reads from; so a key changes exactly when the outputs may.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from run_contract.errors import UserError
from snakmodel.config.cluster import Resources
from snakmodel.config.sections import PROJECT
from snakmodel.run.markers import judge, marker_path


@dataclass(frozen=True)
class Input:
    """What a task reads of another stage, and how much of it is verified before the task starts."""

    stage: str
    index: int | None = None
    """One task of that stage, or all of them."""
    only: tuple[str, ...] = ()
    """Outputs that are read; all when empty."""
    full: bool = True
    """Compare checksums; False where the reader checks what it reads by itself."""


@dataclass(frozen=True)
class Task:
    """One command line; paths in `outputs` and `counts` are relative to the run's folder."""

    argv: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    counts: str | None = None
    """JSON file among the outputs whose content goes into the done marker."""
    unkeyed: tuple[str, ...] = ()
    """Further arguments that do not change the outputs (workers, devices)."""
    outside: Any = None
    """What stands for inputs from outside the run, and anything else the outputs depend on."""
    reads: tuple[str, ...] = ()
    """Files from outside the run of which the done marker keeps a digest."""


@dataclass(frozen=True)
class Stage:
    """An array of tasks."""

    name: str
    tasks: tuple[Task, ...]
    resources: Resources
    per_shard: bool = False
    """Has one task a shard: several may share one array element."""
    resumable: bool = False
    """Saves its state when signalled, and exits 75."""
    progress: str | None = None
    """File with the number that grows as a resumable task gets further."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def waits(self) -> Mapping[str, Literal["same", "all"]]:
        """The stages that this one waits for, since its tasks read from them.

        It waits task by task ("same") where each task reads from the task of its own number alone, else for all tasks.
        """
        read: dict[str, list[set[int | None]]] = {}
        for number, task in enumerate(self.tasks):
            for source in task.inputs:
                read.setdefault(source.stage, [set() for _ in self.tasks])[number].add(source.index)
        return {
            name: "same" if numbers == [{number} for number in range(len(self.tasks))] else "all"
            for name, numbers in read.items()
        }


@dataclass(frozen=True)
class Chain:
    """All stages of a run in an order in which they can be done, and the keys of their tasks."""

    root: Path
    """The run's folder."""
    stages: tuple[Stage, ...]
    keys: Mapping[str, tuple[str, ...]]
    """Stage name -> key of each task."""

    @classmethod
    def of(cls, root: Path, stages: Sequence[Stage]) -> Chain:
        """Check that every stage waits only for earlier ones and has what it reads, and compute the keys."""
        keys: dict[str, tuple[str, ...]] = {}
        sizes = {stage.name: len(stage.tasks) for stage in stages}
        for stage in stages:
            for other, kind in stage.waits.items():
                if other not in keys:
                    raise ValueError(f"stage {stage.name} waits for {other}, which does not come before it")
                if kind == "same" and sizes[other] != sizes[stage.name]:
                    raise ValueError(f"stages {stage.name} and {other} differ in size but are chained task by task")
            keys[stage.name] = tuple(_key(root, task, keys) for task in stage.tasks)
        return cls(root, tuple(stages), keys)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def stage_keys(self) -> dict[str, str]:
        """One key a stage."""
        return {name: _digest(list(keys)) for name, keys in self.keys.items()}

    def marker_problem(self, stage: str, index: int) -> str | None:
        """Why a task does not count as done, or None if it does. Compares key, existence and sizes, not checksums."""
        path = marker_path(self.root, stage, index)
        return judge(path, self.root, self.keys[stage][index]).problem if path.exists() else "no marker"

    def marker_problems(self, stage: str) -> list[str | None]:
        """The same of every task of a stage; what has no marker costs nothing."""
        folder = marker_path(self.root, stage, 0).parent
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        paths = ((index, marker_path(self.root, stage, index)) for index in range(len(self.keys[stage])))
        if not there:
            return ["no marker"] * len(self.keys[stage])
        keys = self.keys[stage]
        return [judge(path, self.root, keys[i]).problem if path.name in there else "no marker" for i, path in paths]


def _key(root: Path, task: Task, keys: Mapping[str, tuple[str, ...]]) -> str:
    """The key of a task; this machine's folders are taken out of its arguments, so that a moved run keeps its keys."""
    read: list[str] = []
    for source in task.inputs:
        read += keys[source.stage] if source.index is None else [keys[source.stage][source.index]]
    return _digest([*_own(root, task), read])


def meaning(root: Path, task: Task) -> str:
    """What a task does, as a digest: the part of its key that does not come from other tasks."""
    return _digest(_own(root, task))


def _own(root: Path, task: Task) -> list[Any]:
    folder, project = str(root), str(PROJECT)
    argv = [argument.replace(folder, "RUN").replace(project, "PROJECT") for argument in task.argv]
    return [argv, list(task.outputs), task.outside]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


_SAMPLE = 1 << 16


def fingerprint(path: Path) -> list[Any]:
    """Name, size and a digest of the first, middle and last 64 KiB of a file from outside the run.

    Cheap enough for terabytes on a login node, and unmoved by copying or touching the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error
    return [path.name, size, digest.hexdigest()[:32]]
