#!/usr/bin/env python3
"""python jobs/train.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Runs the training job, which saves its state and requeues itself: a part of jobs/submit_all.py.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.launch.launcher import launch

STAGES = ["train"]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
