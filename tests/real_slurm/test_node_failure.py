"""Daemons that die under a running job: a node's, and the controller's."""

from __future__ import annotations

import os
import signal

import pytest

from .conftest import Cluster, bring_back, stop_controller
from .test_requeue import RESUMABLE, SAVES, STEPS, kinds, node_of, ready
from .toy_run import ToyRun

pytestmark = pytest.mark.slow

ZOMBIE = (
    STEPS
    + """
import json
from run_contract.errors import Superseded
from run_contract.publish import publishing
if not restart:
    ready()
    claim = pathlib.Path(os.environ['SNAKMODEL_CLAIM'])
    while json.loads(claim.read_text())['attempt'] == attempt: time.sleep(0.01)
    try:
        with publishing(root / 'published-by-the-zombie') as (path,): path.write_text('late')
    except Superseded:
        (root / 'save-refused').touch()
    save(); sys.exit(75)
ready()
events = root / 'events.jsonl'
while '"superseded"' not in events.read_text(): time.sleep(0.1)
time.sleep(5); done()
"""
)
"""The first attempt outlives its node's daemon and saves only when a second has begun."""


def test_a_lost_node_and_its_zombie(repaired: Cluster) -> None:
    """The job starts again elsewhere; the first attempt, still alive, may neither publish nor requeue."""
    run = ToyRun.new(repaired, "zombie")
    run.submit([run.stage("save", ZOMBIE, **RESUMABLE)])
    run.until(ready(run), "the command's start")
    lost = node_of(run)
    os.kill(repaired.pid(f"slurmd-{lost}"), signal.SIGKILL)
    run.until(ready(run, 1), "the second attempt", timeout=180)
    assert set(run.finish(timeout=180).values()) == {"COMPLETED"}
    assert (run.root / "save-refused").exists()
    assert not (run.root / "published-by-the-zombie").exists()
    story = run.story("save")
    assert [story[0], story[1], story[-1]] == ["start", "lost", "done"]
    assert sorted(story[2:-1]) == ["start", "superseded"]  # by two nodes, in either order
    assert kinds(run, "save", "lost") == [("lost", "node-failure")]
    assert run.events("save")[1]["node"] == lost
    told = run.told("save", done="1", failed="-", attempts="2")
    assert f"started again after the loss of {lost}; a replaced attempt that still lived was refused" in told
    assert "requeued" not in run.log("save")


def test_the_controller_is_down_when_a_job_requeues(repaired: Cluster) -> None:
    """The driver asks again until the controller is back; then the job is requeued and its dependant runs."""
    run = ToyRun.new(repaired, "controller")
    go = "while not (root / 'go').exists(): time.sleep(0.05)\n"
    first = run.stage("save", STEPS + f"if restart: done()\nready()\n{go}save(); sys.exit(75)\n", **RESUMABLE)
    copy = "from pathlib import Path; import sys; p = Path(sys.argv[1]); p.parent.mkdir(); p.touch()"
    run.submit([first, run.stage("after", copy, waits={"save": "all"})])
    run.until(ready(run), "the command's start")
    stop_controller(repaired)
    run.cluster.run(["touch", str(run.root / "go")])
    run.until(lambda: "; again in" in run.log("save"), "a refused requeue")
    bring_back(repaired)
    assert set(run.finish(timeout=240).values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert run.markers("after") == [0]
    assert "started again after saving its state" in run.told("save", done="1", failed="-", attempts="2")
    assert run.told("after", done="1", attempts="1")


def test_the_controller_restarts_under_a_chain(repaired: Cluster) -> None:
    """With the controller stopped and restarted while the first stage runs, the chain ends as if nothing had been."""
    run = ToyRun.new(repaired, "restart")
    copy = "from pathlib import Path; import sys; p = Path(sys.argv[1]); p.parent.mkdir(); p.touch()"
    run.submit([run.stage("save", SAVES, **RESUMABLE), run.stage("after", copy, waits={"save": "all"})])
    run.until(ready(run), "the command's start")
    stop_controller(repaired)
    bring_back(repaired)
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish(timeout=240).values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert run.markers("after") == [0]
    assert "started again after a signal" in run.told("save", done="1", failed="-", attempts="2")
    assert "every task is done" in run.status()
