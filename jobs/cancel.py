#!/usr/bin/env python3
"""python jobs/cancel.py RUN [--stage S] [--yes]

Cancels everything of a run that is queued or running, and nothing else: its jobs in Slurm, or the launcher that runs it
on this machine. It first shows what that is, and asks. What is done stays done, and the launcher, run again, continues
from there.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.monitor.cancel import main

if __name__ == "__main__":
    run_main(lambda: main(__doc__))
