#!/usr/bin/env python3
"""python jobs/weights.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Converts the base model to the sharded layout that training loads, and verifies it: a part of jobs/submit_all.py.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.launch.launcher import launch

STAGES = ["convert", "verify", "shard"]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
