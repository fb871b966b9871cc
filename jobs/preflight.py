"""python jobs/preflight.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler S] [--no-drill]

Would the run work here? Checks everything that can be known before jobs/submit_all.py; exits 1 if anything failed.
"""

from snakmodel.preflight import main
from snakmodel.publish import run_main

if __name__ == "__main__":
    run_main(main)
