"""The file between the launcher and its jobs: a stage's commands, written before anything is submitted.

Launcher (slurm.py, local.py) -> task list -> driver.py -> supervise.py -> the command. It is found by its path alone:
a job needs nothing that the launcher does after sbatch. This module imports nothing heavy, since every job reads it.
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
    """What a task reads of another stage: see stage.Input."""

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
    """What the key says of the task itself, without the tasks that it reads from."""
    reads: list[str] = field(default_factory=list)
    """Files from outside the run of which the marker keeps a digest."""


@dataclass(frozen=True)
class ContainerSpec:
    """What a rank's command runs in: see config.Container."""

    runtime: str
    image: str
    binds: list[str]
    """SOURCE:TARGET[:ro], all of them."""
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
    """Working directory of the commands."""
    python: str
    """What stands for `python` in the commands."""
    ranks_per_node: int
    nodes: int
    cpus: int
    packs: list[list[int]]
    """Array index -> tasks that the job works through."""
    tasks: list[TaskSpec]
    keys: dict[str, list[str]]
    """Keys of the stages that are read."""
    without_progress: int
    crashes: int
    resumable: bool = False
    progress: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    srun_args: list[str] = field(default_factory=list)
    interface: str | None = None
    logs: str = ""
    """Folder of the stage's logs, one file a pack."""
    container: ContainerSpec | None = None
    signal_seconds: int = 0
    """Notice before the time limit."""
    hung_seconds: float = 1800
    """A step of which nothing is seen for so long is killed."""

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.run)

    @property
    def ranks(self) -> int:
        """Processes over all nodes."""
        return self.nodes * self.ranks_per_node

    def marker_path(self, stage: str, index: int) -> Path:
        """Where the done marker of a task lies."""
        return marker_path(self.root, stage, index)

    def is_done(self, index: int) -> bool:
        """Whether a task's marker exists, is of this very command and agrees with the sizes on disk."""
        return judge(self.marker_path(self.stage, index), self.root, self.tasks[index].key).problem is None

    @classmethod
    def read(cls, path: Path) -> TaskList:
        """Read a task list. Raises UserError when it is not one."""
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
    """A field as JSON, a list with one item a line. (`asdict` and `indent` take seconds for 10,000 tasks.)"""
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=vars)
    items = [json.dumps(item, ensure_ascii=False, default=vars) for item in value]
    return "[\n" + ",\n".join(items) + "\n]"
