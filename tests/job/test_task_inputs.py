"""What a task reads of other tasks is verified before it starts."""

from __future__ import annotations

import sys
from pathlib import Path

from snakmodel.job.task_inputs import TaskInputs
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.run.markers import Marker, marker_path
from snakmodel.run.task_list import TaskList
from tests import toy


def test_inputs(tmp_path: Path) -> None:
    """Whole, changed without a change of size, of another command, unreadable, and never done."""
    root = tmp_path / "run"
    stages = toy.two_stages(root, shards=2)
    assert LocalScheduler(toy.plan(root, stages[:1])).run() == 0
    plan = toy.plan(root, stages)
    tasks = TaskList.read(plan.write_task_list(plan.chain["second"], sys.executable))
    inputs, path = TaskInputs(tasks), marker_path(root, "first", 0)
    assert inputs.problem(0) is None
    assert list(inputs.markers) == [("first", 0)]
    whole = path.read_bytes()

    (root / "a" / "0.txt").write_text("x" * (root / "a" / "0.txt").stat().st_size)
    problem = str(inputs.problem(0))
    assert problem.startswith("input from stage first, task 0: a/0.txt does not match the checksum in its marker;")
    assert "its marker was removed" in problem
    assert problem.endswith("Run jobs/submit_all.py again: it redoes what is missing.")
    assert not path.exists()

    Marker("another key", {}).write(path)
    assert "its done marker is of another command or other inputs" in str(inputs.problem(0))
    path.write_bytes(whole[:20])
    assert "it has no readable done marker" in str(inputs.problem(0))
    path.unlink()
    assert "it has no readable done marker" in str(inputs.problem(0))
    assert inputs.problem(1) is None
