"""One attempt at one pack of tasks: where its files lie, how far the pack is, and the events that it leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from run_contract.output import say
from snakmodel.run.attempt_files import read_progress
from snakmodel.run.attempts import Attempt, log_event
from snakmodel.run.task_list import TaskList


@dataclass(frozen=True)
class PackAttempt:
    """What the parts of a driver share: which attempt this is, and of which pack."""

    tasks: TaskList
    pack: int
    attempt: Attempt
    on_slurm: bool
    """Whether this process runs in a Slurm job."""
    node: str
    before: int = field(init=False)
    """The pack's progress when the attempt began."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", self.progress())

    @classmethod
    def current(cls, tasks: TaskList, pack: int) -> PackAttempt:
        """The attempt that this process makes."""
        node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        return cls(tasks, pack, Attempt.current(), "SLURM_JOB_ID" in os.environ, node)

    @property
    def all_attempts(self) -> Path:
        """The folder that holds a folder for each attempt at the pack."""
        return self.tasks.root / "attempts" / self.tasks.stage / f"{self.pack:05d}"

    @property
    def folder(self) -> Path:
        """The folder of this attempt."""
        return self.all_attempts / self.attempt.name

    def progress(self) -> int:
        """A number that grows with the pack's progress: a resumable stage's iteration, else the count of done tasks."""
        if self.tasks.progress is not None:
            return read_progress(self.tasks) or 0
        return sum(self.tasks.is_done(index) for index in self.tasks.packs[self.pack])

    def log(self, event: str, **details: object) -> None:
        """Append an event of this attempt to the run's events; one that cannot be written is only reported."""
        root, stage = self.tasks.root, self.tasks.stage
        try:
            log_event(root, stage, event, pack=self.pack, attempt=self.attempt.name, **details)
        except OSError as error:
            say(f"event {event} could not be written: {error}")
