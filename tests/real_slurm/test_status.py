"""The doctor on a real Slurm: with sacct, without it, after the jobs aged out, and with a silent controller."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests import toy
from tests.monitor.test_status import BROKEN
from tests.toy import row

from .conftest import REPOSITORY, Cluster
from .toy_run import ENDED, ToyRun

RETRY_ONCE = {"retries": {"without_progress": 1}}


def ended(run: ToyRun) -> bool:
    """Whether every job of the run has left the queue, by squeue alone."""
    states = [one["State"] for one in run.cluster.squeue() if one["JobID"].split("_")[0] in run.jobs()]
    return bool(states) and all(state in ENDED for state in states)


def check_failed(output: str, run: ToyRun) -> None:
    """One shard failed, its peers are done, what waits for it is blocked, and its log is quoted."""
    first, second, last = (row(output, stage) for stage in ("first", "second", "last"))
    assert (first["done"], first["failed"], first["blocked"]) == ("2", "1", "-"), output
    assert (second["done"], second["failed"], second["blocked"]) == ("2", "-", "1"), output
    assert (last["failed"], last["blocked"]) == ("-", "1"), output
    assert "because first failed" in output
    assert f"log: {run.folder}/logs/run/first/00001.out" in output
    assert "| broken shard" in output
    assert "exit code 1" in output
    assert "What to do next: repair what the log of first says" in output


def test_failure_story_and_repair(cluster: Cluster) -> None:
    """A failing shard's story is the same with sacct, without, and from the files alone; after repair all is done."""
    run = ToyRun.new(cluster, "doctor", **RETRY_ONCE)
    run.submit(toy.two_stages(run.root, script=BROKEN))
    run.until(lambda: ended(run), "the chain ended")
    check_failed(run.status(), run)
    check_failed(run.status("sacct"), run)
    check_failed(run.status("squeue"), run)
    check_failed(run.status("squeue", "sacct"), run)
    (run.root / "repaired").touch()
    again = run.submit(toy.two_stages(run.root, script=BROKEN))
    assert [(one["stage"], one["packs"]) for one in again] == [("first", [1]), ("second", [1]), ("last", [0])]
    run.until(lambda: len(run.markers("last")) == 1, "the repaired chain ended")
    output = run.status()
    assert "every task is done" in output
    assert [row(output, stage)["done"] for stage in ("first", "second", "last")] == ["3", "3", "1"]


def test_running_waiting_cancelled_held(cluster: Cluster) -> None:
    """Running and waiting tasks are told apart with node and reason; scancelled ones are missing, not failed."""
    run = ToyRun.new(cluster, "waiting")
    run.submit(toy.two_stages(run.root, shards=1, script="import time; time.sleep(600)"))
    run.until(lambda: "start" in run.story("first"), "it started")
    run.until(lambda: "pending: waits for first" in run.status(), "Slurm has looked at the dependencies")
    output = run.status()
    assert row(output, "first")["running"] == "1"
    assert row(output, "first")["node"].startswith("node")
    assert "pending: waits for first" in output
    assert "pending: waits for second" in output
    jobs = run.jobs()
    cluster.run(["scancel", jobs[1], jobs[2]])
    run.until(lambda: "missing: cancelled" in run.status(), "the cancelled stages show")
    cluster.run([sys.executable, str(REPOSITORY / "jobs" / "cancel.py"), str(run.root), "--yes"], timeout=120)
    output = run.status()
    assert [row(output, stage)["failed"] for stage in ("first", "second", "last")] == ["-", "-", "-"]
    assert "What to do next: Run the launcher again" in output


@pytest.mark.slow
def test_without_accounting_and_without_controller(bare: Cluster) -> None:
    """Accounting off: the same story; controller stopped: the files' story and the word that Slurm did not answer."""
    run = ToyRun.new(bare, "bare", **RETRY_ONCE)
    run.submit(toy.two_stages(run.root, script=BROKEN))
    run.until(lambda: ended(run), "the chain ended")
    check_failed(run.status(), run)
    assert "accounting is off" in run.status("squeue")
    waiting = ToyRun.new(bare, "silent")
    waiting.submit(toy.two_stages(waiting.root, shards=1, script="import time; time.sleep(600)"))
    waiting.until(lambda: "start" in waiting.story("first"), "it started")
    controller = bare.pid("slurmctld")
    os.kill(controller, signal.SIGSTOP)
    try:
        output = waiting.status()
        check_failed(run.status(), run)
        cancelled = bare.run(
            [sys.executable, str(REPOSITORY / "jobs" / "cancel.py"), str(waiting.root), "--yes"],
            check=False,
            timeout=120,
        )
    finally:
        os.kill(controller, signal.SIGCONT)
    assert "note: Slurm did not answer" in output
    assert "unknown: start on node1" in output
    assert "What to do next: Slurm does not answer: type `scontrol ping`" in output
    assert cancelled.returncode == 2
    assert "nothing was cancelled" in cancelled.stderr
    assert "Traceback" not in cancelled.stderr
