"""What Slurm is given, without a Slurm: the text of a batch file, and what is read from sbatch and the queue."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from submitit.core.utils import FailedSubmissionError

from run_contract.errors import UserError
from snakmodel.config.cluster import Resources
from snakmodel.slurm import batch_file
from snakmodel.slurm.batch_file import _Executor, active_packs, choose, make_executor, scrub_environment
from snakmodel.slurm.journal import Journal, Submission
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy

from .fake_slurm import FakeSlurm, option

GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=project
#SBATCH --array=0-2,7%4
#SBATCH --comment=0123456789
#SBATCH --cpus-per-task=1
#SBATCH --dependency=aftercorr:17
#SBATCH --job-name=run-second-0123456789
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={folder}/logs/run/second/%5a.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --time=120

# setup
trap : TERM
cd {project} || exit 1
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
python -m snakmodel.job.driver tasks.json
"""


def test_batch_file(tmp_path: Path) -> None:
    """The batch file of four packs says exactly this."""
    root = tmp_path / "run"
    settings = {"slurm": {"account": "project", "partition": "cpu", "setup": ["module load cuda"]}}
    plan = toy.plan(root, toy.two_stages(root, 8), settings)
    executor = make_executor(plan, plan.chain["second"], root / "sbatch", [0, 1, 2, 7], "aftercorr:17", "0123456789")
    project = Path(__file__).resolve().parents[2]
    expected = GOLDEN.format(folder=tmp_path, project=project)
    assert executor.text("python -m snakmodel.job.driver tasks.json") == expected


def test_width_is_what_may_run_at_the_same_time(tmp_path: Path) -> None:
    """The smallest of array_parallelism, MaxJobs and the number of packs."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path, 100), {"slurm": {"array_parallelism": 50}})

    def array(packs: int, running: int | None) -> str:
        executor = make_executor(plan, plan.chain["first"], tmp_path / "sbatch", range(packs), "", "t", running)
        return option(executor.text("true"), "array")

    assert array(100, None) == "0-99%50"
    assert array(100, 7) == "0-99%7"
    assert array(3, 7) == "0-2%3"


def test_signal_is_for_stages_that_can_save(tmp_path: Path) -> None:
    """Only a resumable stage gets a notice before its time limit."""
    stage = toy.two_stages(tmp_path)[0]
    plan = toy.plan(tmp_path, [stage], {"slurm": {"signal_seconds": 300}})
    texts = {}
    for resumable in (False, True):
        one = replace(stage, resumable=resumable)
        texts[resumable] = make_executor(plan, one, tmp_path / "sbatch", [0], "", "t").text("true")
    assert (option(texts[False], "signal"), option(texts[True], "signal")) == ("", "USR2@300")


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("17\n", "17"),
        ("17;cluster\n", "17"),
        ("Since Monday your job 424242 used 3 h.\n17\nSubmitted batch job 17 to the queue\n", "17"),
        ("welcome\n4242\n17\n", "17"),
    ],
)
def test_the_id_in_what_sbatch_prints(printed: str, job: str) -> None:
    """The last line that is an id as --parsable prints it counts."""
    assert _Executor._get_job_id_from_submission_command(printed) == job
    assert _Executor._get_job_id_from_submission_command(printed.encode()) == job


def test_no_id_in_what_sbatch_prints() -> None:
    """The error holds the words, so that the journal can look for the job."""
    with pytest.raises(FailedSubmissionError, match="printed no job id, but: 'Submitted batch job 17'"):
        _Executor._get_job_id_from_submission_command("Submitted batch job 17\n")


def test_active_packs(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Only what is queued or running counts, and it is known by its token, or by its id if it was submitted by hand."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path))
    assert (active_packs(plan), slurm.calls) == ({}, [])
    journal = Journal(plan.paths)
    journal.accept(Submission("first", [0, 1, 2], "", "aaa", job="424242"))
    journal.accept(Submission("second", [0, 1], "", "hand-1", job="12"))
    journal.accept(Submission("last", [0], "", "ccc", job="13"))
    slurm.jobs = {"11": "run-first-aaa", "12": "step 2", "13": "run-last-ccc", "14": "run-last-stranger"}
    slurm.elements = {"11": [0, 2], "12": [1], "13": [0], "14": [0]}
    slurm.end("13")
    assert active_packs(plan) == {"first": {0: "11", 2: "11"}, "second": {1: "12"}}


def test_the_surrounding_job_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch would read such variables as options; what names the cluster stays."""
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    scrub_environment()
    left = [name for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_CONF") if name in os.environ]
    assert left == ["SLURM_CONF"]


@pytest.mark.parametrize(
    ("code", "said", "chosen"),
    [
        (0, "Slurmctld(primary) at head is UP", "slurm"),
        (1, "slurm_load_ctl_conf error: failed to fetch config", "local"),
        (1, "could not establish a configuration source", "local"),
    ],
)
def test_auto_is_slurm_where_a_controller_answers(
    monkeypatch: pytest.MonkeyPatch, code: int, said: str, chosen: str
) -> None:
    """A machine with Slurm's programs but without its configuration does the work itself."""
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    monkeypatch.setattr(batch_file, "run_tool", lambda argv: CompletedProcess(argv, code, said, ""))
    assert choose("auto") == chosen


def test_auto_refuses_to_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A silent controller, or a configuration that is not there, is an error that says what to do."""
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    monkeypatch.setattr(batch_file, "run_tool", lambda argv: CompletedProcess(argv, 0, "head is DOWN", ""))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(UserError, match=r"does not answer: head is DOWN\n.*--scheduler local"):
        choose("auto")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone, which does not exist"):
        choose("auto")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert (choose("auto"), choose("slurm")) == ("local", "slurm")


def test_every_option_that_has_a_key(tmp_path: Path) -> None:
    """What cluster.yaml says beyond resources is in the batch file, and so is an option that has no key."""
    slurm = {
        "clusters": "east", "exclusive": True, "licenses": "matlab:1", "nice": 7, "reservation": "course",
        "sbatch_args": ["--tmp=3G", "--spread-job"], "switches": "1@00:05:00", "wckey": "thesis",
    }  # fmt: skip
    root = tmp_path / "run"
    first = replace(toy.two_stages(root)[0], resources=Resources(mem_per_cpu="4G"))
    plan = toy.plan(root, [first], {"slurm": slurm})
    lines = make_executor(plan, plan.chain["first"], tmp_path / "sbatch", [0], "", "t").text("true").splitlines()
    expected = ["clusters=east", "exclusive", "licenses=matlab:1", "mem-per-cpu=4G", "nice=7", "reservation=course"]
    expected += ["spread-job", "switches=1@00:05:00", "tmp=3G", "wckey=thesis"]
    assert [option for option in expected if f"#SBATCH --{option}" not in lines] == []


SBATCH = """#!/bin/sh
echo 'Since Monday your job 424242 used 3 h.'
echo '17;east'
echo 'Submitted batch job 99 to the project queue'
"""
"""A site's sbatch: it says more than the id, which --parsable writes in a line of its own."""


def site(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> None:
    """Put this sbatch first on PATH."""
    folder.mkdir()
    (folder / "sbatch").write_text(sbatch)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("name", ["100%A of %j", "it's $HOME; #1", "%5a"])
def test_names_that_slurm_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the path of a log % is doubled, and the batch file lies in the run's own folder."""
    site(tmp_path / "bin", monkeypatch, SBATCH)
    root = tmp_path / "runs" / name
    plan = toy.plan(root, toy.two_stages(root))
    executor = make_executor(plan, plan.chain["first"], root / "sbatch", [0], "", "t")
    [output] = [line for line in executor.text("true").splitlines() if line.startswith("#SBATCH --output=")]
    log = f"{plan.logs('first')}".replace("%", "%%")
    assert output == f"#SBATCH --output={shlex.quote(f'{log}/%5a.out')}"
    executor.send("true")
    assert [path.name for path in root.parent.iterdir()] == [name]
    assert len(list((root / "sbatch").glob("*.sh"))) == 1
    subprocess.run(["bash", "-n", *(root / "sbatch").glob("*.sh")], check=True)


def test_a_name_that_no_batch_file_can_hold(tmp_path: Path) -> None:
    """A backslash, which sbatch drops, is refused when planning, also without a Slurm."""
    plan = toy.plan(tmp_path / "back\\slash", toy.two_stages(tmp_path / "back\\slash"))
    with pytest.raises(UserError, match="the folder for logs cannot be named to Slurm"):
        SlurmScheduler(plan, dry=True).run()
