"""Attempts of a pack of tasks: who holds the claim, what each rank's exit record says, and what follows from them.

A run's folder holds claims/STAGE/PACK.json (the attempt that may publish) and attempts/STAGE/PACK/ATTEMPT/ with one
exit record a rank and task and, when the attempt ended by itself, summary.json.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from snakmodel.publish import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_INPUTS_MISSING,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    write_json,
)

Outcome = Literal["done", "again", "stopped", "interrupted", "refused", "crashed"]
"""done; saved and to be run again; saved and stopped on request; ended by a signal from outside; inputs missing or a
person's mistake, not worth a retry; anything else."""


@dataclass(frozen=True)
class Attempt:
    """One go at a pack: which job, and how often it had been started before."""

    job: str
    restart: int

    @property
    def name(self) -> str:
        """Fit for file names."""
        return f"{self.job}.r{self.restart}"

    @classmethod
    def current(cls) -> Attempt:
        """This process's attempt: Slurm's job and restart count, or those that the local scheduler gave."""
        env = os.environ
        restart = int(env.get("SLURM_RESTART_COUNT", env.get("SNAKMODEL_RESTART", "0")))
        if "SLURM_ARRAY_JOB_ID" in env:
            return cls(f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}", restart)
        return cls(env.get("SLURM_JOB_ID") or env.get("SNAKMODEL_JOB") or f"hand{os.getpid()}", restart)


def claim_path(root: Path, stage: str, pack: int) -> Path:
    """Where the claim of a pack lies."""
    return root / "claims" / stage / f"{pack:05d}.json"


def take_claim(path: Path, attempt: Attempt) -> bool:
    """Take the claim for `attempt`, unless a later start of the same job already has it."""
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
    """How one rank of one task ended."""

    attempt: str
    rank: int
    code: int
    """Exit code, or minus the signal that ended the process."""
    iteration: int | None
    node: str
    seconds: float

    @staticmethod
    def path(folder: Path, task: int, rank: int) -> Path:
        """Where the record lies in an attempt's folder."""
        return folder / f"task-{task:05d}.rank-{rank:04d}.json"

    @classmethod
    def read(cls, path: Path) -> ExitRecord | None:
        """The record in a file, or None if the rank left none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def outcome(records: Sequence[ExitRecord | None], signalled: bool) -> Outcome:
    """What all ranks' exit records together mean. `signalled`: the driver was told to end while they ran."""
    codes = {record.code if record else None for record in records}
    if codes == {EXIT_DONE}:
        return "done"
    if codes == {EXIT_AGAIN}:
        return "again"
    if codes <= {EXIT_STOPPED, EXIT_AGAIN}:
        return "stopped"
    if signalled and codes <= {
        None,
        EXIT_DONE,
        EXIT_AGAIN,
        -signal.SIGTERM,
        -signal.SIGUSR2,
        -signal.SIGKILL,
        -signal.SIGINT,
    }:
        return "interrupted"
    if codes & {EXIT_INPUTS_MISSING, EXIT_USER_ERROR}:
        return "refused"
    return "crashed"


@dataclass(frozen=True)
class Summary:
    """What an attempt came to; its successors count with it."""

    attempt: str
    outcome: Outcome
    progressed: bool
    """A larger iteration or more done markers than at its start."""

    def write(self, folder: Path) -> None:
        """Publish it in the attempt's folder."""
        write_json(folder / "summary.json", asdict(self))


def history(folder: Path, attempt: Attempt) -> list[Summary]:
    """Summaries of the earlier starts of this job, oldest first. `folder` holds the pack's attempts."""
    found = [folder / Attempt(attempt.job, restart).name / "summary.json" for restart in range(attempt.restart)]
    raw: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    return [Summary(**one) for one in raw]


@dataclass(frozen=True)
class Verdict:
    """Whether to start the job again, and why."""

    again: bool
    reason: str


def decide(past: Sequence[Summary], now: Summary, *, without_progress: int, crashes: int) -> Verdict:
    """Free while progressing; a budget of attempts without progress; a separate limit of crashes with progress."""
    if now.outcome in ("done", "stopped", "refused"):
        return Verdict(False, now.outcome)
    every = [*past, now]
    stuck = 0
    for summary in reversed(every):
        if summary.progressed:
            break
        stuck += 1
    if stuck >= without_progress:
        return Verdict(False, f"{stuck} attempts in a row got nothing further (the last one: {now.outcome})")
    crashed = sum(summary.outcome == "crashed" for summary in every)
    if crashed > crashes:
        return Verdict(False, f"{crashed} attempts crashed, {crashes} are allowed")
    return Verdict(True, f"{now.outcome}, {'got further' if now.progressed else f'attempt {stuck} without progress'}")


def log_event(root: Path, stage: str, event: str, **details: object) -> None:
    """Append one line to the run's events.jsonl, in one write so that lines of many nodes do not mix."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = json.dumps({"time": stamp, "stage": stage, "event": event, **details}, ensure_ascii=False) + "\n"
    descriptor = os.open(root / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
