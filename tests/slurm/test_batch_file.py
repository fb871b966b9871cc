"""What Slurm is given, without a Slurm: the text of a batch file, array ranges, the journal."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.core.utils import FailedSubmissionError

from run_contract.errors import UserError
from snakmodel.config.cluster import Resources
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.batch_file import make_executor
from snakmodel.slurm.jobs import array_ranges
from snakmodel.slurm.journal import Journal, Submission, read_lines
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy

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


def test_the_id_among_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line that is an id counts, whatever a site's sbatch prints around it; without one nothing is made up."""
    site(tmp_path / "bin", monkeypatch, SBATCH)
    plan = toy.plan(tmp_path / "run", toy.two_stages(tmp_path / "run"))
    executor = make_executor(plan, plan.chain["first"], tmp_path / "sbatch", [0], "", "t")
    assert executor.send("true") == "17"
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'your job 424242 was queued'\n")
    with pytest.raises(FailedSubmissionError, match="sbatch printed no job id"):
        executor.send("true")


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


def test_dry_run_chains_the_stages(tmp_path: Path) -> None:
    """Without a Slurm the same three arrays are written; with pack 1 of the first stage done, it is not waited for."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root))
    found = SlurmScheduler(plan, dry=True).run()
    assert [(one.stage, one.packs, one.dependency) for one in found] == [
        ("first", [0, 1, 2], ""),
        ("second", [0, 1, 2], "aftercorr:<first>"),
        ("last", [0], "afterok:<second>"),
    ]
    plan.missing["first"].remove(1)
    found = SlurmScheduler(plan, dry=True).run()
    assert [(one.stage, one.packs, one.dependency) for one in found] == [
        ("first", [0, 2], ""),
        ("second", [0, 2], "aftercorr:<first>"),
        ("second", [1], ""),
        ("last", [0], "afterok:<second>"),
    ]


def test_ten_thousand_shards_are_a_few_calls(tmp_path: Path) -> None:
    """An array a stage, whatever the number of shards; array_parallelism, or a smaller MaxJobs, is its %N."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root, 10_000), {"slurm": {"array_parallelism": 50}})
    assert [(one.stage, len(one.packs)) for one in SlurmScheduler(plan, dry=True).run()] == [
        ("first", 10_000),
        ("second", 10_000),
        ("last", 1),
    ]
    assert "#SBATCH --array=0-9999%50\n" in (root / "sbatch" / "first" / "dry-run-0.sh").read_text()
    narrow = make_executor(plan, plan.chain["first"], root / "sbatch", range(100), "", "t", running=7)
    assert "#SBATCH --array=0-99%7\n" in narrow.text("true")


@pytest.mark.parametrize(
    ("packs", "text"), [([5], "5"), ([0, 1, 2, 7], "0-2,7"), ([3, 2, 9, 8], "2-3,8-9"), (range(10000), "0-9999")]
)
def test_array_ranges(packs: list[int], text: str) -> None:
    """Numbers become Slurm's ranges, in order."""
    assert array_ranges(packs) == text


def test_journal_survives_half_a_line(tmp_path: Path) -> None:
    """A line that a killed launcher left unfinished is skipped, and the next one is whole."""
    paths = RunPaths(tmp_path)
    journal = Journal(paths)
    journal.accept(Submission("first", [0, 1], "", "token1", job="17"))
    with paths.submissions.open("a") as file:
        file.write('{"stage": "sec')
    journal.accept(Submission("second", [0], "afterok:17", "token2", job="18"))
    assert [(one["stage"], one["job"], one["packs"]) for one in read_lines(paths.submissions)] == [
        ("first", "17", [0, 1]),
        ("second", "18", [0]),
    ]
