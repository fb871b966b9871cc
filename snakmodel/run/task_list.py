"""The task list: the file with a stage's commands that the launcher writes for its jobs before it submits them.

It is passed on as a path only, from the launcher (slurm/batch_file.py or launch/local_scheduler.py) to job/driver.py
and from there to job/supervisor.py, which runs the commands. A job needs nothing that the launcher does after sbatch.
This module imports nothing heavy, since every job reads the task list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from run_contract.publish import encoded, write_text
from snakmodel.run.markers import judge, marker_path


@dataclass(frozen=True)
class InputSpec:
    """What a task reads from another stage; see `Input` in chain/stage.py."""

    stage: str
    index: int | None
    only: list[str]
    full: bool


@dataclass(frozen=True)
class TaskSpec:
    """One command line, ready to run."""

    argv: list[str]
    outputs: list[str]
    inputs: list[InputSpec]
    counts: str | None
    key: str
    meaning: str = ""
    """A digest of what the task itself does: the part of its key that does not come from the tasks that it reads
    from."""
    reads: list[str] = field(default_factory=list)
    """The files from outside the run of which the marker keeps a digest."""


@dataclass(frozen=True)
class ContainerSpec:
    """The container that a rank's command runs in; see `Container` in config/cluster.py."""

    runtime: str
    image: str
    binds: list[str]
    """All binds, each as SOURCE:TARGET[:ro]."""
    shm_size: str | None
    python: str
    gpus: bool


@dataclass(frozen=True)
class TaskList:
    """One stage of a run, as its jobs see it."""

    run: str
    """The run's folder."""
    stage: str
    project: str
    """The working directory of the commands."""
    python: str
    """The interpreter that takes the place of `python` in the commands."""
    ranks_per_node: int
    nodes: int
    cpus: int
    packs: list[list[int]]
    """Maps each array index to the tasks that the job works through."""
    tasks: list[TaskSpec]
    keys: dict[str, list[str]]
    """The keys of the tasks of each stage that this one waits for."""
    without_progress: int
    crashes: int
    resumable: bool = False
    progress: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    srun_args: list[str] = field(default_factory=list)
    interface: str | None = None
    logs: str = ""
    """The folder of the stage's logs, with one file per pack."""
    container: ContainerSpec | None = None
    signal_seconds: int = 0
    """The number of seconds before the time limit at which Slurm sends its notice."""
    hung_seconds: float = 1800
    """The number of seconds without a sign of life after which a step is killed."""

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.run)

    @property
    def ranks(self) -> int:
        """The number of processes over all nodes."""
        return self.nodes * self.ranks_per_node

    def marker_path(self, stage: str, index: int) -> Path:
        """The path of a task's done marker."""
        return marker_path(self.root, stage, index)

    def is_done(self, index: int) -> bool:
        """Whether a task's marker exists, belongs to this very command and agrees with the sizes on disk."""
        return judge(self.marker_path(self.stage, index), self.root, self.tasks[index].key).problem is None

    @classmethod
    def read(cls, path: Path) -> TaskList:
        """Read a task list. Raises UserError if the file is not one."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            tasks = [
                TaskSpec(**{**task, "inputs": [InputSpec(**one) for one in task["inputs"]]}) for task in raw["tasks"]
            ]
            container = ContainerSpec(**raw["container"]) if raw.get("container") else None
            return cls(**{**raw, "tasks": tasks, "container": container})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a task list ({error}). Run jobs/submit_all.py again: it writes it anew."
            ) from error

    def write(self, path: Path) -> None:
        """Publish the task list; a file that already says the same is left alone."""
        parts = [f'"{name}": {_lines(value)}' for name, value in vars(self).items()]
        text = "{\n" + ",\n".join(parts) + "\n}\n"
        if not path.exists() or path.read_bytes() != encoded(text):
            write_text(path, text)


def _lines(value: Any) -> str:
    """A field as JSON; a list has one item per line. (`asdict` and `indent` take seconds for 10,000 tasks.)"""
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=vars)
    items = [json.dumps(item, ensure_ascii=False, default=vars) for item in value]
    return "[\n" + ",\n".join(items) + "\n]"
