"""The files that a driver and its ranks leave for each other in an attempt's folder."""

from __future__ import annotations

from pathlib import Path

from snakmodel.run.task_list import TaskList

FORWARD_VARIABLE = "SNAKMODEL_FORWARD"
"""Set by the driver if it alone signals this process; under Slurm, the command itself is signalled as well."""


HEARTBEAT_VARIABLE = "SNAKMODEL_HEARTBEAT"
"""Names the file in which a command may note where it is: {"phase": …, "iteration": …}."""


def started_path(folder: Path, task: int) -> Path:
    """The file whose existence shows that rank 0 of a task has been started."""
    return folder / f"task-{task:05d}.started"


def hung_path(folder: Path, task: int) -> Path:
    """The file whose existence signals to all ranks of a task that the watchdog has given the task up."""
    return folder / f"task-{task:05d}.hung"


def alive_path(folder: Path, task: int, rank: int) -> Path:
    """The heartbeat file of a rank. A command may write it to note where it is.

    The supervisor of a task with a single process touches it while that process is busy.
    """
    return folder / f"task-{task:05d}.rank-{rank:04d}.alive"


def read_progress(tasks: TaskList) -> int | None:
    """The number in the stage's progress file, or None if there is none."""
    if tasks.progress is None:
        return None
    try:
        return int((tasks.root / tasks.progress).read_text())
    except (OSError, ValueError):
        return None
