"""What the launchers say about folders that they cannot write."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from run_contract.errors import UserError
from snakmodel.chain.build import STAGES
from snakmodel.launch import launcher
from snakmodel.launch.launcher import _SQUEUE, make_writable
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.journal import Submission, job_name
from snakmodel.slurm.submitter import SubmissionReport
from tests import toy


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, name: str) -> None:
    """--run-dir that names a file, or something below one, is no matter of permissions."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file: move it away, or give another --run-dir") as caught:
        make_writable(tmp_path / name, "the run's folder", "another --run-dir")
    assert "permissions" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_suggested_squeue_tells_stages_apart(tmp_path: Path) -> None:
    """Its last but one column is the whole name of a job, however long, and names of jobs hold their stages."""
    form = shlex.split(_SQUEUE)[-1]
    assert "%j" in form.split()
    names = {job_name(RunPaths(tmp_path / "thesis"), stage, "0123456789") for stage in STAGES}
    assert len(names) == len(STAGES)
    assert all(any(stage in name for name in names) for stage in STAGES)


def test_the_seconds_after_a_submission_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the launcher waits for Slurm to have kept the jobs, it says so and names its squeue."""
    monkeypatch.setattr(launcher, "check_resources", lambda plan: None)
    before: list[str] = []

    def confirm() -> list[str]:
        before.append(capsys.readouterr().out)
        return []

    scheduler = SimpleNamespace(
        plan=toy.plan(tmp_path / "run", toy.two_stages(tmp_path / "run")),
        dry=False,
        run=lambda: SubmissionReport([Submission("first", [0, 1, 2], "", "token", job="7")], {}, {}, 0, None),
        resubmit_forgotten=confirm,
    )
    assert launcher._submit(scheduler) == 0  # type: ignore[arg-type]
    assert _SQUEUE in before[0]
    assert before[0].rstrip().splitlines()[-1].startswith("Making sure that Slurm has kept them; this takes up to ")
