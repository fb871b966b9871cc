#!/usr/bin/env python3
"""python jobs/tokenization.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Turns deduplicated shards into one token file and the order of its samples: a part of jobs/submit_all.py.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.launch.launcher import launch

STAGES = ["tokenize", "merge-tokens", "data-card", "index"]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
