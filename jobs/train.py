"""python jobs/train.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

The training job, which saves and requeues itself: a part of jobs/submit_all.py.
"""

from snakmodel.launch import launch
from snakmodel.publish import run_main

STAGES = ["train"]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
