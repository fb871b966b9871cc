"""python jobs/preprocess.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler auto|local|slurm] [--dry-run] …

Raw text to deduplicated shards and the joined text files: the first part of jobs/submit_all.py.
"""

from snakmodel.launch import launch
from snakmodel.publish import run_main

STAGES = [
    "prepare",
    "dedup-signatures",
    "dedup-buckets",
    "dedup-components",
    "dedup-filter",
    "export-text",
    "join-text",
]

if __name__ == "__main__":
    run_main(lambda: launch(__doc__, STAGES))
