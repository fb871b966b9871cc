"""What a job finds around it on a real cluster: set-up lines, a container, and nothing of the job that submitted it."""

from __future__ import annotations

import glob
import json
import pickle
import re
import shutil
import sys

import pytest

from tests import toy

from .conftest import REPOSITORY, Cluster, drained
from .test_requeue import RESUMABLE, SAVES, STEPS, ready
from .toy_run import ToyRun

REPORT = (
    "import json, os, pathlib, sys\n"
    "path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True)\n"
    "path.write_text(json.dumps(dict(os.environ)))\n"
)
"""python -c REPORT OUTPUT: write the environment."""

MEETING = (
    "import json, os, pathlib, socket, sys\n"
    "from run_contract.publish import publishing\n"
    "e = os.environ\n"
    "if e['RANK'] == '0':\n"
    "    listener = socket.socket(fileno=int(e['MASTER_LISTEN_FD']))\n"
    "    peer, _ = listener.accept()\n"
    "    found = [peer.recv(100).decode(), dict(e)]\n"
    "    with publishing(pathlib.Path(sys.argv[1])) as (t,):\n"
    "        t.write_text(json.dumps(found))\n"
    "else:\n"
    "    peer = socket.create_connection((e['MASTER_ADDR'], int(e['MASTER_PORT'])))\n"
    "    peer.sendall(('rank ' + e['RANK']).encode()); peer.close()\n"
)
"""python -c MEETING OUTPUT, on two ranks: rank 0 writes what rank 1 says, and its environment."""

APPTAINER = """\
#!/bin/bash
# Stands in for apptainer: notes its arguments, then runs what follows the image, with nothing of the caller's
# environment but APPTAINERENV_*.
echo "$*" >> RECORD
shift
while [[ $1 != *.sif ]]; do [[ $1 == --pwd ]] && cd "$2"; shift; done
shift
inside=("PATH=$PATH")
for name in $(compgen -e APPTAINERENV_); do inside+=("${name#APPTAINERENV_}=${!name}"); done
exec env -i "${inside[@]}" "$@"
"""


def test_setup_lines(cluster: Cluster) -> None:
    """slurm.setup runs before the command of every job; a stage's own lines replace it."""
    run = ToyRun.new(cluster, "setup", slurm={"setup": ["export GREETING=hej", "export TWO='a b'"]})
    own = {"setup": ["export GREETING=farvel"], "srun_args": ["--label"]}
    run.submit([run.stage("one", REPORT), run.stage("two", REPORT, resources=own)])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    one, two = (json.loads((run.root / name / "0.txt").read_text()) for name in ("one", "two"))
    assert (one["GREETING"], one["TWO"]) == ("hej", "a b")
    assert two["GREETING"] == "farvel"
    assert "TWO" not in two
    assert "0: === two task 0" in run.log("two")
    assert "0: ===" not in run.log("one")


def test_cores_reach_the_rank(cluster: Cluster) -> None:
    """srun is told the cores of a task, which it does not take from sbatch, and the log names those granted."""
    run = ToyRun.new(cluster, "cores")
    run.submit([run.stage("one", REPORT, resources={"cpus": 3})])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    found = json.loads((run.root / "one" / "0.txt").read_text())
    assert (found["SLURM_CPUS_PER_TASK"], found["SLURM_STEP_NUM_TASKS"]) == ("3", "1")
    granted = re.search(r"=== one task 0 \| attempt \S+ \| 1 rank\(s\) \| \S+, cores ([\d,]+) \|", run.log("one"))
    assert granted, run.log("one")


def test_two_jobs_on_one_node_do_not_clash(cluster: Cluster) -> None:
    """Two jobs of two ranks each meet at the same time on one node, each at a port of its own."""
    run = ToyRun.new(cluster, "ports", slurm={"exclude": "node[1-3]"})
    together = (
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1]); here.parent.mkdir(exist_ok=True)\n"
        "here.with_name(here.stem + '.' + os.environ['RANK']).write_text(os.environ['MASTER_PORT'])\n"
        "end = time.monotonic() + 600\n"
        "while len(list(here.parent.glob('[01].[01]'))) < 4 and time.monotonic() < end: time.sleep(0.05)\n"
        "assert time.monotonic() < end\n"
    )
    run.submit([run.stage("meet", together + MEETING, tasks=2, resources={"ranks_per_node": 2})])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    assert [json.loads((run.root / "meet" / f"{i}.txt").read_text())[0] for i in range(2)] == ["rank 1", "rank 1"]
    ports = {(run.root / "meet" / f"{i}.{rank}").read_text() for i in range(2) for rank in range(2)}
    assert len(ports) == 2


def test_log_folder_that_vanishes_before_the_start(cluster: Cluster) -> None:
    """Slurm cannot start a job whose log's folder is gone: status says so, and the launcher, run again, mends it."""
    run = ToyRun.new(cluster, "no-logs")
    one, two = run.stage("one", toy.PUBLISH), run.stage("two", toy.PUBLISH, waits={"one": "all"})
    with drained(cluster):
        run.submit([one, two])
        shutil.rmtree(run.folder / "logs")
    assert "COMPLETED" not in run.finish().values()
    told = run.told("one", done="-", failed="1", attempts="-")
    assert "failed: Slurm could not start it (FAILED: " in told
    assert f"{run.folder}/logs/run/one, the folder of its log, is gone; the launcher makes it anew" in told
    assert "blocked: because one failed" in run.told("two", blocked="1")
    again = run.submit([one, two])
    assert [line["stage"] for line in again] == ["one", "two"]
    run.until(lambda: run.markers("two") == [0], "the chain went on")
    assert "every task is done" in run.status()


def test_log_folder_that_vanishes_under_a_job(cluster: Cluster) -> None:
    """A job that is requeued makes the folder of its log again, without which Slurm could not start it."""
    run = ToyRun.new(cluster, "lost-logs")
    run.submit([run.stage("save", SAVES, **RESUMABLE)])
    run.until(ready(run), "the command's start")
    shutil.rmtree(run.folder / "logs")
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    assert run.story("save") == ["start", "requeue", "start", "done"]
    assert "attempt" in run.log("save")


def test_full_disk(cluster: Cluster) -> None:
    """A shard that does not fit on the disk is a crash with that reason, nothing of it is published; later it is done.

    A launcher that finds the disk full to the last byte says so before anything is submitted.
    """
    run = ToyRun.new(cluster, "full-disk", retries={"without_progress": 1})
    disk = str(run.folder)
    cluster.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=777", "tmpfs", disk], as_root=True)
    try:
        big = (
            "import pathlib, sys; from run_contract.publish import publishing\n"
            "with publishing(pathlib.Path(sys.argv[1])) as (path,): path.write_bytes(bytes(5 << 20))\n"
        )
        run.submit([run.stage("big", big)])
        assert set(run.finish().values()) == {"FAILED"}, run.everything()
        assert "No space left on device" in run.log("big")
        assert run.markers("big") == []
        assert [path.name for path in (run.root / "big").iterdir()] == []
        assert "failed" in run.told("big", failed="1", attempts="1")
        assert "No space left on device" in run.status()
        cluster.run(["mount", "-o", "remount,size=20m", disk], as_root=True)
        run.submit([run.stage("big", big)])
        run.until(lambda: run.markers("big") == [0], "the shard was written")
        cluster.run(["bash", "-c", f"cat /dev/zero > {disk}/filler; true"])
        launch = [sys.executable, REPOSITORY / "jobs" / "submit_all.py", "--scheduler", "slurm"]
        refused = cluster.run([*launch, "--run-dir", f"{disk}/runs/demo"], cwd=REPOSITORY, check=False)
        assert refused.returncode == 2
        assert "the run's folder, " in refused.stderr
        assert "cannot be written: No space left on device. Free space or give another --run-dir." in refused.stderr
        run.finish()
    finally:
        cluster.run(["umount", "-l", disk], as_root=True)


def test_a_signal_while_the_disk_is_full(cluster: Cluster) -> None:
    """A job that is signalled to end when nothing can be written any more is requeued all the same, and later done."""
    run = ToyRun.new(cluster, "full-at-the-end")
    disk = str(run.folder)
    cluster.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=777", "tmpfs", disk], as_root=True)
    try:
        run.submit([run.stage("save", SAVES, **RESUMABLE)])
        run.until(ready(run), "the command's start")
        job = f"{run.jobs()[0]}_0"
        cluster.run(["bash", "-c", f"cat /dev/zero > {disk}/filler; true"])
        cluster.run(["scancel", "--signal=TERM", "--full", job])
        run.until(lambda: restarts(cluster, job) == 1, "the requeue")
        (run.folder / "filler").unlink()
        run.until(lambda: run.markers("save") == [0], "the command was done")
        assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
        assert "failed" not in run.story("save")
    finally:
        cluster.run(["umount", "-l", disk], as_root=True)


def test_a_run_folder_that_turns_read_only(cluster: Cluster) -> None:
    """A job that cannot write down its end is not told as the loss of a node: what its log says is shown."""
    run = ToyRun.new(cluster, "read-only")
    disk = str(run.root)
    run.root.mkdir()
    cluster.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=777", "tmpfs", disk], as_root=True)
    try:
        stage = run.stage("save", STEPS + "if (root / 'repaired').exists(): done()\nwait_for_signal(); sys.exit(75)")
        run.submit([stage])
        run.until(ready(run), "the command's start")
        job = f"{run.jobs()[0]}_0"
        cluster.run(["mount", "-o", "remount,ro", disk], as_root=True)
        cluster.run(["scancel", "--signal=TERM", "--full", job])
        run.until(lambda: "Read-only file system" in run.status(), "the reason in the status")
        shown = run.status()
        assert "the loss of" not in shown
        cluster.run(["mount", "-o", "remount,rw", disk], as_root=True)
        (run.root / "repaired").touch()
        run.submit([stage])
        run.until(lambda: run.markers("save") == [0], "the command was done")
        assert "the loss of" not in run.status()
    finally:
        cluster.run(["umount", "-l", disk], as_root=True)


def restarts(cluster: Cluster, job: str) -> int:
    """How often Slurm has started a job again."""
    words = cluster.run(["scontrol", "show", "job", job]).stdout.split()
    return int(next(word for word in words if word.startswith("Restarts=")).partition("=")[2])


@pytest.mark.parametrize("name", ["100%A of %j", 'it\'s $HOME; #1 & "two"', "a,b=c:d (e) [f] *"])
def test_names_that_slurm_and_shells_read_otherwise(cluster: Cluster, name: str) -> None:
    """Whatever a run's folder is called, its jobs log where status looks, and nothing is written beside it."""
    run = ToyRun.new(cluster, name)
    run.submit([run.stage("save", REPORT)])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    assert "=== save task 0 | attempt" in run.log("save")
    assert sorted(path.name for path in run.folder.iterdir()) == ["logs", "run", "stages.pickle"]
    assert [path.name for path in run.folder.parent.glob(f"{glob.escape(name[:3])}*")] == [name]
    run.told("save", done="1")


def test_names_that_no_batch_file_can_hold(cluster: Cluster) -> None:
    """A backslash or the end of a line in the logs' path is refused before anything is submitted."""
    run = ToyRun.new(cluster, "back\\slash")
    with pytest.raises(AssertionError, match="the folder for logs cannot be named to Slurm"):
        run.submit([run.stage("save", REPORT)])
    assert run.submissions() == []


def test_two_ranks_in_apptainer(cluster: Cluster) -> None:
    """Both ranks run through apptainer and meet; the token is inside although no argument shows it."""
    folder = cluster.workdir("apptainer")
    tools, record = folder / "bin", folder / "record"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER.replace("RECORD", str(record)))
    (tools / "apptainer").chmod(0o755)
    folder.chmod(0o777)
    setup = [f"export PATH={tools}:$PATH", "export HF_TOKEN=hf_secret", "export PRIVATE=1"]
    container = {"runtime": "apptainer", "image": "/images/snak.sif", "binds": ["/etc:/host-etc:ro"]}
    run = ToyRun(cluster, folder, {"slurm": {"setup": setup}, "container": container})
    run.submit([run.stage("meet", MEETING, resources={"ranks_per_node": 2})])
    assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
    said, inside = json.loads((run.root / "meet" / "0.txt").read_text())
    assert said == "rank 1"
    assert (inside["HF_TOKEN"], inside["WORLD_SIZE"]) == ("hf_secret", "2")
    assert inside["SNAKMODEL_ATTEMPT"] == f"{run.jobs()[0]}_0.r0"
    assert "PRIVATE" not in inside
    calls = [line for line in record.read_text().splitlines() if line.startswith("exec ")]
    assert len(calls) == 2
    binds = f"--bind {REPOSITORY}:{REPOSITORY} --bind {run.root}:{run.root} --bind /etc:/host-etc:ro"
    assert all(call.startswith(f"exec {binds} --pwd {REPOSITORY} /images/snak.sif python3 -u -c") for call in calls)
    assert "hf_secret" not in record.read_text()


def test_submitting_from_inside_a_job(cluster: Cluster) -> None:
    """A launcher inside a job, with that job's variables and worse around it, submits as from a login node."""
    run = ToyRun.new(cluster, "inside")
    (run.folder / "stages.pickle").write_bytes(
        pickle.dumps((toy.two_stages(run.root, shards=2), dict(run.settings), 1))
    )
    launcher = f"{sys.executable} -m tests.real_slurm.toy_run {run.folder}"
    leaks = "export SBATCH_PARTITION=nowhere SBATCH_TIMELIMIT=9 PMI_RANK=3 SRUN_DEBUG=4 SLURM_CPUS_PER_TASK=7"
    script = run.folder / "outer.sh"
    script.write_text(f"#!/bin/bash\ncd {REPOSITORY}\n{leaks}\nsrun --ntasks=1 {launcher}\n")
    log = run.folder / "outer.out"
    size = ["--nodes=1", "--ntasks=2", "--cpus-per-task=2", "--time=7", f"--output={log}"]
    outer = cluster.submit(*size, script, cwd=run.folder)
    (row,) = cluster.wait([outer], "COMPLETED", "FAILED", timeout=120)
    assert row["State"] == "COMPLETED", log.read_text()
    assert set(run.finish().values()) == {"COMPLETED"}
    assert (run.root / "c.txt").read_text() == "0.txt1.txt"
    limits = {row["Timelimit"] for row in cluster.sacct(run.jobs(), ["Timelimit"])}
    assert limits == {"02:00:00"}
    assert {row["AllocCPUS"] for row in cluster.sacct(run.jobs(), ["AllocCPUS"])} == {"1"}


def test_exclude(cluster: Cluster) -> None:
    """No task runs on an excluded node."""
    run = ToyRun.new(cluster, "exclude", slurm={"exclude": "node[1-3]"})
    run.submit([run.stage("one", REPORT, tasks=3)])
    assert set(run.finish().values()) == {"COMPLETED"}
    nodes = {json.loads((run.root / "one" / f"{i}.txt").read_text())["SLURMD_NODENAME"] for i in range(3)}
    assert nodes == {"node4"}
