"""What the launchers say about folders that they cannot write."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.chain.build import STAGES
from snakmodel.launch.launcher import _SQUEUE, make_writable
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.journal import job_name


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
