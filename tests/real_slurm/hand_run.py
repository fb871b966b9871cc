"""python -m tests.real_slurm.hand_run FOLDER

The stages of a toy run inside this job, as a batch file of sbatch/ runs the real ones. `submit_by_hand` is the tests'
side of it.
"""

from __future__ import annotations

import pickle
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from run_contract.entry_point import run_main
from snakmodel.chain.stage import Stage
from snakmodel.launch.by_hand import run_plan
from tests import toy

from .toy_run import REPOSITORY, ToyRun

BATCH = """#!/bin/bash
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --output=%(output)s
trap : TERM  # as in the files in sbatch/
cd %(project)s || exit 3
%(setup)s
%(python)s -u -m tests.real_slurm.hand_run %(folder)s
"""


def submit_by_hand(run: ToyRun, stages: Sequence[Stage], *flags: str, setup: str = "", pack: int = 1) -> str:
    """Submit these stages in one job, as its user would; returns the job's id."""
    (run.folder / "stages.pickle").write_bytes(pickle.dumps((list(stages), dict(run.settings), pack)))
    batch = run.folder / "hand.sbatch"
    values = {"project": REPOSITORY, "python": sys.executable, "folder": run.folder}
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    batch.write_text(BATCH % {**quoted, "setup": setup, "output": run.folder / "hand.out"})
    return run.cluster.submit(*flags, batch, cwd=run.folder)


def main() -> int:
    """Run what is missing."""
    folder = Path(sys.argv[1])
    stages, settings, pack = pickle.loads((folder / "stages.pickle").read_bytes())
    return run_plan(toy.plan(folder / "run", stages, settings, pack))


if __name__ == "__main__":
    run_main(main)
