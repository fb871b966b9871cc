"""What a job asks Slurm about itself: why it is being ended, to be started again, and to be kept off certain nodes.

`requeue` is the only place that asks for a job to be started again, and it takes every precaution that this needs.

The following was seen on Slurm 22.05 while a job was being ended:

- At the time limit, Reason is TimeLimit.
- At preemption, PreemptTime is set. With PreemptMode=REQUEUE, Restarts is raised already instead.
- `scontrol requeue` raises Restarts too, and only accounting tells it from preemption (PREEMPTED, REQUEUED).
- A job that a user cancelled shows none of these signs.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from run_contract.output import say
from snakmodel.run.attempts import Attempt, Kind
from snakmodel.slurm.ask import NO_ACCOUNTING, NOT_FOUND, run_tool

_SECONDS = 60
_PERMANENT = (
    "presently disabled",
    "Invalid job id",
    "ermission denied",
    "not supported",
    "Only batch jobs",
    "already finished",
)
_PASSING = ("timed out", "Unable to contact", "Connection", "Zero Bytes", "temporarily", "Communication", "ransi")
"""Words of refusals that may pass, however long it takes: the controller is down, or the job is changing its state."""
_PATIENCE_SECONDS = 600
"""Seconds after which any other refusal is taken for final."""
_NOTICE_SLACK_SECONDS = 90
_ACCOUNTING_SECONDS = 3.0
"""Seconds that a start which is being ended waits for accounting to hear of it; not longer, since it is killed soon."""
_KINDS: Mapping[str, Kind] = {"PREEMPTED": "preempted", "REQUEUED": "requeued", "NODE_FAIL": "node-failure"}
"""Maps the state in which accounting records a start that was followed by another one to why the first one ended."""


@dataclass(frozen=True)
class JobState:
    """What the controller says about a job."""

    fields: dict[str, str]

    @property
    def restarts(self) -> int:
        """How often the job has been started before, including a restart that is already decided."""
        return int(self.fields.get("Restarts", "0"))

    def kind(self, attempt: Attempt, notice_seconds: float) -> Kind:
        """Why the attempt is being ended. `notice_seconds`: how long before the time limit jobs are signalled."""
        if self.fields.get("PreemptTime", "None") not in ("None", "N/A", ""):
            return "preempted"
        if self.fields.get("Reason") == "TimeLimit":
            return "timeout"
        if self.restarts > attempt.restart:  # the requeue wipes PreemptTime, but accounting knows what it was
            return accounted_kind(attempt, _ACCOUNTING_SECONDS)
        if self.fields.get("JobState") in ("COMPLETING", "CANCELLED"):
            return "cancelled"
        return "timeout" if self._seconds_left() < notice_seconds + _NOTICE_SLACK_SECONDS else "requested"

    def _seconds_left(self) -> float:
        try:
            return (datetime.fromisoformat(self.fields["EndTime"]) - datetime.now()).total_seconds()
        except (KeyError, ValueError):
            return float("inf")


def accounted_kind(attempt: Attempt, patience: float) -> Kind:
    """Why Slurm started an attempt's job again by itself, or "restarted" if accounting does not know it.

    Accounting hears of it from the controller a moment later, and is given `patience` seconds for that.
    """
    return _KINDS.get(accounted_end(attempt, patience), "restarted")


def accounted_end(attempt: Attempt, patience: float = 0.0) -> str:
    """The state in which accounting records this start of its job, such as PREEMPTED, REQUEUED or NODE_FAIL.

    It is empty where there is no accounting, or where accounting has not heard of the end within `patience` seconds.
    """
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", "--format=Start,State"]
    end = time.monotonic() + patience
    while True:
        asked = _ask(*command, f"--jobs={attempt.job}")
        rows = sorted(line.split("|") for line in asked.stdout.splitlines() if not line.startswith("Unknown|"))
        words = rows[attempt.restart][1].split() if len(rows) > attempt.restart else []
        state = words[0] if words else ""
        if asked.returncode == 0 and state not in ("", "RUNNING", "PENDING", "COMPLETING"):
            return state
        never = asked.returncode == NOT_FOUND or NO_ACCOUNTING in asked.stderr
        if never or time.monotonic() > end:
            return ""
        time.sleep(0.5)


def job_state(job: str) -> JobState | None:
    """What the controller says about a job, or None if it does not answer."""
    asked = _scontrol("show", "job", "--oneliner", job)
    if asked.returncode or "JobState=" not in asked.stdout:
        return None
    fields = re.findall(r"(\S+?)=(\S*)", asked.stdout)
    return JobState(dict(reversed(fields)))  # the first field of a name counts: paths come last and may hold anything


@dataclass(frozen=True)
class End:
    """The result of asking Slurm to start a job again."""

    result: Literal["requeued", "cancelled", "refused"]
    """Requeued: Slurm starts it again; cancelled: a user has cancelled it; refused: Slurm will never start it again."""
    words: str = ""
    """Slurm's words, where it refused."""


def requeue(attempt: Attempt, reason: str, check: Callable[[], None]) -> End:
    """Ask Slurm to start an attempt's job again, until it agrees or refuses for good.

    A job that Slurm starts again by itself is left alone. So is a job that a user has cancelled, since the request
    would bring it back. `check` is called before each request, and raises if the attempt may no longer ask.
    """
    job, pause, began = attempt.job, 0.5, time.monotonic()
    while True:
        state = job_state(job)
        if state and state.restarts > attempt.restart:
            say(f"=== Slurm starts {job} again by itself: {reason}")
            return End("requeued")
        if state and state.kind(attempt, 0) == "cancelled":
            say(f"=== {job} was cancelled; it is not requeued")
            return End("cancelled")
        check()
        asked = _scontrol("requeue", job)
        if asked.returncode == 0:
            say(f"=== requeued {job}: {reason}")
            return End("requeued")
        words = asked.stderr.strip()
        passing = any(part in words for part in _PASSING) or time.monotonic() < began + _PATIENCE_SECONDS
        if not passing or any(part in words for part in _PERMANENT):
            say(f"error: Slurm refuses to requeue {job}: {words}", error=True)
            return End("refused", words)
        say(f"scontrol requeue {job}: {words}; again in {pause:.1f} s")
        time.sleep(pause)
        pause = min(60.0, pause * 2)


def exclude(job: str, nodes: Sequence[str], needed: int) -> str | None:
    """Keep a requeued job off some nodes, if its partition has enough other nodes; returns why not, or None.

    Slurm refuses this for a running job: requeue the job first, then call this before the job's processes are killed.
    """
    state = job_state(job)
    if state is None:
        return "the controller does not answer"
    partition = state.fields.get("Partition", "")
    asked = _ask("sinfo", "--noheader", "--Node", "--format=%N %t", "--partition", partition)
    usable = {
        line.split()[0] for line in asked.stdout.splitlines() if line.split()[1] in ("idle", "mix", "alloc", "comp")
    }
    before = state.fields.get("ExcNodeList", "(null)")
    excluded = [] if before == "(null)" else _ask("scontrol", "show", "hostnames", before).stdout.split()
    every = list(dict.fromkeys([*excluded, *nodes]))
    if len(usable - set(every)) < needed:
        return f"partition {partition} would not have {needed} usable node(s) left"
    updated = _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(every)}")
    return None if updated.returncode == 0 else updated.stderr.strip()


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    return _ask("scontrol", *words)


def _ask(*argv: str) -> subprocess.CompletedProcess[str]:
    return run_tool(argv, seconds=_SECONDS, inside=True)
