"""The parent of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snakmodel.run.attempts import Attempt, claim_path, take_claim
from tests import toy


@pytest.mark.parametrize(("given", "code"), [(True, 0), (False, 2)])
def test_a_rank_without_its_claim_does_not_begin(tmp_path: Path, given: bool, code: int) -> None:
    """A later attempt could not keep it from publishing, so in a claimed run it writes nothing and says why."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root, shards=1))
    tasks = plan.write_task_list(plan.chain["first"], sys.executable)
    claim = claim_path(root, "first", 0)
    assert take_claim(claim, Attempt("7_0", 0))
    attempt = root / "attempts" / "first" / "00000" / "7_0.r0"
    attempt.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SNAKMODEL_"))}
    environment |= {"RANK": "0", "LOCAL_RANK": "0"}
    if given:
        environment |= {"SNAKMODEL_CLAIM": str(claim), "SNAKMODEL_ATTEMPT": "7_0.r0"}
    command = [sys.executable, "-m", "snakmodel.job.supervisor", str(tasks), "--task", "0", "--folder", str(attempt)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (root / "a" / "0.txt").exists() is given, ended.stderr
    assert f'"code": {code}' in next(attempt.glob("task-*.rank-*.json")).read_text()
    assert ("rank 0 was started without SNAKMODEL_CLAIM" in ended.stderr) is not given
