"""Jobs by hand that work through several tasks: they end, come back and are seen as the launcher's jobs are."""

from __future__ import annotations

import sys
import time

import pytest

from snakmodel.chain.stage import Stage

from .conftest import PATIENCE, REPOSITORY, Cluster
from .hand_run import submit_by_hand
from .test_requeue import STEPS
from .toy_run import ToyRun

WAITS = STEPS + "ready(); wait_for_signal(); sys.exit(75)\n"
"""Waits until it is signalled to end."""
SECONDS_TO_COME_BACK = 5
"""A job that asked to be requeued is pending or running by then."""


def two_that_wait(run: ToyRun) -> Stage:
    """A stage of two tasks that work until they are signalled to end, each on a core."""
    return run.stage("wait", WAITS, tasks=2)


def started(run: ToyRun) -> bool:
    """Whether a task of `wait` works."""
    return run.root.is_dir() and any(run.root.glob("ready-*"))


def both_started(run: ToyRun) -> bool:
    """Whether both tasks of `wait` have been started."""
    return len(list(run.root.glob("attempts/wait/*/*/start.json"))) == 2


def field(cluster: Cluster, job: str, name: str) -> str:
    """What `scontrol show job` says of a job."""
    words = cluster.run(["scontrol", "show", "job", job]).stdout.split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def settled(cluster: Cluster, job: str) -> str:
    """The state of a job when it has had the time to come back."""
    end = time.monotonic() + 60 * PATIENCE
    while field(cluster, job, "JobState") in ("RUNNING", "COMPLETING"):
        assert time.monotonic() < end, f"job {job} does not end"
        time.sleep(0.2)
    time.sleep(SECONDS_TO_COME_BACK)
    return field(cluster, job, "JobState")


def test_scancel_does_not_bring_it_back(cluster: Cluster) -> None:
    """A job by hand that its user cancels stays cancelled, says so, and its tasks are not called failed."""
    run = ToyRun.new(cluster, "hand-scancel")
    job = submit_by_hand(run, [two_that_wait(run)])
    run.until(lambda: started(run), "a task's start")
    cluster.run(["scancel", job])
    assert settled(cluster, job) == "CANCELLED"
    assert field(cluster, job, "Restarts") == "0"
    assert [one["event"] for one in run.events("wait") if "pack" not in one] == ["submit", "cancelled"], (
        run.everything()
    )
    assert "cancelled" in run.told("wait", failed="-", missing="2")


def test_a_job_that_may_not_be_requeued_ends(cluster: Cluster) -> None:
    """Where Slurm refuses for good, the job says so and ends: it does not ask for ever."""
    run = ToyRun.new(cluster, "hand-no-requeue")
    job = submit_by_hand(run, [two_that_wait(run)], "--no-requeue")
    run.until(lambda: started(run), "a task's start")
    cluster.run(["scancel", "--signal=TERM", "--full", job])
    [row] = cluster.wait([job], "FAILED", "COMPLETED", "CANCELLED")
    assert row["State"] == "FAILED", run.everything()
    words = (run.folder / "hand.out").read_text()
    assert words.count("Slurm refuses to requeue") == 1, words
    assert field(cluster, job, "Restarts") == "0"


def test_it_is_requeued_and_goes_on(cluster: Cluster) -> None:
    """Signalled to end as at its time limit, a job of several tasks comes back and does what is left."""
    run = ToyRun.new(cluster, "hand-requeue")
    script = STEPS + "if restart: done()\nready(); wait_for_signal(); sys.exit(75)\n"
    job = submit_by_hand(run, [run.stage("wait", script, tasks=2)], "--cpus-per-task=2")
    run.until(lambda: both_started(run), "both tasks' start")
    cluster.run(["scancel", "--signal=TERM", "--full", job])
    run.until(lambda: run.markers("wait") == [0, 1], "the tasks' markers")
    assert [row["State"] for row in cluster.wait([job], "COMPLETED", "FAILED", "CANCELLED")] == ["COMPLETED"]
    assert field(cluster, job, "Restarts") == "1"


def test_status_cancel_and_the_launcher_know_of_it(cluster: Cluster) -> None:
    """Its tasks are shown as running, are not submitted a second time, and are cancelled with the run."""
    run = ToyRun.new(cluster, "hand-known")
    stage = two_that_wait(run)
    job = submit_by_hand(run, [stage], "--cpus-per-task=2")
    run.until(lambda: both_started(run), "both tasks' start")
    assert {line["job"] for line in run.submissions()} == {job}
    shown = run.status()
    assert "not queued" not in shown
    run.told("wait", running="2", pending="-", failed="-")
    assert run.submit([stage]) == [], "the launcher submitted what runs by hand"
    cancelled = cluster.run(
        [sys.executable, str(REPOSITORY / "jobs" / "cancel.py"), str(run.root), "--yes"], timeout=120
    ).stdout
    assert f"wait: job {job}: " in cancelled
    assert "Nothing to cancel" not in cancelled
    assert settled(cluster, job) == "CANCELLED"
    assert "cancelled" in run.told("wait", failed="-", missing="2")


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_ranks_get_their_claim_whatever_sbatch_exports(cluster: Cluster, how: str) -> None:
    """Under --export=NONE, and at sites that set SLURM_EXPORT_ENV, a rank still knows its attempt and its claim."""
    run = ToyRun.new(cluster, f"hand-export-{how}")
    script = STEPS + "output.write_text(f\"{attempt} {os.environ['SNAKMODEL_CLAIM']}\")\n"
    flags = ("--export=NONE",) if how == "flag" else ()
    setup = "export SLURM_EXPORT_ENV=NONE" if how == "variable" else ""
    job = submit_by_hand(run, [run.stage("one", script)], *flags, setup=setup)
    assert [row["State"] for row in cluster.wait([job], "COMPLETED", "FAILED")] == ["COMPLETED"], run.everything()
    words = (run.root / "one" / "0.txt").read_text()
    assert words == f"{job}.r0 {run.root / 'claims' / 'one' / '00000.json'}"
    assert run.markers("one") == [0]
