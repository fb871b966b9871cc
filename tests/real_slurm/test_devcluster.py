"""sbatch/devcluster is a real cluster: it runs an unprivileged user's jobs, it preempts, it ends without a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cluster

PATIENCE = 600
"""As in tests/conftest.py, which is not on the path here."""
DEVCLUSTER = Path(__file__).resolve().parents[2] / "sbatch" / "devcluster"


def devcluster(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    argv = [sys.executable, str(DEVCLUSTER), *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600)


def until(check: Callable[[], bool]) -> None:
    """Wait for something that takes a moment."""
    limit = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[str]:
    """`pid name` of every process, zombies aside, that was started with this folder's settings."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        if str(folder).encode() in environment and state != "Z":
            found.append(f"{entry.name} {name}")
    return found


@pytest.fixture
def free_folder(slurm_user: str) -> Iterator[Path]:
    """A short path for another cluster, which is stopped if the test leaves it running."""
    root = Path(tempfile.mkdtemp(prefix="snak-slurm-", dir="/tmp"))
    root.chmod(0o755)
    yield root / "c"
    devcluster("down", "--dir", root / "c")
    shutil.rmtree(root)


def test_four_nodes_are_idle(cluster: Cluster) -> None:
    """`up` returned only when all nodes had registered with what they were told to claim, in both partitions."""
    out = cluster.run(["sinfo", "-h", "-N", "-o", "%N %P %T %c"]).stdout.split("\n")
    nodes = [f"node{number} {partition} idle 8" for number in range(1, 5) for partition in ("cpu*", "urgent")]
    assert sorted(filter(None, out)) == nodes


def test_array_of_an_unprivileged_user(cluster: Cluster) -> None:
    """Three array tasks run this Python and the toolkit as the user on nodes, and sacct says COMPLETED."""
    folder = cluster.workdir("array")
    code = "import os, snakmodel; print(os.geteuid(), os.environ['SLURMD_NODENAME'])"
    job = cluster.submit("--array=0-2", "-o", "%a.out", "--exclusive", "--wrap", f'python -c "{code}"', cwd=folder)
    rows = cluster.wait([job], "COMPLETED")
    assert sorted(row["JobID"] for row in rows) == [f"{job}_{index}" for index in range(3)]
    seen = [(folder / f"{index}.out").read_text().split() for index in range(3)]
    user_id = str(folder.stat().st_uid)
    assert user_id != "0"
    assert [uid for uid, _ in seen] == [user_id] * 3
    nodes = {row["JobID"]: row["NodeList"] for row in rows}
    assert [node for _, node in seen] == [nodes[f"{job}_{index}"] for index in range(3)]


def test_srun_reaches_several_nodes(cluster: Cluster) -> None:
    """A step's tasks run on two nodes, and none of the caller's SLURM_* variables got in the way."""
    out = cluster.run(["srun", "-N2", "-n2", "printenv", "SLURMD_NODENAME"], timeout=30).stdout
    assert len(set(out.split())) == 2


def test_urgent_preempts_and_requeues(cluster: Cluster) -> None:
    """A job in `urgent` takes the nodes from a job in `cpu`, which runs a second time, a few seconds later."""
    folder = cluster.workdir("preempt")
    script = 'echo $SLURM_RESTART_COUNT- >>starts; [ -n "$SLURM_RESTART_COUNT" ] || exec sleep 100'
    victim = cluster.submit("--exclusive", "-N4", "--requeue", "--wrap", script, cwd=folder)
    cluster.wait([victim], "RUNNING")
    starts = folder / "starts"
    until(starts.exists)
    urgent = cluster.submit("-p", "urgent", "--exclusive", "-N4", "--wrap", "true", cwd=folder)
    cluster.wait([urgent, victim], "COMPLETED", timeout=40)
    assert starts.read_text().split() == ["-", "1-"]


def test_limits_of_the_qos_are_enforced(cluster: Cluster) -> None:
    """Accounting is in force: an array over MaxSubmitJobsPerUser is refused with Slurm's own reason."""
    modify = ["sacctmgr", "-i", "modify", "qos", "normal", "set"]
    folder = cluster.workdir("limits")
    cluster.run([*modify, "MaxSubmitJobsPerUser=2"], as_root=True)
    try:
        refused = cluster.run(["sbatch", "--array=0-2", "--wrap", "true"], cwd=folder, check=False)
    finally:
        cluster.run([*modify, "MaxSubmitJobsPerUser=-1"], as_root=True)
    assert refused.returncode != 0
    assert "QOSMaxSubmitJobPerUserLimit" in refused.stderr


def test_up_again_brings_back_a_dead_node(cluster: Cluster) -> None:
    """A second `up` keeps the controller, starts the slurmd that was killed, and refuses another size."""
    controller, node = cluster.pid("slurmctld"), cluster.pid("slurmd-node4")
    os.kill(node, 9)
    until(lambda: devcluster("status", "--dir", cluster.folder).returncode == 1)
    again = devcluster("up", "--dir", cluster.folder)
    assert again.returncode == 0, again.stderr
    assert cluster.pid("slurmctld") == controller
    assert cluster.pid("slurmd-node4") != node
    assert devcluster("status", "--dir", cluster.folder).returncode == 0
    other = devcluster("up", "--dir", cluster.folder, "--nodes", "2")
    assert other.returncode == 2
    assert "4 nodes" in other.stderr


def test_down_leaves_nothing(free_folder: Path) -> None:
    """`down` ends daemons and running jobs, also those whose slurmd is dead, and removes the folder."""
    up = devcluster("up", "--dir", free_folder, "--nodes", "1", "--no-accounting")
    assert up.returncode == 0, up.stderr
    export = devcluster("env", "--dir", free_folder).stdout
    assert export == f"export SLURM_CONF={free_folder}/slurm.conf\n"
    job = ["bash", "-c", f"{export} cd /; sbatch -o /dev/null --wrap 'srun sleep 100'"]
    subprocess.run(job, check=True, timeout=120, stdout=subprocess.DEVNULL)
    until(lambda: any(line.endswith(" sleep") for line in processes_of(free_folder)))
    slurmd = int((free_folder / "pids" / "slurmd-node1").read_text().split()[0])
    os.kill(slurmd, 9)
    down = devcluster("down", "--dir", free_folder)
    assert down.returncode == 0, down.stderr
    assert processes_of(free_folder) == []
    assert not free_folder.exists()


def test_up_after_an_interrupted_up(free_folder: Path) -> None:
    """`up` killed half-way leaves a mess that the next `up` clears away."""
    argv = [sys.executable, str(DEVCLUSTER), "up", "--dir", str(free_folder), "--no-accounting", "--nodes", "1"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as first:
        until((free_folder / "pids" / "munged").exists)
        first.kill()
    up = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert up.returncode == 0, up.stderr
    assert "removing what an interrupted start left" in up.stdout
    assert sum(line.endswith(" munged") for line in processes_of(free_folder)) == 1


def test_a_failing_daemon_is_explained(free_folder: Path) -> None:
    """When a daemon dies `up` says which, shows its last words and the log's path, and leaves no process."""
    up = devcluster("up", "--dir", free_folder, "--no-accounting", "--nodes", "1")
    assert up.returncode == 0, up.stderr
    conf = free_folder / "slurm.conf"
    os.kill(int((free_folder / "pids" / "slurmctld").read_text().split()[0]), 9)
    conf.write_text(conf.read_text() + "SelectType=select/nonsense\n")
    again = devcluster("up", "--dir", free_folder, "--no-accounting", "--nodes", "1")
    assert again.returncode == 2
    assert "error: waited for slurmctld to answer: the daemon ended" in again.stderr
    assert f"last lines of {free_folder}/log/slurmctld.log" in again.stderr
    assert "select/nonsense" in again.stderr


def test_a_strange_folder_is_refused(tmp_path: Path) -> None:
    """`down` and `up` never touch a folder that is not a cluster's."""
    (tmp_path / "thesis.tex").write_text("precious")
    for command in ("up", "down"):
        done = devcluster(command, "--dir", tmp_path)
        assert done.returncode == 2
        assert "--dir" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "precious"
