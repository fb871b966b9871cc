"""Cancelling on a real Slurm: all of a run, one stage of it, and nothing of anybody else."""

from __future__ import annotations

import subprocess
import sys

from tests import toy

from .conftest import REPOSITORY, Cluster
from .toy_run import ENDED, ToyRun

SLEEP = "import time; time.sleep(600)"
SAVES = (
    "import pathlib, signal, sys, time\n"
    "hit = []\n"
    "signal.signal(signal.SIGTERM, lambda *a: hit.append(1))\n"
    "p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True)\n"
    "p.with_name('started').touch()\n"
    "while not hit: time.sleep(0.05)\n"
    "time.sleep(1); p.with_name('saved').touch(); sys.exit(75)\n"
)
"""Saves a second after TERM and asks to be run again."""


def cancel(run: ToyRun, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(REPOSITORY / "jobs" / "cancel.py"), str(run.root), *flags]
    return run.cluster.run(argv, check=False, timeout=200)


def states(run: ToyRun) -> set[str]:
    """States of the run's jobs, by the controller."""
    return {one["State"] for one in run.cluster.squeue() if one["JobID"].split("_")[0] in run.jobs()}


def test_nothing_else_is_cancelled_and_nothing_comes_back(cluster: Cluster) -> None:
    """A run's jobs end and stay ended, one that saves at TERM too; a run of the same name and another job live on."""
    run, other = ToyRun.new(cluster, "cancelled"), ToyRun.new(cluster, "untouched")
    run.submit([run.stage("save", SAVES, resumable=True), *toy.two_stages(run.root, shards=2, script=SLEEP)])
    other.submit(toy.two_stages(other.root, shards=2, script=SLEEP))
    bystander = cluster.submit("--job-name=run-first-0123456789", "--wrap=sleep 600", cwd=cluster.home)
    try:
        run.until(lambda: (run.root / "save" / "started").exists() and "start" in run.story("first", 1), "it runs")
        run.until(lambda: "start" in other.story("first", 1), "the other runs")
        before = states(other)
        refused = cancel(run)
        assert refused.returncode == 2
        assert "Add --yes" in refused.stderr
        assert "save: job" in refused.stdout
        assert "RUNNING" in states(run)
        done = cancel(run, "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert states(run) <= set(ENDED)
        assert (run.root / "save" / "saved").exists(), run.everything()
        assert run.story("save").count("start") == 1, run.everything()
        assert states(other) == before == {"RUNNING", "PENDING"}
        assert [one["State"] for one in cluster.squeue() if one["JobID"] == bystander] == ["RUNNING"]
        assert {one["stage"] for one in run.events() if one["event"] == "cancel"} == {"save", "first", "second", "last"}
        assert "Nothing to cancel" in cancel(run, "--yes").stdout
        again = run.submit([run.stage("save", toy.PUBLISH), *toy.two_stages(run.root, shards=2)])
        assert [one["stage"] for one in again] == ["save", "first", "second", "last"]
        run.until(lambda: (run.root / "c.txt").exists() and run.markers("save") == [0], "the chain went on")
    finally:
        cancel(other, "--yes")
        cluster.run(["scancel", bystander])


def test_one_stage_and_a_lost_journal(cluster: Cluster) -> None:
    """--stage takes that stage's jobs, known by their batch files where the journal is lost; the others stay."""
    run = ToyRun.new(cluster, "one-stage")
    run.submit([run.stage("alone", SLEEP), run.stage("aside", SLEEP)])
    jobs = run.jobs()
    run.until(lambda: run.story("alone") and run.story("aside"), "both run")
    (run.root / "submissions.jsonl").rename(run.root / "lost.jsonl")
    done = cancel(run, "--stage", "alone", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["JobID"]: one["State"] for one in cluster.squeue()}
    assert found[f"{jobs[0]}_0"] in ENDED
    assert found[f"{jobs[1]}_0"] == "RUNNING"
    done = cancel(run, "--yes")
    assert f"aside: job {jobs[1]}: 1 running" in done.stdout
    assert "Nothing to cancel" in cancel(run).stdout
