"""What sbatch is given for packs and for the continuation job."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import FailedSubmissionError

from run_contract.errors import UserError
from snakmodel.run.task_list import TaskList
from snakmodel.slurm.job_table import WrongId
from snakmodel.slurm.journal import Journal, read_lines
from snakmodel.slurm.sbatch_calls import SbatchCalls, continuation_command, continuation_stage
from tests import toy

from .fake_slurm import FakeSlurm, option


def calls(root: Path, dry: bool = False, **cluster: object) -> SbatchCalls:
    plan = toy.plan(root, toy.two_stages(root), cluster)
    return SbatchCalls(plan, Journal(plan.paths), "series", dry)


def test_packs_become_an_array_that_runs_the_driver(tmp_path: Path, slurm: FakeSlurm) -> None:
    """The batch file names packs, dependency and width, the task list is there, and the journal has the job."""
    made = calls(tmp_path / "run")
    one = made.submit_packs(made.plan.chain["second"], [0, 2], "aftercorr:17", 1)
    text = slurm.texts[one.job]
    assert (option(text, "array"), option(text, "dependency")) == ("0,2%1", "aftercorr:17")
    tasks = tmp_path / "run" / "tasks" / "second.json"
    assert f"\n{sys.executable} -u -m snakmodel.job.driver {tasks}\n" in text
    assert TaskList.read(tasks).packs == [[0], [1], [2]]
    assert (one.stage, one.packs, one.series, one.job) == ("second", [0, 2], "series", "100")
    assert made.submitted == [one]
    [line] = read_lines(made.plan.paths.submissions)
    assert (line["job"], line["token"], line["series"]) == ("100", one.token, "series")
    assert option(text, "comment") == one.token
    assert (tmp_path / "logs" / "run" / "second").is_dir()


def test_cluster_yaml_names_the_python(tmp_path: Path, slurm: FakeSlurm) -> None:
    """The driver and the tasks run with cluster.yaml's interpreter."""
    made = calls(tmp_path / "run", python="/opt/my python")
    one = made.submit_packs(made.plan.chain["first"], [0], "", None)
    assert "\n'/opt/my python' -u -m snakmodel.job.driver " in slurm.texts[one.job]
    assert TaskList.read(tmp_path / "run" / "tasks" / "first.json").python == "/opt/my python"


def test_dry_run_writes_batch_files_only(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Each call has a file of its own, and Slurm and the journal hear of nothing."""
    made = calls(tmp_path / "run", dry=True)
    for packs in ([0, 1], [2]):
        made.submit_packs(made.plan.chain["first"], packs, "", None)
    made.submit_packs(made.plan.chain["last"], [0], "afterok:<first>", None)
    files = sorted(path.relative_to(tmp_path / "run").as_posix() for path in tmp_path.glob("run/sbatch/*/*.sh"))
    assert files == ["sbatch/first/dry-run-0.sh", "sbatch/first/dry-run-1.sh", "sbatch/last/dry-run-0.sh"]
    assert option((tmp_path / "run" / files[1]).read_text(), "array") == "2%1"
    assert [one.job for one in made.submitted] == ["<first>", "<first>", "<last>"]
    assert (slurm.texts, slurm.calls) == ({}, [])
    assert not made.plan.paths.intents.exists()
    assert not made.plan.paths.submissions.exists()


def test_a_refusal_says_what_was_submitted_before(tmp_path: Path, slurm: FakeSlurm) -> None:
    """The user learns which jobs there are, and that the same command submits the rest."""
    made = calls(tmp_path / "run")
    made.submit_packs(made.plan.chain["first"], [0], "", None)

    def refuse(_: str) -> str:
        raise FailedSubmissionError("sbatch: error: Batch job submission failed: Invalid account")

    slurm.sbatch = refuse
    with pytest.raises(
        UserError, match=r"refused stage second: .*Invalid account\nSubmitted before it: first \(100\)\. "
    ):
        made.submit_packs(made.plan.chain["second"], [0], "aftercorr:100", None)
    assert [one.stage for one in made.submitted] == ["first"]


def test_a_wrong_id_is_corrected(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal gets a further line with the actual id, under the same token."""
    made = calls(tmp_path / "run")
    one = made.submit_packs(made.plan.chain["first"], [0, 1], "", None)
    made.correct(WrongId("first", one.token, "100", "17"))
    assert one.job == "17"
    lines = [(line["job"], line["token"], line["packs"]) for line in read_lines(made.plan.paths.submissions)]
    assert lines == [("100", one.token, [0, 1]), ("17", one.token, [0, 1])]
    assert capsys.readouterr().out == "note: the job of stage first is 17, not 100 as sbatch seemed to say\n"


def test_the_continuation_job(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element on one node without a GPU, after the jobs that are named, runs the launcher where it was started."""
    monkeypatch.chdir(tmp_path)
    made = calls(tmp_path / "run", defaults={"gpus_per_node": 4, "nodes": 2, "minutes": 30})
    one = made.submit_continuation(["python", "jobs/submit all.py"], "afterany:17,afterany:18")
    text = slurm.texts[one.job]
    assert (one.stage, one.packs) == ("continuation", [0])
    assert (option(text, "array"), option(text, "nodes"), option(text, "time")) == ("0%1", "1", "30")
    assert option(text, "dependency") == "afterany:17,afterany:18"
    assert option(text, "gpus-per-node") == ""
    command = f"cd {tmp_path} && timeout -s INT 1710 python 'jobs/submit all.py' --continues series; code=$?\n"
    assert command in text
    assert continuation_stage(made.plan.config.cluster).resources.ranks == 1


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (124, True)])
def test_the_continuation_command_in_bash(tmp_path: Path, code: int, requeued: bool) -> None:
    """Its exit code is the launcher's; a launcher that found no room in all its time is requeued (here by a stub)."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name, script in {
        "launcher": f'echo "$PWD $*"; exit {code}', "scontrol": 'echo "scontrol $*"', "sleep": "true",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = continuation_command(folder, [str(tmp_path / "launcher"), "--only", "first"], "abc", 2)
    assert f"timeout -s INT 30 {shlex.quote(str(tmp_path / 'launcher'))} " in command
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    expected = [f"{folder} --only first --continues abc", *(["scontrol requeue 17_0"] if requeued else [])]
    assert (done.stdout.splitlines(), done.returncode) == (expected, code)
