"""Daemons that die under a running job: a node's, and the controller's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Cluster, devcluster
from .test_requeue import RESUMABLE, SAVES, STEPS, kinds, node_of, ready
from .toy_run import ToyRun

pytestmark = pytest.mark.slow

ZOMBIE = (
    STEPS
    + """
import json
from snakmodel.publish import Superseded, publishing
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


@pytest.fixture
def repaired(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with all daemons back at the end."""
    yield cluster
    up = devcluster("up", cluster.folder)
    assert up.returncode == 0, up.stdout + up.stderr


def stop_controller(cluster: Cluster) -> None:
    """End slurmctld as an administrator does: killed outright it would forget jobs that it accepted a moment ago."""
    pid = cluster.pid("slurmctld")
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "slurmctld did not end"
        time.sleep(0.1)


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
    assert run.story("save") == ["start", "lost", "start", "superseded", "done"]
    assert kinds(run, "save", "lost") == [("lost", "node-failure")]
    assert run.events("save")[1]["node"] == lost
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
    up = devcluster("up", repaired.folder)
    assert up.returncode == 0, up.stdout + up.stderr
    assert set(run.finish(timeout=240).values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert run.markers("after") == [0]


def test_the_controller_restarts_under_a_chain(repaired: Cluster) -> None:
    """With the controller stopped and restarted while the first stage runs, the chain ends as if nothing had been."""
    run = ToyRun.new(repaired, "restart")
    copy = "from pathlib import Path; import sys; p = Path(sys.argv[1]); p.parent.mkdir(); p.touch()"
    run.submit([run.stage("save", SAVES, **RESUMABLE), run.stage("after", copy, waits={"save": "all"})])
    run.until(ready(run), "the command's start")
    stop_controller(repaired)
    up = devcluster("up", repaired.folder)
    assert up.returncode == 0, up.stdout + up.stderr
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish(timeout=240).values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert run.markers("after") == [0]
