#!/usr/bin/env python3
"""python jobs/export.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Converts checkpoints to Hugging Face folders, verifies and pushes them: the last part of jobs/submit_all.py.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.launch.launcher import launch

STAGES = ["merge", "export-hf", "verify-export", "push"]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
