"""Checks that what a task reads of other tasks is whole, before the task starts."""

from __future__ import annotations

from snakmodel.run import reads
from snakmodel.run.markers import Marker, judge
from snakmodel.run.task_list import InputSpec, TaskList


class TaskInputs:
    """The inputs of a stage's tasks, and the markers of those that were found whole."""

    def __init__(self, tasks: TaskList) -> None:
        self.tasks = tasks
        self.markers: dict[tuple[str, int], Marker] = {}
        """Maps (stage, task) to the marker of a task whose outputs are read."""

    def problem(self, index: int) -> str | None:
        """What is wrong with the inputs of a task, or None: their markers and, where asked for, full checksums."""
        for source in self.tasks.tasks[index].inputs:
            for number in reads.numbers(self.tasks, source):
                if problem := self._problem_of(source, number):
                    remedy = "Run jobs/submit_all.py again: it redoes what is missing."
                    return f"input from stage {source.stage}, task {number}: {problem}. {remedy}"
        return None

    def _problem_of(self, source: InputSpec, number: int) -> str | None:
        path, key = self.tasks.marker_path(source.stage, number), self.tasks.keys[source.stage][number]
        found = judge(path, self.tasks.root, key, full=source.full, only=source.only)
        if found.marker is None:
            return "it has no readable done marker"
        if found.marker.key != key:
            return "its done marker is of another command or other inputs"
        self.markers[source.stage, number] = found.marker
        if found.problem and source.full:
            path.unlink(missing_ok=True)
            return f"{found.problem}; its marker was removed"
        return found.problem
