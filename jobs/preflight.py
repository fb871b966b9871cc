#!/usr/bin/env python3
"""python jobs/preflight.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler S] [--no-drill]

Checks whether a run would work here, as far as that can be known before jobs/submit_all.py; exits with 1 if anything
failed.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.preflight.checks import main

if __name__ == "__main__":
    run_main(main)
