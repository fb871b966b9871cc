"""The one way to ask Slurm a question, so that a missing answer is never taken for an empty one."""

from __future__ import annotations

import os
import signal
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
"""Prefix of the tokens of jobs that were submitted by hand. Their names say nothing, so they are known by their ids."""
LEAKS = ("SLURM_", "SBATCH_", "SRUN_", "PMI", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
"""Prefixes of the variables that hold a user's own defaults for Slurm's tools, or that come from a surrounding job."""
NOT_FOUND = 127
"""Exit code of a tool that is not installed."""
NO_ACCOUNTING = "accounting storage is disabled"
"""Words with which sacct says that the cluster keeps no accounting."""
CLUSTER_VARIABLE = "SLURM_CLUSTERS"
"""Environment variable that directs all of Slurm's tools to one cluster, where several share one accounting."""
KEPT = ("SLURM_CONF", CLUSTER_VARIABLE)
"""Those of Slurm's variables that its tools go on seeing."""


def use_cluster(name: str | None) -> None:
    """From now on, ask this cluster and submit to it; without a name, use the cluster that this machine belongs to."""
    os.environ.pop(CLUSTER_VARIABLE, None)
    if name:
        os.environ[CLUSTER_VARIABLE] = name


class Unanswered(UserError):
    """Slurm did not answer, so what was asked about is unknown; it must not be taken for absent."""


def run_tool(argv: Sequence[str], *, seconds: float = 120, inside: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's tools; one that is missing (exit code 127) or does not answer in time (124) counts as failed.

    The tool sees neither the user's own settings for it nor a surrounding job. With `inside`, a job asks about itself:
    then the tool sees the job, asks the cluster that the job runs on, and is not ended by the signal that ends the job.
    """
    dropped = (CLUSTER_VARIABLE,) if inside else tuple(n for n in os.environ if n.startswith(LEAKS) and n not in KEPT)
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    try:
        return subprocess.run(
            argv, env=env, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
            preexec_fn=_ignore_term if inside else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        return subprocess.CompletedProcess(argv, 124, "", f"{said}{argv[0]}: no answer within {seconds:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(argv, NOT_FOUND, "", f"{argv[0]}: {error.strerror}")


def _ignore_term() -> None:
    """Ignore TERM in the child: Slurm signals every process of a job, and would end the very request for a requeue."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ask(argv: Sequence[str], patience: float = 0.0) -> str:
    """The standard output of one of Slurm's tools, which is asked again for `patience` seconds. Raises Unanswered."""
    end = time.monotonic() + patience
    pause = 2.0
    while True:
        done = run_tool(argv)
        if done.returncode == 0:
            return done.stdout
        words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        if time.monotonic() + pause > end:
            raise Unanswered(f"{argv[0]} did not answer: {words}")
        print(f"{argv[0]}: {words}; asked again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(30.0, pause * 2)


def my_jobs(patience: float = 0.0) -> dict[str, str]:
    """The names, by id, of all jobs of this user that the controller remembers, including ended ones.

    An array is one job.
    """
    lines = ask(["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%F|%j"], patience)
    return {job: name for job, bar, name in (line.strip().partition("|") for line in lines.splitlines()) if bar}


def same_job(name: str, token: str) -> bool:
    """Whether the job of this name is the one that was submitted with a token.

    The id alone does not tell, because a controller uses ids again after it has lost its state or has counted to its
    end. A job that was submitted by hand can only be known by its id.
    """
    return bool(name) and (token.startswith(BY_HAND) or name.endswith(f"-{token}"))


def my_elements(patience: float = 0.0) -> list[tuple[str, int | None, str]]:
    """(Job, array index, name) of every array element of this user that is queued or running.

    The index is None for a job that is no array.
    """
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--states=all", "--format=%F|%K|%T|%j"]
    rows = [line.strip().split("|", 3) for line in ask(command, patience).splitlines()]
    return [
        (job, int(index) if index.isdigit() else None, name) for job, index, state, name in rows if state not in ENDED
    ]


def accounted_jobs(names: Sequence[str], since: str, patience: float = 0.0) -> dict[str, str]:
    """The jobs that accounting knows by these names, as id and name; empty where there is no accounting."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--starttime={since}"]
    command += [f"--name={','.join(names)}", "--format=JobID,JobName"]
    try:
        lines = ask(command)
    except Unanswered as error:
        if NO_ACCOUNTING in str(error):
            return {}
        lines = ask(command, patience)
    rows = [line.split("|", 1) for line in lines.splitlines()]
    return {job.split("_")[0]: name for job, name in rows if name in names}
