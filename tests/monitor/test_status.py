"""The doctor on real local runs and on damaged folders; what Slurm's states mean."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from run_contract.publish import write_json
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.monitor.diagnosis import Diagnosis, State, diagnose
from snakmodel.monitor.run_files import RunFiles
from snakmodel.monitor.status import as_json, text
from snakmodel.run.attempts import log_event
from snakmodel.run.markers import Marker, marker_path
from snakmodel.slurm.jobs import Job, Owner, Queue, _records
from tests import toy
from tests.launch.test_local_scheduler import SLOW, launcher, wait_for
from tests.toy import row

PROJECT = Path(__file__).resolve().parents[2]
BROKEN = (
    "import sys, pathlib\np = pathlib.Path(sys.argv[1])\n"
    "if p.name == '1.txt' and not (p.parents[1] / 'repaired').exists(): sys.exit('broken shard')\n"
) + toy.PUBLISH
"""A shard that fails until there is a file `repaired` in the run's folder."""


def status(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "jobs" / "status.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


def shown(root: Path) -> str:
    return text(diagnose(RunFiles.read(root)))


def test_failure_blocks_what_waits_and_repair_ends_it(tmp_path: Path) -> None:
    """A failing shard shows its attempts, its exit code and the end of its log, dependants are blocked; then done."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, script=BROKEN))).run() == 1
    done = status(root)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "first") | {"done": "2", "failed": "1", "attempts": "3"} == row(done.stdout, "first")
    assert "blocked: because first failed" in done.stdout
    assert row(done.stdout, "second")["blocked"] == "1"
    assert row(done.stdout, "last")["blocked"] == "1"
    assert "task 1, rank 0" in done.stdout
    assert "exit code 1" in done.stdout
    assert f"log: {tmp_path}/logs/run/first/00001.out\n" in done.stdout
    assert "  | broken shard\n" in done.stdout
    assert "What to do next: repair what the log of first says" in done.stdout
    (root / "repaired").touch()
    assert launcher(root, BROKEN).wait(timeout=600) == 0
    assert "What to do next: nothing: every task is done." in status(root).stdout


def test_json_says_the_same(tmp_path: Path) -> None:
    """--json carries counts, the failing pack with its log's end, and the next step."""
    root = tmp_path / "run"
    LocalScheduler(toy.plan(root, toy.two_stages(root, script=BROKEN))).run()
    found = json.loads(status(root, "--json").stdout)
    assert [(one["stage"], one["done"], one["failed"], one["blocked"]) for one in found["stages"]] == [
        ("first", 2, 1, 0), ("second", 2, 0, 1), ("last", 0, 0, 1),
    ]  # fmt: skip
    assert [(one["stage"], one["tasks"]) for one in found["failing"]] == [("first", [1])]
    assert "broken shard" in found["failing"][0]["tail"]


def test_a_running_and_then_killed_launcher(tmp_path: Path) -> None:
    """While the launcher lives its tasks run or wait; after SIGKILL they are missing, and none counts as failed."""
    root = tmp_path / "run"
    lines = (
        "import sys, pathlib; from tests import toy; from snakmodel.launch.local_scheduler import LocalScheduler\n"
        "from snakmodel.run.lock import run_lock\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "with run_lock(root): LocalScheduler(toy.plan(root, toy.two_stages(root, 1, sys.argv[2]))).run()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", lines, str(root), SLOW], cwd=PROJECT)
    try:
        wait_for(root / "a" / "0.txt.started")
        output = shown(root)
        assert row(output, "first")["running"] == "1"
        assert row(output, "second")["pending"] == "1"
        assert "pending: waits for first" in output
        assert "nothing but wait" in output
    finally:
        process.kill()
        process.wait()
    output = shown(root)
    assert row(output, "first")["failed"] == "-"
    assert "missing: its last attempt ended: without a word" in output
    assert "What to do next: Run the launcher again" in output


def test_an_interrupted_launcher(tmp_path: Path) -> None:
    """After Ctrl-C the interrupted tasks are missing, not failed."""
    root = tmp_path / "run"
    process = launcher(root, SLOW)
    wait_for(root / "a" / "0.txt.started")
    process.send_signal(signal.SIGINT)
    process.wait(timeout=600)
    output = shown(root)
    assert row(output, "first")["failed"] == "-"
    assert "Run the launcher again" in output


def test_damaged_files_are_words_not_tracebacks(tmp_path: Path) -> None:
    """A cut-off marker, a marker without its output, broken event, journal and run.yaml lines: each is named."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    marker_path(root, "second", 1).write_text('{"key": "x", "outp')
    (root / "b" / "2.txt").unlink()
    with (root / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T0\n')
    (root / "submissions.jsonl").write_text("[1]\n")
    (root / "run.yaml").write_text("a: [")
    done = status(root)
    assert done.returncode == 0, done.stderr
    assert f"{root}/markers/second/00001.json cannot be read; it will be done again" in done.stdout
    assert "b/2.txt is missing" in done.stdout
    assert "events.jsonl: 1 unreadable line(s)" in done.stdout
    assert "submissions.jsonl: 1 unreadable line(s)" in done.stdout
    assert "run.yaml cannot be read" in done.stdout
    assert row(done.stdout, "second")["done"] == "1"
    (root / "tasks" / "last.json").write_text("{}")
    assert "last.json: not a task list" in status(root).stdout


@pytest.mark.parametrize("name", ["missing", "/nowhere/at/all", "."])
def test_no_run_there(tmp_path: Path, name: str) -> None:
    """A name or folder that is no run's is one line that lists the runs there are."""
    LocalScheduler(toy.plan(tmp_path / "runs" / "one", [])).run()
    (tmp_path / "runs" / "one" / "run.yaml").touch()
    done = subprocess.run(
        [sys.executable, str(PROJECT / "jobs" / "status.py"), name],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "SNAKMODEL_RUNS": str(tmp_path / "runs")},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert name != "missing" or "Runs in" in done.stderr


def test_the_newest_run_is_the_default(tmp_path: Path) -> None:
    """Without an argument the run that was touched last is shown; a name means one in cluster.yaml's folder of runs."""
    for number, name in enumerate(("new", "old")):
        root = tmp_path / "runs" / name
        LocalScheduler(toy.plan(root, toy.two_stages(root, 1)[:1])).run()
        os.utime(root / "events.jsonl", (time.time() - 100 * number,) * 2)
    runs = {"SNAKMODEL_RUNS": str(tmp_path / "runs")}
    assert status(**runs).stdout.startswith("new: ")
    assert status("old", **runs).stdout.startswith("old: ")


def test_ten_thousand_markers(tmp_path: Path) -> None:
    """Every one of 10,000 markers and its output's size is looked at: all are done, but for one that was cut short."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root, shards=10_000)[:1])
    plan.write_task_list(plan.chain["first"], sys.executable)
    (root / "a").mkdir()
    marker_path(root, "first", 0).parent.mkdir(parents=True)
    for number, key in enumerate(plan.chain.keys["first"]):
        (root / f"a/{number}.txt").write_text("x")
        line = json.dumps({"key": key, "outputs": {f"a/{number}.txt": [1, "0"]}, "counts": {}})
        marker_path(root, "first", number).write_text(line)
    assert row(shown(root), "first")["done"] == "10000"
    (root / "a/7777.txt").write_text("")
    assert row(shown(root), "first")["done"] == "9999"


def test_mismatches_of_two_tokenizers(tmp_path: Path) -> None:
    """What manifests of the tokenizer count is shown as one note, also for programs; without any there is none."""
    root = tmp_path / "run"
    plan = toy.plan(root, [replace(toy.two_stages(root)[0], name="tokenize")])
    plan.write_task_list(plan.chain["tokenize"], sys.executable)
    for number, count in enumerate((0, 2, 3)):
        marker = Marker(plan.chain.keys["tokenize"][number], {}, {"documents": 9, "sample_mismatches": count})
        marker.write(marker_path(root, "tokenize", number))
    found = diagnose(RunFiles.read(root))
    words = "gigatoken gave different ids than the tokenizer's own library for 5 sampled document(s) of 2 task(s)"
    assert f"note: tokenize: {words}, of which the first is task 1; these tasks were tokenised again" in text(found)
    assert [words in note for note in as_json(found)["notes"]] == [True]
    Marker(plan.chain.keys["tokenize"][1], {}, {"sample_mismatches": 0}).write(marker_path(root, "tokenize", 1))
    Marker(plan.chain.keys["tokenize"][2], {}, {"documents": 9}).write(marker_path(root, "tokenize", 2))
    assert "gigatoken" not in shown(root)


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`status | true` ends without a word on stderr, like other commands of a pipe."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root))
    plan.write_task_list(plan.chain["first"], sys.executable)
    command = f"{shlex.quote(sys.executable)} jobs/status.py {shlex.quote(str(root))} | true"
    done = subprocess.run(["sh", "-c", command], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""


def judged(root: Path, jobs: list[Job]) -> Diagnosis:
    """A run of two_stages of which these jobs of its first stage are all that Slurm knows."""
    from snakmodel.monitor.diagnosis import _Judge

    plan = toy.plan(root, toy.two_stages(root, shards=1))
    for stage in plan.chain.stages:
        plan.write_task_list(stage, sys.executable)
    files = RunFiles.read(root)
    files.journal = [{"stage": "first", "job": "7", "packs": [0], "token": "t"}]
    queue = Queue(packs={("first", 0): jobs})
    judge = _Judge(files, queue)
    return Diagnosis(files, queue, [judge.stage(stage) for stage in files.stages])


@pytest.mark.parametrize(
    ("reason", "words", "remedy"),
    [
        ("None", "just submitted, or about to start", "wait for what is queued or runs"),
        ("Priority", "other jobs come first (Priority)", "wait for what is queued or runs"),
        ("JobHeldUser", "held by you (JobHeldUser)", "scontrol release 7_0."),
        ("launch failed requeued held", "held, as Slurm could not start it", "then scontrol release 7_0."),
        ("job requeued in held state", "held", "scontrol release 7_0."),
        ("user env retrieval failed requeued held", "held, as Slurm could not start it", "then scontrol release 7_0."),
        ("JobHeldAdmin", "held by the administrators", "ask your administrators."),
        ("PartitionTimeLimit", "its time limit is over the partition's", "minutes is too high"),
        ("ReqNodeNotAvail, UnavailableNodes:node3", "down, drained or reserved (ReqNodeNotAvail, Una", "sinfo -R"),
        ("AssocGrpCPUMinutesLimit", "your account has used its time", "sacctmgr show assoc"),
        ("AssocGrpCpuLimit", "your account uses as much as it may at once", "wait for what is queued or runs"),
        ("AssocMaxCpuPerJobLimit", "one such job is more than your account allows", "sacctmgr show assoc"),
        ("MaxCpuPerAccount", "the jobs of your account use as much together as the QOS allows", ""),
        ("MaxGRESPerAccount", "the jobs of your account use as much together as the QOS allows", ""),
        ("QOSMaxWallDurationPerJobLimit", "one such job is more than the QOS allows", "sacctmgr show qos"),
        ("QOSMinGRES", "it asks for less than the QOS demands", "sacctmgr show qos"),
        ("InvalidAccount", "its account does not exist", "account is wrong: correct it in cluster.yaml"),
        ("Nodes required for job are DOWN, DRAINED", "nodes that it needs are down", "sinfo -R"),
        ("NewReason", "Slurm says NewReason", "ask your administrators what `NewReason` means here."),
    ],
)
def test_why_a_job_waits(tmp_path: Path, reason: str, words: str, remedy: str) -> None:
    """Slurm's words for waiting jobs come in plain words, with what to type where waiting alone does not help."""
    found = judged(tmp_path / "run", [Job("7", 0, "PENDING", reason, "", "run-first-t", "")])
    assert words in found.stages[0].packs[0].why
    assert remedy in text(found).rpartition("What to do next: ")[2]


def test_a_continuation_job_is_waited_for(tmp_path: Path) -> None:
    """While a job that submits the rest is queued, nobody is told to run the launcher again now."""
    found = judged(tmp_path / "run", [])
    assert "Run the launcher again" in text(found)
    found.queue.others = [("continuation", Job("9", 0, "PENDING", "Dependency", "", "run-continuation-u", ""))]
    assert text(found).endswith("nothing but wait: the continuation job 9_0 submits what is left.")
    failed = judged(tmp_path / "run", [Job("7", 0, "TIMEOUT", "TimeLimit", "", "run-first-t", "")])
    failed.queue.others = found.queue.others
    assert "then wait until the continuation job 9_0, which submits what is left, has ended; then run" in text(failed)


def test_a_controller_that_is_down(tmp_path: Path) -> None:
    """The user is told how to ask whether the controller is up."""
    found = judged(tmp_path / "run", [])
    found.queue.answered = False
    found.queue.notes.append("Slurm did not answer")
    assert "Slurm does not answer: type `scontrol ping`" in text(found)


def test_a_driver_that_was_killed(tmp_path: Path) -> None:
    """A job whose driver was killed left nothing to repair: it is missing, not failed."""
    root = tmp_path / "run"
    root.mkdir()
    log_event(root, "first", "start", pack=0, attempt="7_0.r0", node="node1")
    found = judged(root, [Job("7", 0, "FAILED", "NonZeroExitCode", "node1", "run-first-t", "")])
    pack = found.stages[0].packs[0]
    assert (pack.state, "there is nothing to repair" in pack.why) == ("missing", True), pack
    assert "Run the launcher again" in text(found)


def test_what_was_refused_is_said(tmp_path: Path) -> None:
    """A command's own error stands in the table: a full disk is not an input that is not right."""
    script = "import sys; print('error: /data: No space left on device', file=sys.stderr); sys.exit(2)"
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1, script=script))).run() == 1
    assert "failed: refused: /data: No space left on device" in shown(root)


@pytest.mark.parametrize(
    ("state", "reason", "expected", "words"),
    [
        ("RUNNING", "None", "running", "running"),
        ("COMPLETING", "None", "running", "is just ending"),
        ("REQUEUED", "None", "pending", "about to start"),
        ("PENDING", "BeginTime", "pending", "was requeued"),
        ("PENDING", "QOSMaxJobsPerUserLimit", "pending", "QOSMaxJobsPerUserLimit"),
        ("PENDING", "DependencyNeverSatisfied", "blocked", "can never start"),
        ("PREEMPTED", "None", "missing", "no failure"),
        ("NODE_FAIL", "None", "missing", "no failure"),
        ("CANCELLED", "None", "missing", "cancelled"),
        ("COMPLETED", "None", "missing", "marker is missing"),
        ("TIMEOUT", "TimeLimit", "failed", "time limit"),
        ("OUT_OF_MEMORY", "OutOfMemory", "failed", "mem_gb"),
        ("FAILED", "NonZeroExitCode", "failed", "NonZeroExitCode"),
    ],
)
def test_what_slurms_states_mean(tmp_path: Path, state: str, reason: str, expected: State, words: str) -> None:
    """Every state of a job without a marker is told apart; preemption, lost nodes and requeues are no failures."""
    found = judged(tmp_path / "run", [Job("7", 0, state, reason, "node1", "run-first-t", "")])
    pack = found.stages[0].packs[0]
    assert (pack.state, words in pack.why) == (expected, True), pack
    dependant = found.stages[1].packs[0].state
    assert dependant == ("blocked" if expected in ("failed", "blocked") else "missing")
    assert as_json(found)["stages"][0][expected] == 1


def test_a_marker_outweighs_slurm(tmp_path: Path) -> None:
    """A task with a valid marker is done although its job is said to have failed."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root, shards=1))
    (root / "a").mkdir()
    (root / "a" / "0.txt").write_text("x")
    Marker.of(root, plan.chain.keys["first"][0], ["a/0.txt"]).write(marker_path(root, "first", 0))
    found = judged(root, [Job("7", 0, "FAILED", "NonZeroExitCode", "node1", "run-first-t", "")])
    assert found.stages[0].count("done") == 1


def test_elements_that_never_started_share_a_record() -> None:
    """sacct's 10_[1-2,7%4] is three elements, 10_3 is one, and `CANCELLED by 1000` is CANCELLED."""
    record = ("CANCELLED by 1000", "Dependency", "None assigned", "run-first-t")
    assert [(one.id, one.state, one.node) for one in _records("10_[1-2,7%4]", *record)] == [
        (f"10_{n}", "CANCELLED", "") for n in (1, 2, 7)
    ]
    assert [one.id for one in _records("10_3", *record)] == ["10_3"]
    assert [(one.id, one.index) for one in _records("10", *record)] == [("10", None)]


def test_whose_job_it_is(tmp_path: Path) -> None:
    """Token or batch file make a job this run's; the same run name elsewhere and a reused job id do not."""
    owner = Owner.of(tmp_path, [{"stage": "first", "job": "7", "packs": [0], "token": "aa11"}])
    own = f"{tmp_path}/sbatch/second/.submission_file_x.sh"
    assert owner.work(Job("7", 0, "RUNNING", "", "", "run-first-aa11", "/elsewhere.sh")) == [("first", 0)]
    assert owner.work(Job("9", 0, "RUNNING", "", "", "run-second-bb22", own)) == [("second", 0)]
    assert owner.work(Job("9", 0, "RUNNING", "", "", "run-first-bb22", "/other/run/sbatch/first/x.sh")) == []
    assert owner.work(Job("7", 0, "RUNNING", "", "", "thesis", "/home/me/thesis.sh")) == []


def test_by_the_attempts_folder_when_events_are_lost(tmp_path: Path) -> None:
    """Without an events file, attempts are counted by their folders and the tasks are missing."""
    root = tmp_path / "run"
    LocalScheduler(toy.plan(root, toy.two_stages(root, script=BROKEN))).run()
    (root / "events.jsonl").unlink()
    output = shown(root)
    assert row(output, "first")["attempts"] == "3"
    assert "Run the launcher again" in output
    write_json(root / "lock", {"host": "elsewhere", "pid": 1, "process_start": "1"})
    assert "note: a launcher works on this run: process 1 on elsewhere" in shown(root)
