#!/usr/bin/env python3
"""python jobs/preprocess.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Turns raw text into deduplicated shards and joined text files: the first part of jobs/submit_all.py.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.chain.build import STAGES
from snakmodel.launch.launcher import launch

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES[: STAGES.index("tokenize")]))
