#!/usr/bin/env python3
"""python jobs/status.py [RUN] [--json]

Shows how a run is doing: what is done, runs, waits or has failed and why, the ends of the logs of failing tasks, and
what to do next. RUN is a run's folder or name; without it, the newest run is shown. Only the run's folder is needed,
not its recipe.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.monitor.status import main

if __name__ == "__main__":
    run_main(lambda: main(__doc__))
