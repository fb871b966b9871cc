"""Jobs that are stopped, preempted, killed or hang on a real cluster, and what their driver makes of it.

The commands are small; a resumable one counts up in the file `progress` and saves when it is signalled.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from .conftest import Cluster
from .toy_run import ToyRun

STEPS = """
import os, pathlib, signal, sys, time
output = pathlib.Path(sys.argv[1]); root = output.parent.parent; output.parent.mkdir(exist_ok=True)
progress = root / 'progress'
rank, attempt = os.environ['RANK'], os.environ['SNAKMODEL_ATTEMPT']
restart = int(attempt.rsplit('r', 1)[1])
signalled = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda n, f: signalled.append(n))
def save():
    if rank == '0':
        (root / 'progress.tmp').write_text(str((int(progress.read_text()) if progress.exists() else 0) + 1))
        (root / 'progress.tmp').replace(progress)
def ready():
    (root / f'ready-{restart}-{rank}').touch()
def wait_for_signal():
    ready()
    while not signalled: time.sleep(0.05)
def done():
    if rank == '0': output.write_text('done')
    sys.exit(0)
"""
SAVES = STEPS + "if restart: done()\nwait_for_signal(); save(); print('saved'); sys.exit(75)\n"
"""Saves when it is signalled, at its second start is done."""
RESUMABLE = {"resumable": True, "progress": "progress"}


def ready(run: ToyRun, restart: int = 0, rank: int = 0) -> Callable[[], bool]:
    return (run.root / f"ready-{restart}-{rank}").exists


def kinds(run: ToyRun, stage: str, *events: str, pack: int = 0) -> list[tuple[str, str]]:
    """(event, kind) of these events of a pack, in order."""
    return [(one["event"], one.get("kind", "")) for one in run.events(stage, pack) if one["event"] in events]


@contextmanager
def partition(cluster: Cluster, **settings: str) -> Iterator[None]:
    """Other settings of the partition `cpu` for a while."""
    change = ["scontrol", "update", "PartitionName=cpu"]
    cluster.run([*change, *(f"{name}={value}" for name, value in settings.items())], as_root=True)
    try:
        yield
    finally:
        cluster.run([*change, "PreemptMode=REQUEUE", "GraceTime=0"], as_root=True)


def node_of(run: ToyRun) -> str:
    """Node of the run's first job."""
    return run.cluster.run(["squeue", "-h", "-j", run.jobs()[0], "-o", "%N"]).stdout.strip()


def preempt(run: ToyRun, seconds: int = 1) -> None:
    """Take the node of the run's first job for a job of the higher partition."""
    wrap = ["--partition=urgent", "--exclusive", "--nodelist", node_of(run), "--output=/dev/null"]
    run.cluster.submit(*wrap, f"--wrap=sleep {seconds}", cwd=run.folder)


def test_a_notice_is_followed_by_a_save_and_a_requeue(cluster: Cluster) -> None:
    """USR2 (here by scancel) makes the command save and exit 75; the job is requeued, and its dependant then runs."""
    run = ToyRun.new(cluster, "notice")
    touch = "from pathlib import Path; import sys; p = Path(sys.argv[1]); p.parent.mkdir(); p.touch()"
    after = run.stage("after", touch, waits={"save": "all"})
    run.submit([run.stage("save", SAVES, **RESUMABLE), after])
    run.until(ready(run), "the command's start")
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish().values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert kinds(run, "save", "requeue") == [("requeue", "requested")]
    assert run.markers("after") == [0]
    assert "saved" in run.log("save")
    assert run.log("save").count("=== save task 0 | attempt") == 2, "one log, a banner an attempt"
    assert "started again after a signal" in run.told("save", done="1", failed="-", attempts="2")


@pytest.mark.parametrize(
    ("mode", "grace", "progress"),
    [("REQUEUE", 0, None), ("REQUEUE", 20, "1"), ("CANCEL", 20, "1")],
)
def test_preemption(cluster: Cluster, mode: str, grace: int, progress: str | None) -> None:
    """A job that loses its node to a higher partition is requeued and done later; with GraceTime it has saved."""
    run = ToyRun.new(cluster, f"preempt-{mode}-{grace}")
    with partition(cluster, PreemptMode=mode, GraceTime=str(grace)):
        run.submit([run.stage("save", SAVES, **RESUMABLE)])
        run.until(ready(run), "the command's start")
        preempt(run)
        assert set(run.finish().values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"], run.everything()
    [*_, (_, kind)] = kinds(run, "save", "requeue", "explained")
    assert kind == "preempted", run.everything()
    assert "started again after preemption" in run.told("save", done="1", failed="-", attempts="2")
    if progress:
        assert (run.root / "progress").read_text() == progress


def test_a_requeue_by_the_user_is_no_preemption(cluster: Cluster) -> None:
    """`scontrol requeue` of a running job is told as that, in a partition whose jobs are preempted by requeueing."""
    run = ToyRun.new(cluster, "user-requeue")
    run.submit([run.stage("save", SAVES, **RESUMABLE)])
    run.until(ready(run), "the command's start")
    run.cluster.run(["scontrol", "requeue", f"{run.jobs()[0]}_0"])
    assert set(run.finish().values()) == {"COMPLETED"}
    [*_, (_, kind)] = kinds(run, "save", "requeue", "explained")
    assert kind == "requeued", run.everything()
    assert "started again after scontrol requeue" in run.told("save", done="1", failed="-", attempts="2")


def test_scancel_does_not_requeue(cluster: Cluster) -> None:
    """A job that its user cancels stays cancelled, and the event says so."""
    run = ToyRun.new(cluster, "scancel")
    run.submit([run.stage("save", SAVES, **RESUMABLE)])
    run.until(ready(run), "the command's start")
    run.cluster.run(["scancel", run.jobs()[0]])
    assert set(run.finish().values()) == {"CANCELLED"}
    run.until(lambda: len(run.story("save")) == 2, "the driver's last event", timeout=10)
    assert kinds(run, "save", "cancelled", "requeue") == [("cancelled", "cancelled")]
    assert run.markers("save") == []
    assert "missing: cancelled" in run.told("save", failed="-", missing="1", attempts="1")


def test_a_killed_command_is_a_crash(cluster: Cluster) -> None:
    """A command killed with SIGKILL is run again as a crash, although its node and its job are well."""
    run = ToyRun.new(cluster, "sigkill")
    run.submit(
        [
            run.stage(
                "save", STEPS + "if restart: done()\n(root / 'pid').write_text(str(os.getpid()))\nwait_for_signal()\n"
            )
        ]
    )
    run.until((run.root / "ready-0-0").exists, "the command's start")
    os.kill(int((run.root / "pid").read_text()), signal.SIGKILL)
    assert set(run.finish().values()) == {"COMPLETED"}
    assert kinds(run, "save", "crash", "requeue") == [("crash", "crash"), ("requeue", "crash")]
    assert run.events("save")[2]["codes"] == {"0": -9}
    assert "started again after a crash" in run.told("save", done="1", failed="-", attempts="2")


def test_one_failing_rank_is_a_crash_although_the_others_save(cluster: Cluster) -> None:
    """{75, 1} over two nodes: the peer saves at srun's TERM and srun's own code says 75, yet it counts as a crash."""
    script = STEPS + (
        "if restart: done()\nif rank == '1':\n"
        "    ready()\n"
        "    while not (root / 'ready-0-0').exists(): time.sleep(0.05)\n"
        "    sys.exit(1)\n"
        "wait_for_signal(); save(); sys.exit(75)\n"
    )
    run = ToyRun.new(cluster, "one-rank")
    run.submit([run.stage("save", script, resources={"nodes": 2}, **RESUMABLE)])
    assert set(run.finish().values()) == {"COMPLETED"}
    assert kinds(run, "save", "crash", "requeue") == [("crash", "crash"), ("requeue", "crash")]
    assert run.events("save")[2]["codes"] == {"0": 75, "1": 1}
    assert len(run.events("save")[2]["nodes"]) == 1
    assert (run.root / "progress").read_text() == "1"
    assert "started again after a crash" in run.told("save", done="1", failed="-", attempts="2")


def test_a_hung_command_is_dumped_and_run_again(cluster: Cluster) -> None:
    """Without a log line or an iteration for the time allowed the stack goes to the log, and the job is requeued."""
    script = STEPS + "def stuck_here(): time.sleep(600)\nif restart: done()\nready(); stuck_here()\n"
    run = ToyRun.new(cluster, "hung", retries={"hung_minutes": 0.2})
    run.submit([run.stage("save", script, **RESUMABLE)])
    assert set(run.finish().values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "hung", "crash", "requeue", "start", "done"]
    assert kinds(run, "save", "requeue") == [("requeue", "hung")]
    assert "in stuck_here" in run.log("save")
    assert "started again after a hang" in run.told("save", done="1", failed="-", attempts="2")


def test_workers_ignore_the_notice(cluster: Cluster) -> None:
    """`scancel --signal=USR2` reaches live DataLoader workers and a pool too; they go on and the parent saves.

    The workers are started as the engine starts its own: with shield_worker.
    """
    script = STEPS + (
        "import multiprocessing\n"
        "if restart: done()\n"
        "from torch.utils.data import DataLoader\n"
        "from megatron_llm.process.signals import shield_worker\n"
        "loader = DataLoader(list(range(64)), 2, num_workers=2, worker_init_fn=shield_worker, prefetch_factor=1)\n"
        "with multiprocessing.get_context('fork').Pool(2, shield_worker) as pool:\n"
        "    batches = iter(loader); first = next(batches).tolist()\n"
        "    pool.map(abs, range(8)); wait_for_signal()\n"
        "    assert pool.map(abs, range(-8, 0)) == list(range(8, 0, -1))\n"
        "    assert first + [n for batch in batches for n in batch.tolist()] == list(range(64))\n"
        "    pool.close(); pool.join()\n"
        "save(); sys.exit(75)\n"
    )
    run = ToyRun.new(cluster, "workers")
    run.submit([run.stage("save", script, **RESUMABLE)])
    run.until(ready(run), "the command's start")
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish().values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"], run.everything()
    assert (run.root / "progress").read_text() == "1"
    assert "started again after a signal" in run.told("save", done="1", failed="-", attempts="2")


def test_one_bad_shard(cluster: Cluster) -> None:
    """One shard always crashes: it fails after the budget, the others finish, what waits for it is cancelled.

    After the repair that shard and what waits for it are run, and nothing else.
    """
    script = (
        STEPS + "if output.name == '1.txt' and not (root / 'repaired').exists(): sys.exit('broken shard')\n"
        "output.write_text('done')\n"
    )
    copy = "from pathlib import Path; import sys; p = Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.touch()"
    run = ToyRun.new(cluster, "bad-shard")
    first = run.stage("first", script, tasks=3)
    second = run.stage("second", copy, tasks=3, waits={"first": "same"})
    last = run.stage("last", copy, waits={"second": "all"})
    run.submit([first, second, last])
    states = run.finish()
    a, b, c = run.jobs()
    assert [states[f"{a}_{i}"] for i in range(3)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [states[f"{b}_{i}"] for i in range(3)] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert "CANCELLED" in states[next(job for job in states if job.startswith(c))]
    assert [one for one in run.story("first", 1) if one in ("start", "crash", "failed")] == ["start", "crash"] * 3 + [
        "failed"
    ]
    assert "broken shard" in run.log("first", 1)
    assert "failed: 3 attempts in a row got nothing further" in run.told("first", done="2", failed="1", attempts="3")
    assert "blocked: because first failed" in run.told("second", done="2", failed="-", blocked="1")
    assert "blocked: because first failed" in run.told("last", failed="-", blocked="1")
    assert "| broken shard" in run.status()
    run.cluster.run(["touch", str(run.root / "repaired")])
    again = run.submit([first, second, last])
    assert [(one["stage"], one["packs"]) for one in again] == [("first", [1]), ("second", [1]), ("last", [0])]
    assert {
        state for job, state in run.finish().items() if job.split("_")[0] in {str(one["job"]) for one in again}
    } == {"COMPLETED"}
    assert run.markers("second") == [0, 1, 2]
    assert "started again after a crash (2 times)" in run.told("first", done="3", failed="-", attempts="4")
    assert "every task is done" in run.status()


def test_a_bad_node_is_avoided(cluster: Cluster) -> None:
    """After two crashes on one node the job is kept off it, with an event, and is done elsewhere."""
    run = ToyRun.new(cluster, "bad-node")
    run.submit([run.stage("save", STEPS + "if restart < 2: sys.exit(1)\ndone()\n")])
    assert set(run.finish().values()) == {"COMPLETED"}
    first, second, third = (one["node"] for one in run.events("save") if one["event"] == "start")
    assert first == second != third
    assert [one["nodes"] for one in run.events("save") if one["event"] == "excluded"] == [[first]]
    assert f"kept off {first} after repeated failures there" in run.told("save", done="1", attempts="3")


@pytest.mark.slow
def test_a_time_limit_that_is_too_short(cluster: Cluster) -> None:
    """Three attempts in a row that are signalled to stop before they got further end the job with that reason."""
    run = ToyRun.new(cluster, "too-short")
    run.submit([run.stage("save", STEPS + "wait_for_signal(); sys.exit(75)\n", **RESUMABLE)])
    for restart in range(3):
        run.until(ready(run, restart), f"start {restart}")
        run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish().values()) == {"FAILED"}
    assert run.story("save") == ["start", "requeue", "start", "requeue", "start", "failed"]
    assert run.events("save")[-1]["reason"].startswith("time limit too short: 3 attempts")
    assert "failed: time limit too short: 3 attempts" in run.told("save", failed="1", attempts="3")


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_time_limit(cluster: Cluster, ignored: bool) -> None:
    """Before the limit the notice makes the command save; if it is ignored, the driver requeues at the limit's TERM."""
    script = SAVES.replace("save(); print('saved'); sys.exit(75)", "time.sleep(600)") if ignored else SAVES
    run = ToyRun.new(cluster, f"limit-{ignored}", slurm={"signal_seconds": 5})
    run.submit([run.stage("save", script, resources={"minutes": 2}, **RESUMABLE)])
    assert set(run.finish(timeout=330).values()) == {"COMPLETED"}
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert kinds(run, "save", "requeue") == [("requeue", "timeout")]
    assert (run.root / "progress").exists() is not ignored
    assert "started again after its time limit" in run.told("save", done="1", failed="-", attempts="2")
