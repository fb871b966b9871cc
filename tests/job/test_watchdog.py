"""Heartbeats of a command keep the watchdog quiet; a command without any is given up, and who lags behind is said."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from snakmodel.job.watchdog import furthest_behind, newest
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.run.attempt_files import alive_path
from tests import toy

SILENT = (
    "import json, os, pathlib, time\n"
    "def beat(iteration):\n"
    "    path = pathlib.Path(os.environ['SNAKMODEL_HEARTBEAT'])\n"
    "    path.write_text(json.dumps({'phase': 'evaluation', 'iteration': iteration}))\n"
)


def run(root: Path, script: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the events of a resumable task under a watchdog of twelve seconds.

    Even a busy machine does not take so long between two heartbeats.
    """
    stage = replace(toy.two_stages(root, shards=1, script=SILENT + script)[0], resumable=True)
    plan = toy.plan(root, [stage], {"retries": {"hung_minutes": 0.2, "without_progress": 1, "crashes": 1}})
    code = LocalScheduler(plan).run()
    return code, [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def test_a_silent_command_with_heartbeats_is_left_alone(tmp_path: Path) -> None:
    """Longer than the watchdog allows, without a line or an iteration, but with heartbeats: done."""
    script = "for n in range(70):\n    beat(5); time.sleep(0.2)\n" + toy.PUBLISH
    code, events = run(tmp_path / "run", script)
    assert code == 0
    assert [one["event"] for one in events if one["event"] in ("hung", "done")] == ["done"]


def test_a_command_whose_heart_stops_is_given_up(tmp_path: Path) -> None:
    """After one heartbeat nothing: the event says where it was last heard of."""
    code, events = run(tmp_path / "run", "beat(7); time.sleep(600)\n")
    assert code == 1
    reason = next(one["reason"] for one in events if one["event"] == "hung")
    expected = r"no log line, no iteration, no heartbeat for \d+ s; rank 0 was last heard of \d+ s ago in iteration 7"
    assert re.fullmatch(rf"{expected} \(evaluation\)", reason)


def test_the_rank_that_lags_behind_is_named(tmp_path: Path) -> None:
    """Of several ranks the one in the earliest iteration, then the one that was silent longest; others are not read."""
    assert newest(tmp_path, 0) is None
    assert furthest_behind(tmp_path, 0) == ""
    for rank, iteration, written in ((0, 12, 400), (1, 11, 300), (2, 11, 200), (3, 12, 100)):
        path = alive_path(tmp_path, 0, rank)
        path.write_text(json.dumps({"phase": "step", "iteration": iteration}))
        os.utime(path, ns=(0, written * 10**9))
    alive_path(tmp_path, 0, 4).touch()
    os.utime(alive_path(tmp_path, 0, 4), ns=(0, 500 * 10**9))
    alive_path(tmp_path, 1, 0).touch()
    assert newest(tmp_path, 0) == 500 * 10**9
    assert furthest_behind(tmp_path, 0).startswith("rank 2 was last heard of ")
    assert furthest_behind(tmp_path, 0).endswith(" in iteration 11 (step)")
