#!/usr/bin/env python3
"""python jobs/submit_all.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Runs the whole chain, from raw text to the pushed model: whatever is missing is submitted to Slurm, or run on this
machine. It may be run as often as you like.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.launch.launcher import launch

if __name__ == "__main__":
    run_main(lambda: launch(__doc__))
