"""Attempts of a pack of tasks: which one holds the claim, what the exit records of its ranks say, and what follows.

A run's folder holds claims/STAGE/PACK.json, which names the attempt that may publish, and attempts/STAGE/PACK/ATTEMPT/
with start.json, one exit record per rank and task, and summary.json. The summary is missing if the attempt ended
without a record, for example because its node failed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from run_contract.errors import EXIT_AGAIN, EXIT_DONE, EXIT_INPUTS_MISSING, EXIT_STOPPED, EXIT_USER_ERROR
from run_contract.publish import encoded, write_json

Outcome = Literal["done", "again", "stopped", "interrupted", "refused", "crashed", "lost"]
"""How an attempt ended, in the order of the words: the work is done; the state is saved and the command has to be run
again; the state is saved and the command stopped on request; a signal from outside ended it; inputs are missing or the
user has made a mistake, so that a retry is not worth it; anything else; no record was left."""

Kind = Literal[
    "",
    "timeout",
    "preempted",
    "requested",
    "requeued",
    "restarted",
    "cancelled",
    "node-failure",
    "no-record",
    "crash",
    "hung",
    "disk-full",
]
"""Why an attempt ended before its work was done, in the order of the words: the time limit or its notice; preemption; a
user's signal; a user's requeue; preemption or a requeue, if it is not known which of the two; a user's scancel; its
node was lost; it left no record although its node was not lost, for example because the run's folder could not be
written; a crash; the watchdog killed it; the disk was full."""

_FROM_OUTSIDE = ("preempted", "requeued", "restarted")
"""The kinds of end that are not the job's fault."""
TOO_SHORT = 3
"""The number of attempts in a row that were signalled to stop before they got further, after which the job fails."""
REPEATED = 2
"""The number of failures of one job on one node after which the job avoids the node."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job for a pack: the job, and how often it had been started before."""

    job: str
    restart: int

    @property
    def name(self) -> str:
        """The name of the attempt in a form that is fit for file names."""
        return f"{self.job}.r{self.restart}"

    @classmethod
    def current(cls) -> Attempt:
        """The attempt that this process belongs to.

        It is named by Slurm's job id and restart count, or by those that the embedded scheduler gave.
        """
        env = os.environ
        restart = int(env.get("SLURM_RESTART_COUNT", env.get("SNAKMODEL_RESTART", "0")))
        if "SLURM_ARRAY_JOB_ID" in env:
            return cls(f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}", restart)
        return cls(env.get("SLURM_JOB_ID") or env.get("SNAKMODEL_JOB") or f"hand{os.getpid()}", restart)


def next_restart(root: Path, stage: str, pack: int, job: str) -> int:
    """The restart number of a job's next attempt at a pack, for a job that starts the pack's driver itself."""
    folders = (root / "attempts" / stage / f"{pack:05d}").glob(f"{job}.r*")
    return max((int(path.name.rpartition(".r")[2]) for path in folders), default=-1) + 1


def claim_path(root: Path, stage: str, pack: int) -> Path:
    """The path of a pack's claim."""
    return root / "claims" / stage / f"{pack:05d}.json"


def take_claim(path: Path, attempt: Attempt) -> bool:
    """Take the claim for `attempt`. Returns False if a later start of the same job holds it already."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        holder = {"job": "", "restart": -1}
    if holder["job"] == attempt.job and holder["restart"] > attempt.restart:
        return False
    write_json(path, {"attempt": attempt.name, **asdict(attempt), "host": os.uname().nodename, "pid": os.getpid()})
    return True


@dataclass(frozen=True)
class ExitRecord:
    """The exit record: how one rank of one task ended."""

    attempt: str
    rank: int
    code: int
    """The exit code, or minus the number of the signal that ended the process."""
    iteration: int | None
    node: str
    seconds: float
    signalled: str = ""
    """The name of the first signal with which the rank's supervisor was signalled."""
    hung: bool = False
    """Whether the watchdog killed the rank."""

    @staticmethod
    def path(folder: Path, task: int, rank: int) -> Path:
        """The path of a rank's record in an attempt's folder."""
        return folder / f"task-{task:05d}.rank-{rank:04d}.json"

    @classmethod
    def read(cls, path: Path) -> ExitRecord | None:
        """The record in a file, or None if the rank left no readable one."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


_SIGNALS = {-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT}


def outcome(records: Sequence[ExitRecord | None], signalled: bool) -> Outcome:
    """What the exit records of all ranks mean together. `signalled`: the driver was signalled to end while they ran.

    A rank that a signal has ended counts as interrupted only if the signal reached its supervisor too, because Slurm
    signals every process of a step.
    """
    codes = {record.code if record else None for record in records}
    if codes == {EXIT_DONE}:
        return "done"
    if codes == {EXIT_AGAIN}:
        return "again"
    if codes <= {EXIT_STOPPED, EXIT_AGAIN}:
        return "stopped"
    if signalled and codes <= {None, EXIT_DONE, EXIT_AGAIN, -signal.SIGKILL, *_SIGNALS}:
        return "interrupted"
    if all(record and _signalled_to_end(record) for record in records):
        return "interrupted"
    if codes & {EXIT_INPUTS_MISSING, EXIT_USER_ERROR}:
        return "refused"
    return "crashed"


def _signalled_to_end(record: ExitRecord) -> bool:
    return bool(record.signalled) and not record.hung and record.code in {EXIT_DONE, EXIT_AGAIN, *_SIGNALS}


def culprits(records: Sequence[ExitRecord | None]) -> list[str]:
    """The nodes of the ranks that failed without having been signalled, or that the watchdog killed."""
    failed = [one for one in records if one and one.code not in (EXIT_DONE, EXIT_AGAIN, EXIT_STOPPED)]
    return sorted({one.node for one in failed if one.hung or not one.signalled})


@dataclass(frozen=True)
class Summary:
    """The result of an attempt, which the attempts after it take into account."""

    attempt: str
    outcome: Outcome
    progressed: bool
    """Whether the attempt ended with a larger iteration or more done markers than it started with."""
    kind: Kind = ""
    nodes: list[str] = field(default_factory=list)
    """The nodes on which the attempt failed, if it crashed or was lost."""

    def write(self, folder: Path) -> None:
        """Publish the summary in the attempt's folder."""
        write_json(folder / "summary.json", asdict(self))


def history(
    folder: Path, attempt: Attempt, progress: int, ended: Callable[[Attempt], Kind] = lambda _: "node-failure"
) -> list[Summary]:
    """The summaries of the earlier starts of this job, the oldest first. `folder` holds the pack's attempts.

    Whether a start progressed is judged by where the next one began (the present attempt began at `progress`), since
    ranks may still save after their driver has ended. A start without a summary was ended before it could write one;
    `ended` returns the reason.
    """
    found: list[Summary] = []
    after = progress
    for restart in reversed(range(attempt.restart)):
        one = Attempt(attempt.job, restart)
        start, end = (_read(folder / one.name / name) for name in ("start.json", "summary.json"))
        if start is None:
            continue
        progressed = after > int(start["progress"])
        after = int(start["progress"])
        if end is None:
            kind = ended(one)
            found.append(Summary(one.name, "lost", progressed, kind, [start["node"]] if kind == "node-failure" else []))
        else:
            found.append(Summary(**{**end, "progressed": progressed}))
    return found[::-1]


def unrecorded(folder: Path, attempt: Attempt) -> list[Summary]:
    """Summaries for the starts right before an attempt that could not even record that they began, the latest first.

    That happens when the disk is full.
    """
    before = (Attempt(attempt.job, restart).name for restart in reversed(range(attempt.restart)))
    silent = takewhile(lambda name: not (folder / name / "start.json").exists(), before)
    return [Summary(name, "crashed", False, "disk-full") for name in silent]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def bad_nodes(every: Sequence[Summary]) -> list[str]:
    """The nodes on which at least `REPEATED` of these attempts failed."""
    failures = Counter(node for one in every if one.outcome in ("crashed", "lost") for node in one.nodes)
    return sorted(node for node, count in failures.items() if count >= REPEATED)


@dataclass(frozen=True)
class Verdict:
    """Whether to start the job again, and why."""

    again: bool
    reason: str


def decide(past: Sequence[Summary], now: Summary, *, without_progress: int, crashes: int) -> Verdict:
    """Decide whether the job is started again.

    Attempts that get further are free. Attempts in a row without progress have a budget (`without_progress`), and
    crashes have a limit of their own (`crashes`). Attempts that were signalled to stop before they got further do not
    count, but three of them in a row mean that the time limit is too short. Preemption is not the job's fault: an
    attempt that it ended without progress counts in neither.
    """
    if now.kind == "cancelled":
        return Verdict(False, "cancelled")
    if now.outcome in ("done", "stopped", "refused"):
        return Verdict(False, now.outcome)
    every = [*past, now]
    stuck = [one for one in _latest_without_progress(every) if one.kind not in _FROM_OUTSIDE]
    early = list(takewhile(lambda one: one.kind in ("timeout", "requested"), stuck))
    if len(early) >= TOO_SHORT:
        return Verdict(
            False, f"time limit too short: {len(early)} attempts in a row were stopped before they got further"
        )
    counted = [one for one in stuck if one.kind not in ("timeout", "requested")]
    if len(counted) >= without_progress:
        return Verdict(False, f"{len(counted)} attempts in a row got nothing further (the last one: {_words(now)})")
    crashed = sum(summary.outcome == "crashed" for summary in every)
    if crashed > crashes:
        return Verdict(False, f"{crashed} attempts crashed (the last one: {_words(now)}), {crashes} are allowed")
    what = _words(now) if now.kind == "disk-full" else now.kind or now.outcome
    return Verdict(True, f"{what}, {'got further' if now.progressed else f'attempt {len(stuck)} without progress'}")


def _words(summary: Summary) -> str:
    return "the disk is full" if summary.kind == "disk-full" else summary.outcome


def _latest_without_progress(every: Sequence[Summary]) -> list[Summary]:
    """The attempts without progress since the last one that progressed, the latest first."""
    return list(takewhile(lambda one: not one.progressed, reversed(every)))


def log_event(root: Path, stage: str, event: str, **details: object) -> None:
    """Append one line to the run's events.jsonl, in a single write so that lines from many nodes do not mix.

    If a full disk has cut off the last line, that line is ended first. Raises OSError.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = encoded(json.dumps({"time": stamp, "stage": stage, "event": event, **details}, ensure_ascii=False) + "\n")
    descriptor = os.open(root / "events.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        broken = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        whole = b"\n" + line if broken else line
        if os.write(descriptor, whole) < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root / "events.jsonl"))
    finally:
        os.close(descriptor)
