"""Questions to Slurm: one way to ask, so that no answer is never taken for an empty one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from run_contract.errors import UserError

ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
BY_HAND = "hand-"
"""How the tokens of jobs begin that were submitted by hand: their names say nothing, so their ids have to."""
_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_")
"""How a person's own defaults for Slurm's tools, and the variables of a surrounding job, begin."""
_SECONDS = 120
"""A query that takes longer is given up."""


CLUSTER_VARIABLE = "SLURM_CLUSTERS"
"""Directs all of Slurm's tools to a cluster, where several share one accounting."""
KEPT = ("SLURM_CONF", CLUSTER_VARIABLE)
"""Variables of Slurm's that its tools go on seeing."""


def use_cluster(name: str | None) -> None:
    """From now on ask this cluster and submit to it; without a name, the one at hand."""
    os.environ.pop(CLUSTER_VARIABLE, None)
    if name:
        os.environ[CLUSTER_VARIABLE] = name


class Unanswered(UserError):
    """Slurm did not answer: whatever was asked is unknown, not absent."""


def ask(argv: Sequence[str], patience: float = 0.0) -> str:
    """The standard output of a Slurm command, untouched by the person's own settings for it.

    It is asked again for `patience` seconds. Raises Unanswered.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS) or key in KEPT}
    end = time.monotonic() + patience
    pause = 2.0
    while True:
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, env=kept
            )
            if done.returncode == 0:
                return done.stdout
            words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
        if time.monotonic() + pause > end:
            raise Unanswered(f"{argv[0]} did not answer: {words}")
        print(f"{argv[0]}: {words}; asked again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(30.0, pause * 2)


def my_jobs(patience: float = 0.0) -> dict[str, str]:
    """Id -> name of every job of this user that the controller remembers, ended ones too; an array is one job."""
    lines = ask(["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%F|%j"], patience)
    return {job: name for job, bar, name in (line.strip().partition("|") for line in lines.splitlines()) if bar}


def same_job(name: str, token: str) -> bool:
    """Whether the job of this name is the one that was submitted with a token.

    Its id alone does not tell: a controller that lost its state, or has counted to its end, uses ids again. A batch
    file submitted by hand has only its id.
    """
    return bool(name) and (token.startswith(BY_HAND) or name.endswith(f"-{token}"))


def my_elements(patience: float = 0.0) -> list[tuple[str, int | None, str]]:
    """(job, array index, name) of every array element of this user that is queued or running.

    A job that is no array has None for an index.
    """
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--states=all", "--format=%F|%K|%T|%j"]
    rows = [line.strip().split("|", 3) for line in ask(command, patience).splitlines()]
    return [
        (job, int(index) if index.isdigit() else None, name) for job, index, state, name in rows if state not in ENDED
    ]


def accounted_jobs(names: Sequence[str], since: str, patience: float = 0.0) -> dict[str, str]:
    """Id -> name of the jobs that accounting knows by these names; none where there is no accounting."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--starttime={since}"]
    command += [f"--name={','.join(names)}", "--format=JobID,JobName"]
    try:
        lines = ask(command)
    except Unanswered as error:
        if "accounting storage is disabled" in str(error):
            return {}
        lines = ask(command, patience)
    rows = [line.split("|", 1) for line in lines.splitlines()]
    return {job.split("_")[0]: name for job, name in rows if name in names}
