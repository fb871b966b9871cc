"""Preflight on a real cluster: what passes, what Slurm refuses, and that a refused run has submitted nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPOSITORY, Cluster
from .test_environment import APPTAINER
from .test_limits import submit_limit


class Site:
    """The demonstration's recipe in a folder of the user's, with a cluster.yaml that tests write."""

    def __init__(self, cluster: Cluster, folder: Path, base: Path) -> None:
        self.cluster, self.folder, self.base = cluster, folder, base

    def call(self, script: str, settings: str, *flags: str, extra: str = "") -> subprocess.CompletedProcess[str]:
        """Run a launcher as the user."""
        path = self.folder / "cluster.yaml"
        path.write_text(f"runs: {self.folder}/runs\nlogs: {self.folder}/logs\n{settings}\n")
        setting = [f"DEMO_BASE={self.base}", *extra.split()]
        command = ["env", *setting, sys.executable, str(REPOSITORY / "jobs" / script), "--cluster", str(path)]
        return self.cluster.run([*command, *flags], cwd=self.folder, check=False, timeout=400)


@pytest.fixture(scope="module")
def site(cluster: Cluster, demo_base: Path) -> Site:
    folder = cluster.workdir("preflight")
    base = folder / "base"
    shutil.copytree(demo_base, base)
    for path in (base, *base.iterdir()):
        path.chmod(0o755)
    return Site(cluster, folder, base)


@pytest.fixture(scope="module")
def partitions(cluster: Cluster) -> Iterator[None]:
    """Partitions `short`, of at most a minute, and `doomed`, where preempted jobs are cancelled without grace."""
    try:
        cluster.run(["scontrol", "create", "PartitionName=short", "Nodes=ALL", "MaxTime=1"], as_root=True)
        doomed = ["PartitionName=doomed", "Nodes=ALL", "PreemptMode=CANCEL", "PriorityTier=1"]
        cluster.run(["scontrol", "create", *doomed], as_root=True)
        yield
    finally:
        for name in ("short", "doomed"):
            cluster.run(["scontrol", "delete", f"PartitionName={name}"], as_root=True, check=False)


BAD = """\
stages:
  train: {ranks_per_node: 2}
  prepare: {partition: nowhere}
  tokenize: {account: nobody}
  convert: {partition: short, minutes: 5}
  verify: {gpus_per_node: 8}
  merge: {partition: doomed}
"""


def test_refusals(site: Site, partitions: None) -> None:
    """Unknown partition and account, too long a time and GPUs that are not there: Slurm's words, ours, exit code 1."""
    done = site.call("preflight.py", BAD, "--no-drill")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    answers = {
        "prepare": ("invalid partition specified: nowhere", "partition is 'nowhere'; this cluster has: cpu, urgent"),
        "tokenize": ("Invalid account", "account is 'nobody'; you may use: snak."),
        "convert": ("5 minutes are over the limit of partition short, 1 minutes", "Set minutes to 1 or less"),
        "verify": ("Invalid generic resource (gres) specification", "gpus_per_node 8 on 1 node(s) is asked for"),
    }
    for stage, (slurm, ours) in answers.items():
        number = next(i for i, line in enumerate(lines) if line.startswith(f"fail: sbatch: {stage}: "))
        assert slurm in lines[number]
        assert ours in lines[number + 1]
    assert sum(line.startswith("fail: ") for line in lines) == len(answers)
    assert "warn: doomed: preemption: by urgent, with PreemptMode=CANCEL and no GraceTime" in done.stdout
    assert not list(site.folder.glob("runs/*/submissions.jsonl"))


def test_nothing_is_submitted_when_a_later_stage_would_be_refused(site: Site, partitions: None) -> None:
    """submit_all.py asks about every stage first: with only the last one impossible, no job is queued at all."""
    settings = "stages: {train: {ranks_per_node: 2}, push: {gres: 'gpu:8'}}"
    folder = site.folder / "runs" / "refused-early"
    done = site.call("submit_all.py", settings, "--scheduler", "slurm", "--run-dir", str(folder))
    assert done.returncode == 2
    assert "nothing was submitted" in done.stderr
    assert "stage push: Slurm says: sbatch: error: Invalid generic resource" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "submissions.jsonl").exists()
    assert not [row for row in site.cluster.squeue() if row["JobName"].startswith("refused-early")]


LONG = "defaults: {minutes: 50}\nstages: {train: {ranks_per_node: 2, minutes: 90}}"


@pytest.mark.parametrize("of", ["qos", "partition's qos", "account"])
def test_time_limit_over_max_wall(site: Site, of: str) -> None:
    """A time limit over MaxWall of the QOS, the partition's QOS or the account would wait for ever: it is refused."""
    modify = ["sacctmgr", "-i", "modify"]
    what = {"qos": ["qos", "normal"], "partition's qos": ["qos", "walled"], "account": ["account", "snak"]}[of]
    name = {"qos": "QOS normal", "partition's qos": "QOS walled", "account": "account snak"}[of]
    partition = ["scontrol", "update", "PartitionName=cpu"]
    site.cluster.run(["sacctmgr", "-i", "add", "qos", "walled"], as_root=True)
    try:
        site.cluster.run([*modify, *what, "set", "MaxWall=60"], as_root=True)
        site.cluster.run([*partition, f"QoS={'walled' if name == 'QOS walled' else ''}"], as_root=True)
        done = site.call("preflight.py", LONG, "--no-drill")
        refused = site.call("submit_all.py", LONG, "--scheduler", "slurm", "--run-dir", f"{site.folder}/runs/walled")
    finally:
        site.cluster.run([*modify, *what, "set", "MaxWall=-1"], as_root=True)
        site.cluster.run([*partition, "QoS="], as_root=True)
        site.cluster.run(["sacctmgr", "-i", "delete", "qos", "walled"], as_root=True)
    words = f"90 minutes are over MaxWall of {name}, 60 minutes: the job would stay PENDING"
    assert [line for line in done.stdout.splitlines() if line.startswith("fail: ")] == [f"fail: sbatch: train: {words}"]
    assert refused.returncode == 2
    assert f"stage train: Slurm says: {words}" in refused.stderr
    assert "nothing was submitted" in refused.stderr
    assert not (site.folder / "runs" / "walled" / "submissions.jsonl").exists()


def test_array_sizes_are_judged_packed(site: Site) -> None:
    """Where the queue is small, what counts is the arrays that a new run would be packed into."""
    with submit_limit(site.cluster, 27):
        done = site.call("preflight.py", "stages: {train: {ranks_per_node: 2}}", "--no-drill", "--scheduler", "slurm")
    assert done.returncode == 0, done.stdout
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "4 elements at most, of up to 2 shard(s); MaxArraySize is 20001" in text, text
    assert "MaxSubmitJobsPerUser of QOS normal = 27, 0 of it in use" in text


def test_read_only_run_folder(site: Site) -> None:
    """A run folder that the user may not write into is named before anything else happens."""
    folder = site.folder / "sealed"
    folder.mkdir()
    folder.chmod(0o555)
    done = site.call("preflight.py", "", "--run-dir", str(folder), "--no-drill")
    assert done.returncode == 1
    assert f"{folder}, cannot be written: Permission denied" in done.stdout


def test_unreachable_controller(site: Site) -> None:
    """With a controller that does not answer both launchers stop and say so."""
    conf = site.folder / "slurm.conf"
    text = (site.cluster.folder / "slurm.conf").read_text()
    conf.write_text("\n".join("SlurmctldPort=9" if "SlurmctldPort" in line else line for line in text.splitlines()))
    for script, code in (("preflight.py", 1), ("submit_all.py", 2)):
        done = site.call(script, "", extra=f"SLURM_CONF={conf}")
        assert done.returncode == code, done.stdout + done.stderr
        assert "controller does not answer" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not list(site.folder.glob("runs/*/submissions.jsonl"))


@pytest.mark.slow
def test_everything_passes(site: Site) -> None:
    """On a good cluster all checks pass, with a drill on both partitions that measures notice and requeue.

    The one on `urgent` runs in a container, by a stand-in for apptainer that passes nothing else of the environment in.
    """
    tools, record = site.folder / "bin", site.folder / "record"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER.replace("RECORD", str(record)))
    (tools / "apptainer").chmod(0o755)
    record.touch()
    record.chmod(0o666)
    inside = (
        f"partition: urgent, setup: ['export PATH={tools}:$PATH'], container: {{runtime: apptainer, image: /s.sif}}"
    )
    done = site.call("preflight.py", f"stages: {{train: {{ranks_per_node: 2}}, push: {{{inside}}}}}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing failed." in done.stdout
    text = " ".join(done.stdout.replace("│", " ").split())
    for partition in ("cpu", "urgent"):
        for check in ("start", "packages", "cores", "shared disk", "network", "signal", "requeue"):
            assert f"pass {partition}: {check} " in text
    assert "jobs there are not preempted" in text
    calls = [line for line in record.read_text().splitlines() if line.startswith("exec ")]
    assert len(calls) == 4, "two ranks, two attempts"
    assert all(" /s.sif python3 -u -m snakmodel.preflight.drill_rank " in line for line in calls)
    assert not list(site.folder.glob("runs/demo/preflight*"))
    assert not list(site.folder.glob("logs/demo-preflight*"))
    assert not [row for row in site.cluster.squeue() if "drill" in row["JobName"] and row["State"] != "COMPLETED"]
