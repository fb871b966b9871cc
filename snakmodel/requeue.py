"""What a job asks Slurm about itself: why it is being ended, to be started again, and not on a certain node.

Seen on Slurm 22.05 while a job is being ended: at the time limit Reason is TimeLimit; at preemption PreemptTime is set,
or, with PreemptMode=REQUEUE, Restarts is already raised (as by `scontrol requeue`); a job that a person cancelled has
neither.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from snakmodel.attempts import Attempt, Kind

_SECONDS = 60
_PERMANENT = ("presently disabled", "Invalid job id", "ermission denied", "not supported")
_NOTICE_SLACK_SECONDS = 90


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job."""

    fields: dict[str, str]

    @property
    def restarts(self) -> int:
        """How often it has been started before, including a restart that is already decided."""
        return int(self.fields.get("Restarts", "0"))

    def kind(self, attempt: Attempt, notice_seconds: float) -> Kind:
        """Why the attempt is being ended. `notice_seconds`: how long before the time limit jobs are signalled."""
        if self.fields.get("PreemptTime", "None") not in ("None", "N/A", ""):
            return "preempted"
        if self.fields.get("Reason") == "TimeLimit":
            return "timeout"
        if self.restarts > attempt.restart:  # the requeue wipes PreemptTime: what the partition does has to serve
            return "preempted" if _preempts_by_requeue(self.fields.get("Partition", "")) else "requeued"
        if self.fields.get("JobState") in ("COMPLETING", "CANCELLED"):
            return "cancelled"
        return "timeout" if self._seconds_left() < notice_seconds + _NOTICE_SLACK_SECONDS else "requested"

    def _seconds_left(self) -> float:
        try:
            return (datetime.fromisoformat(self.fields["EndTime"]) - datetime.now()).total_seconds()
        except (KeyError, ValueError):
            return float("inf")


def _preempts_by_requeue(partition: str) -> bool:
    return "PreemptMode=REQUEUE" in _scontrol("show", "partition", "--oneliner", partition).stdout


def job_state(job: str) -> JobState | None:
    """What the controller says of a job, or None if it does not answer."""
    asked = _scontrol("show", "job", "--oneliner", job)
    if asked.returncode or "JobState=" not in asked.stdout:
        return None
    return JobState(dict(re.findall(r"(\S+?)=(\S*)", asked.stdout)))


@dataclass(frozen=True)
class Answer:
    """Slurm's answer to a request."""

    accepted: bool
    permanent: bool
    """Asking again would not help."""
    words: str


def ask_requeue(job: str) -> Answer:
    """Ask once for a job to be started again."""
    asked = _scontrol("requeue", job)
    words = asked.stderr.strip()
    return Answer(asked.returncode == 0, any(part in words for part in _PERMANENT), words)


def exclude(job: str, nodes: Sequence[str], needed: int) -> str | None:
    """Keep a requeued job off some nodes, if the partition has enough others; returns why not, or None.

    Slurm refuses this for a running job: requeue first, then call this before the job's processes are killed.
    """
    state = job_state(job)
    if state is None:
        return "the controller does not answer"
    partition = state.fields.get("Partition", "")
    asked = _run("sinfo", "--noheader", "--Node", "--format=%N %t", "--partition", partition)
    usable = {
        line.split()[0] for line in asked.stdout.splitlines() if line.split()[1] in ("idle", "mix", "alloc", "comp")
    }
    before = state.fields.get("ExcNodeList", "(null)")
    excluded = [] if before == "(null)" else _run("scontrol", "show", "hostnames", before).stdout.split()
    every = list(dict.fromkeys([*excluded, *nodes]))
    if len(usable - set(every)) < needed:
        return f"partition {partition} would not have {needed} usable node(s) left"
    updated = _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(every)}")
    return None if updated.returncode == 0 else updated.stderr.strip()


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    return _run("scontrol", *words)


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, preexec_fn=_ignore_term)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(argv, 1, "", str(error))


def _ignore_term() -> None:
    """In the child: Slurm signals every process of the job, and so would end the very request to be requeued."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
