#!/usr/bin/env python3
"""python jobs/status.py [RUN] [--json]

How a run is doing: what is done, runs, waits or failed, why, the end of the failing logs, and what to do next.
RUN is a run's folder or name; the newest run when absent. Needs the run's folder alone, not its recipe.
"""

import _environment  # noqa: F401 - goes on in the project's environment where this Python lacks it

from run_contract.entry_point import run_main
from snakmodel.monitor.status import main

if __name__ == "__main__":
    run_main(lambda: main(__doc__))
