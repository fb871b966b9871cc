"""Tasks, stages and their keys: what has to be run, what it needs, and which done markers are still valid.

A task is a command line with the files that it reads and writes. A stage is an array of tasks with their resources and
the stages that it waits for. A task's key is a digest of the meaning of its command line, of its inputs from outside
the run, and of the keys of the tasks that it reads from; so a key changes exactly when the outputs may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from run_contract.errors import UserError
from snakmodel.config.cluster import Resources
from snakmodel.config.sections import PROJECT
from snakmodel.run.markers import judge, marker_path


@dataclass(frozen=True)
class Input:
    """What a task reads from another stage, and how much of it is verified before the task starts."""

    stage: str
    index: int | None = None
    """The index of the task whose outputs are read; None stands for all tasks of the stage."""
    only: tuple[str, ...] = ()
    """The outputs that are read; empty stands for all."""
    full: bool = True
    """Whether checksums are compared; False if the reader itself checks what it reads."""


@dataclass(frozen=True)
class Task:
    """One command line; the paths in `outputs` and `counts` are relative to the run's folder."""

    argv: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    counts: str | None = None
    """The JSON file among the outputs whose content is copied into the done marker."""
    unkeyed: tuple[str, ...] = ()
    """Further arguments that do not change the outputs (workers, devices)."""
    outside: Any = None
    """A value that stands for the inputs from outside the run and for anything else that the outputs depend on."""
    reads: tuple[str, ...] = ()
    """Files from outside the run of which the done marker keeps a digest."""


@dataclass(frozen=True)
class Stage:
    """An array of tasks."""

    name: str
    tasks: tuple[Task, ...]
    resources: Resources
    per_shard: bool = False
    """Whether the stage has one task per shard, so that several tasks may share one array element."""
    resumable: bool = False
    """Whether the command saves its state when it is signalled, and then exits with 75."""
    progress: str | None = None
    """A file with a number that grows as a resumable task gets further."""
    environment: Mapping[str, str] = field(default_factory=dict)
    waits: Mapping[str, Literal["same", "all"]] = field(default_factory=dict)
    """The stages that this one waits for, since its tasks read from them; `Chain.of` fills it in.

    `same` waits task by task, `all` waits for the whole stage.
    """


@dataclass(frozen=True)
class Chain:
    """All stages of a run, in an order in which they can be done, and the keys of their tasks."""

    root: Path
    """The run's folder."""
    stages: tuple[Stage, ...]
    keys: Mapping[str, tuple[str, ...]]
    """Maps the name of a stage to the keys of its tasks."""

    @classmethod
    def of(cls, root: Path, stages: Sequence[Stage]) -> Chain:
        """Check that every stage waits only for earlier ones and for all that it reads, and compute the keys.

        Raises ValueError if the declarations contradict each other.
        """
        keys: dict[str, tuple[str, ...]] = {}
        sizes = {stage.name: len(stage.tasks) for stage in stages}
        complete = []
        for stage in stages:
            waits = _waits(stage, sizes)
            if late := [other for other in waits if other not in keys]:
                raise ValueError(f"stage {stage.name} waits for {late[0]}, which does not come before it")
            keys[stage.name] = tuple(_key(root, task, keys) for task in stage.tasks)
            complete.append(replace(stage, waits=waits))
        return cls(root, tuple(complete), keys)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def stage_keys(self) -> dict[str, str]:
        """One key per stage; see `stage_key`."""
        return {name: stage_key(keys) for name, keys in self.keys.items()}

    def marker_problem(self, stage: str, index: int) -> str | None:
        """Why a task does not count as done, or None if it does.

        Compares the key, and whether the outputs exist with the right sizes, but not their checksums.
        """
        path = marker_path(self.root, stage, index)
        return judge(path, self.root, self.keys[stage][index]).problem if path.exists() else "no marker"

    def marker_problems(self, stage: str) -> list[str | None]:
        """The `marker_problem` of every task of a stage; no file is opened for tasks without a marker."""
        folder = marker_path(self.root, stage, 0).parent
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        paths = ((index, marker_path(self.root, stage, index)) for index in range(len(self.keys[stage])))
        if not there:
            return ["no marker"] * len(self.keys[stage])
        keys = self.keys[stage]
        return [judge(path, self.root, keys[i]).problem if path.name in there else "no marker" for i, path in paths]


def _waits(stage: Stage, sizes: Mapping[str, int]) -> dict[str, Literal["same", "all"]]:
    """What a stage waits for: task by task where each task reads from the task of its own number alone."""
    read: dict[str, list[set[int | None]]] = {}
    for number, task in enumerate(stage.tasks):
        for source in task.inputs:
            if source.stage not in read:
                read[source.stage] = [set() for _ in stage.tasks]
            read[source.stage][number].add(source.index)
    own = [{number} for number in range(len(stage.tasks))]
    return {name: "same" if numbers == own and sizes.get(name) == len(own) else "all" for name, numbers in read.items()}


def _key(root: Path, task: Task, keys: Mapping[str, tuple[str, ...]]) -> str:
    """The key of a task.

    The folders of this machine are taken out of its arguments, so that a moved run keeps its keys.
    """
    read: list[str] = []
    for source in task.inputs:
        read += keys[source.stage] if source.index is None else [keys[source.stage][source.index]]
    return _digest([*_own(root, task), read])


def stage_key(keys: Sequence[str]) -> str:
    """The key of a stage: a digest of the keys of its tasks."""
    return _digest(list(keys))


def meaning(root: Path, task: Task) -> str:
    """A digest of what a task does: the part of its key that does not come from other tasks."""
    return _digest(_own(root, task))


def _own(root: Path, task: Task) -> list[Any]:
    folder, project = str(root), str(PROJECT)
    argv = [argument.replace(folder, "RUN").replace(project, "PROJECT") for argument in task.argv]
    return [argv, list(task.outputs), task.outside]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


_SAMPLE = 1 << 16


def fingerprint(path: Path) -> list[Any]:
    """The name, the size and a digest of the first, middle and last 64 KiB of a file from outside the run.

    This is cheap enough for terabytes on a login node, and copying or touching the file does not change it. Raises
    UserError if the file cannot be read.
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
