"""A queue that is too small for the chain: packing, continuation jobs and waiting, under a real QOS limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import toy

from .conftest import REPOSITORY, Cluster
from .queue_run import QueueRun

READ = (
    "from snakmodel.config import Cluster; from snakmodel.limits import read_limits\n"
    "one = read_limits(Cluster(), ['']); print(one.array_size, one.tightest, one.running, one.message_timeout)"
)


@contextmanager
def submit_limit(cluster: Cluster, most: int, running: int = -1) -> Iterator[None]:
    """Nobody may have more than `most` jobs queued and `running` of them running, for the duration of the body."""
    names = ("MaxSubmitJobsPerUser", "MaxJobsPerUser")

    def modify(*values: int) -> None:
        changes = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        cluster.run(["sacctmgr", "-i", "modify", "qos", "normal", "set", *changes], as_root=True)

    modify(most, running)
    try:
        yield
    finally:
        modify(-1, -1)


def wait_until(run: QueueRun, stage: str, markers: int, timeout: float) -> None:
    """Wait until a stage has so many done markers and nothing of this user is queued any more."""
    end = time.monotonic() + timeout
    ended = ("COMPLETED", "FAILED", "CANCELLED")
    while run.markers(stage) < markers or any(row["State"] not in ended for row in run.cluster.squeue()):
        assert time.monotonic() < end, run.everything()
        time.sleep(0.5)


def test_limits_are_read_from_slurm(cluster: Cluster) -> None:
    """The QOS's limits, what this user has queued of them, MaxArraySize and the message timeout come from Slurm."""
    folder = cluster.workdir("read-limits")
    job = cluster.submit("--hold", "--array=0-4", "--wrap=true", cwd=folder)
    try:
        free = cluster.run([sys.executable, "-c", READ], cwd=REPOSITORY).stdout
        assert free.startswith("20001 MaxJobCount = 200000, ")
        assert free.endswith(" None 10.0\n")
        with submit_limit(cluster, 20, running=7):
            found = cluster.run([sys.executable, "-c", READ], cwd=REPOSITORY).stdout
        assert found == "20001 MaxSubmitJobsPerUser of QOS normal = 20, 5 of it in use 7 10.0\n"
    finally:
        cluster.run(["scancel", job])


@pytest.mark.slow
def test_chain_is_packed_into_the_queue(cluster: Cluster) -> None:
    """Two stages of 60 shards and one more task under a limit of 20: packs of 7, three sbatch calls, all done."""
    run = QueueRun.new(cluster, "packed", 60, pack=0)
    with submit_limit(cluster, 20):
        run.launch()
        assert [len(one["packs"]) for one in run.submissions()] == [9, 9, 1]
        wait_until(run, "last", 1, timeout=420)
    assert run.done()


@pytest.mark.slow
def test_rest_follows_by_continuation(cluster: Cluster) -> None:
    """60 tasks that cannot be packed under a limit of 20: continuation jobs submit the rest; each runs once."""
    run = QueueRun.new(cluster, "continued", 60, stages=1)
    with submit_limit(cluster, 20):
        run.launch()
        assert [(one["stage"], len(one["packs"])) for one in run.submissions()] == [("first", 19), ("continuation", 1)]
        wait_until(run, "first", 60, timeout=420)
    assert run.starts() == [("first", pack) for pack in range(60)], run.everything()
    assert run.launch().stdout == ""


@pytest.mark.slow
def test_continuation_gives_up_what_failed(cluster: Cluster) -> None:
    """A task that failed is not submitted again by the continuation, nor what waits for it; the others are done."""
    script = "import sys\nif '1.txt' in sys.argv[1]: sys.exit(2)\n" + toy.PUBLISH
    run = QueueRun.new(cluster, "gives-up", 4, script=script)
    with submit_limit(cluster, 4):
        run.launch()
        wait_until(run, "second", 3, timeout=180)
    assert run.starts().count(("first", 1)) == 1
    assert run.markers("first") == 3
    assert run.markers("last") == 0


def test_waiting_for_room(cluster: Cluster) -> None:
    """--wait-for-room says which limit it waits for and submits the rest when there is room, without a continuation."""
    run = QueueRun.new(cluster, "waits", 4, stages=1)
    with submit_limit(cluster, 3):
        done = run.launch("--wait-for-room", timeout=180)
        assert "waiting for room: MaxSubmitJobsPerUser of QOS normal = 3, 3 of it in use" in done.stdout
        wait_until(run, "first", 4, timeout=120)
    assert {one["stage"] for one in run.submissions()} == {"first"}
    assert run.starts() == [("first", pack) for pack in range(4)]


def test_no_room_at_all_is_refused(cluster: Cluster) -> None:
    """With the queue full of other jobs nothing is submitted, and the message names the limit and the way out."""
    run = QueueRun.new(cluster, "no-room", 4)
    job = cluster.submit("--hold", "--array=0-4", "--wrap=true", cwd=run.folder)
    try:
        with submit_limit(cluster, 6):
            done = run.launch(check=False)
    finally:
        cluster.run(["scancel", job])
    assert done.returncode == 2
    assert "no room in the queue: MaxSubmitJobsPerUser of QOS normal = 6, 5 of it in use" in done.stderr
    assert "--wait-for-room" in done.stderr
    assert run.submissions() == []
