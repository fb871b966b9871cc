"""The files that a driver and its ranks leave for each other in an attempt's folder."""

from __future__ import annotations

from pathlib import Path

from snakmodel.run.task_list import TaskList

FORWARD_VARIABLE = "SNAKMODEL_FORWARD"
"""Set by the driver when it is the only one to signal this process (Slurm signals the command itself as well)."""


HEARTBEAT_VARIABLE = "SNAKMODEL_HEARTBEAT"
"""Names the file in which a command may say where it is: {"phase": …, "iteration": …}."""


def started_path(folder: Path, task: int) -> Path:
    """Shows that rank 0 of a task has been started."""
    return folder / f"task-{task:05d}.started"


def hung_path(folder: Path, task: int) -> Path:
    """Tells all ranks of a task that the watchdog has given it up."""
    return folder / f"task-{task:05d}.hung"


def alive_path(folder: Path, task: int, rank: int) -> Path:
    """Written by a command that says where it is, and touched while the single process of a task is busy."""
    return folder / f"task-{task:05d}.rank-{rank:04d}.alive"


def read_progress(tasks: TaskList) -> int | None:
    """The number in the stage's progress file, if it has one."""
    if tasks.progress is None:
        return None
    try:
        return int((tasks.root / tasks.progress).read_text())
    except (OSError, ValueError):
        return None
