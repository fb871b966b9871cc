"""A queue that is too small for the chain: packing, continuation jobs and waiting, under a real QOS limit."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import toy

from .conftest import PATIENCE, REPOSITORY, Cluster, bring_back, drained, settings, stop_controller
from .queue_run import QueueRun
from .toy_run import ToyRun

READ = (
    "import sys; from snakmodel.config.cluster import Cluster, Resources\n"
    "from snakmodel.slurm.limits import read_limits\n"
    "from snakmodel.chain.stage import Stage\n"
    "stages = [Stage('a', (), Resources()), Stage('b', (), Resources(qos='few'))]\n"
    "one = read_limits(Cluster(), stages[:int(sys.argv[1])])\n"
    "print(one.array_size, one.tightest, one.width('a'), one.message_timeout)\n"
    "for limit in one.queue[1:]: print(limit, *sorted(limit.stages))\n"
    "print(one.array_tasks, one.width('b'))"
)
"""python -c READ STAGES: what holds for one or two stages, the second of another QOS."""


@pytest.fixture(autouse=True)
def _empty_queue(cluster: Cluster) -> None:
    """What a failed test before has left queued would count here."""
    cluster.run(["scancel", f"--user={cluster.user}"])
    end = time.monotonic() + 60 * PATIENCE
    while cluster.run(["squeue", "--noheader", f"--user={cluster.user}"]).stdout:
        assert time.monotonic() < end, "jobs that were cancelled are still queued"
        time.sleep(0.2)


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


def read(cluster: Cluster, stages: int) -> list[str]:
    """What READ prints."""
    return cluster.run([sys.executable, "-c", READ, str(stages)], cwd=REPOSITORY).stdout.splitlines()


@contextmanager
def another_qos(cluster: Cluster, **limits: str) -> Iterator[None]:
    """A QOS `few` with these limits, which the user may name."""
    manage = ["sacctmgr", "-i"]
    changes = [f"{name}={value}" for name, value in limits.items()]
    cluster.run([*manage, "add", "qos", "few", "set", *changes], as_root=True)
    try:
        cluster.run([*manage, "modify", "user", cluster.user, "set", "qos+=few"], as_root=True)
        yield
    finally:
        cluster.run([*manage, "delete", "qos", "few"], as_root=True)


def wait_until(run: QueueRun, stage: str, markers: int, timeout: float) -> None:
    """Wait until a stage has so many done markers and nothing of this user is queued any more."""
    end = time.monotonic() + timeout * PATIENCE
    ended = ("COMPLETED", "FAILED", "CANCELLED")
    while run.markers(stage) < markers or any(row["State"] not in ended for row in run.cluster.squeue()):
        assert time.monotonic() < end, run.everything()
        time.sleep(0.5)


def test_limits_are_read_from_slurm(cluster: Cluster) -> None:
    """The QOS's limits, what this user has queued of them, MaxArraySize and the message timeout come from Slurm."""
    folder = cluster.workdir("read-limits")
    job = cluster.submit("--hold", "--array=0-4", "--wrap=true", cwd=folder)
    try:
        first, *more = read(cluster, 1)
        assert first.startswith("20001 MaxJobCount = 200000, ")
        assert first.endswith(" None 10.0")
        assert more == ["20001 None"]
        with submit_limit(cluster, 20, running=7):
            first, limit, _ = read(cluster, 1)
        assert first == "20001 MaxSubmitJobsPerUser of QOS normal = 20, 5 of it in use 7 10.0"
        assert limit == "MaxSubmitJobsPerUser of QOS normal = 20, 5 of it in use a"
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
    assert "every task is done" in run.status()


@pytest.mark.slow
def test_rest_follows_by_continuation(cluster: Cluster) -> None:
    """60 tasks that cannot be packed under a limit of 20: continuation jobs submit the rest; each runs once."""
    run = QueueRun.new(cluster, "continued", 60, stages=1)
    with submit_limit(cluster, 20):
        run.launch()
        assert [(one["stage"], len(one["packs"])) for one in run.submissions()] == [("first", 19), ("continuation", 1)]
        assert re.search(r"note: job \d+_0 \(continuation\) is (pending|running) too", run.status()), run.status()
        wait_until(run, "first", 60, timeout=420)
    assert run.starts() == [("first", pack) for pack in range(60)], run.everything()
    assert run.launch().stdout == ""
    assert "every task is done" in run.status()


@pytest.mark.slow
def test_continuation_that_is_requeued(cluster: Cluster) -> None:
    """A continuation job that is started again while it submits takes over its own lock and goes on."""
    run = QueueRun.new(cluster, "requeued", 4, stages=1)
    hold, reached = run.folder / "hold", run.folder / "reached"
    run.wrap("sbatch", f'[ -e {hold} ] && {{ touch {reached}; sleep 600; }}\nexec /usr/bin/sbatch "$@"')
    with submit_limit(cluster, 3):
        with drained(cluster):
            run.launch()
            cluster.run(["touch", str(hold)])
        [job] = [one["job"] for one in run.submissions() if one["stage"] == "continuation"]
        end = time.monotonic() + 120 * PATIENCE
        while not reached.exists():
            assert time.monotonic() < end, run.everything()
            time.sleep(0.2)
        cluster.run(["rm", str(hold)])
        cluster.run(["scontrol", "requeue", f"{job}_0"])
        wait_until(run, "first", 4, timeout=240)
    assert run.starts() == [("first", pack) for pack in range(4)], run.everything()
    assert len(run.submissions()) == len({one["token"] for one in run.submissions()})


@pytest.mark.slow
def test_continuation_runs_the_real_launcher(cluster: Cluster, demo_base: Path) -> None:
    """jobs/submit_all.py under a limit of 3: its continuation jobs run it again until the chosen stages are done."""
    folder = cluster.workdir("real-continuation")
    shutil.copytree(demo_base, folder / "base")
    for path in (folder / "base", *(folder / "base").iterdir()):
        path.chmod(0o755)
    (folder / "cluster.yaml").write_text(f"runs: {folder}/runs\nlogs: {folder}/logs\ndefaults: {{minutes: 20}}\n")
    command = ["env", f"DEMO_BASE={folder}/base", sys.executable, str(REPOSITORY / "jobs" / "submit_all.py")]
    command += ["--cluster", str(folder / "cluster.yaml"), "--scheduler", "slurm", "--until", "dedup-components"]
    run = QueueRun(cluster, folder, folder / "runs" / "demo")
    with submit_limit(cluster, 3):
        out = cluster.run(command, cwd=folder, timeout=120).stdout
        assert "a continuation job submits them when these have ended" in " ".join(out.split())
        wait_until(run, "dedup-components", 1, timeout=420)
    stages = [one["stage"] for one in run.submissions()]
    assert stages.count("continuation") >= 2, stages
    assert len(run.starts()) == len(set(run.starts())), run.everything()
    assert "Nothing was submitted" in cluster.run(command, cwd=folder, timeout=120).stdout


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


def test_limits_of_a_stages_own_qos(cluster: Cluster) -> None:
    """A stage that names another QOS is held to that QOS's limits, MaxJobs narrows its %N, and the others are not."""
    with another_qos(cluster, MaxSubmitJobsPerUser="4", MaxJobsPerUser="2"):
        first, *limits, last = read(cluster, 2)
        assert " None 10.0" in first
        assert limits == ["MaxSubmitJobsPerUser of QOS few = 4, 0 of it in use b"]
        assert last == "20001 2"
        run = ToyRun.new(cluster, "own-qos")
        stages = [run.stage("a", toy.PUBLISH, tasks=4, resources={"qos": "few"}), run.stage("b", toy.PUBLISH, tasks=6)]
        with drained(cluster):
            run.submit(stages)
            rows = cluster.run(["squeue", "--noheader", "--me", "--format=%F %q %K"]).stdout.splitlines()
        assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
        a, b = run.jobs()
        assert sorted(rows) == sorted([f"{a} few 0-3%2", f"{b} normal 0-5%6"])
        with pytest.raises(AssertionError, match=r"does not fit into the queue: MaxSubmitJobsPerUser of QOS few = 4"):
            run.submit([run.stage("c", toy.PUBLISH, tasks=6, resources={"qos": "few"})])


def test_arrays_are_cut(cluster: Cluster) -> None:
    """Under max_array_tasks=3 seven elements are three arrays; what waits for them waits for all three."""
    run = QueueRun.new(cluster, "cut", 7)
    conf = (cluster.folder / "slurm.conf").read_text()
    [parameters] = re.findall(r"SchedulerParameters=\S+", conf)
    with settings(cluster, f"{parameters},max_array_tasks=3"):
        too_many = ["sbatch", "--array=0-3", "--output=/dev/null", "--wrap=true"]
        assert cluster.run(too_many, cwd=run.folder, check=False).returncode != 0
        run.launch()
        first, second, last = (
            [one for one in run.submissions() if one["stage"] == stage] for stage in ("first", "second", "last")
        )
        cut = [[0, 1, 2], [3, 4, 5], [6]]
        assert [one["packs"] for one in first] == [one["packs"] for one in second] == cut
        assert [one["dependency"] for one in second] == [f"aftercorr:{one['job']}" for one in first]
        assert last[0]["dependency"] == ",".join(f"afterok:{one['job']}" for one in second)
        wait_until(run, "last", 1, timeout=120)
    assert run.done()


@pytest.mark.slow
def test_limits_without_accounting(bare: Cluster) -> None:
    """Accounting off: MaxJobCount, which counts ended jobs too, is what a chain is packed into; it runs and is told."""
    conf = bare.folder / "slurm.conf"
    conf.write_text(re.sub(r"MaxJobCount=\d+", "MaxJobCount=12", conf.read_text()))
    stop_controller(bare)
    bring_back(bare)
    first, *more = read(bare, 2)
    assert first == "20001 MaxJobCount = 12, 0 of it in use None 10.0"
    assert more == ["20001 None"]
    run = QueueRun.new(bare, "no-accounting", 20, pack=0)
    run.launch()
    assert [len(one["packs"]) for one in run.submissions()] == [5, 5, 1]
    wait_until(run, "last", 1, timeout=180)
    assert run.done()
    assert "every task is done" in run.status()
    refused = QueueRun.new(bare, "no-room", 4).launch(check=False)
    assert refused.returncode == 2
    assert "no room in the queue: MaxJobCount = 12, 11 of it in use" in refused.stderr
