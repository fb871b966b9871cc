"""The end of an attempt: its summary, the decision whether its job is started again, and the requeue."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from run_contract.claim import check_claim
from run_contract.errors import EXIT_AGAIN, EXIT_DONE, EXIT_INPUTS_MISSING, EXIT_STOPPED, UserError
from run_contract.output import say
from snakmodel.job.pack_attempt import PackAttempt
from snakmodel.run.attempts import (
    Attempt,
    Kind,
    Outcome,
    Summary,
    Verdict,
    bad_nodes,
    decide,
    history,
    unrecorded,
)
from snakmodel.slurm.own_job import accounted_end, accounted_kind, exclude, job_state, requeue

_LEAVE_SECONDS = 600
_ACCOUNTING_SECONDS = 15.0
"""Seconds that a start waits for accounting to tell why the start before it was ended."""
_EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "refused": EXIT_INPUTS_MISSING}


@dataclass
class Work:
    """What is known so far about the work of an attempt on its pack."""

    signalled: bool = False
    """Whether the driver or one of its ranks was signalled to end."""
    kind: Kind = ""
    """Why the work failed, as far as the driver knows."""
    nodes: list[str] = field(default_factory=list)
    """The nodes on which the work failed."""


class Ending:
    """Judges an attempt together with the attempts before it, and requeues the job if it is to be started again."""

    def __init__(self, here: PackAttempt, ranks_are_running: Callable[[], bool]) -> None:
        self.here = here
        self.ranks_are_running = ranks_are_running

    def past(self) -> list[Summary]:
        """The summaries of the earlier starts of this job, oldest first."""
        here = self.here
        return history(here.all_attempts, here.attempt, here.before, self._unrecorded_kind)

    def _unrecorded_kind(self, attempt: Attempt) -> Kind:
        """Why an earlier start left no summary. Where accounting does not know, its node is assumed to be lost."""
        end = accounted_end(attempt) if self.here.on_slurm else ""
        if end in ("", "NODE_FAIL"):
            return "node-failure"
        return "preempted" if end == "PREEMPTED" else "no-record"

    def report_before(self) -> None:
        """Log what is known only now of the end of the start before this one.

        It is `lost` if it left no record, and `explained` if it could not know yet why Slurm started it again.
        """
        past, here = self.past(), self.here
        before = Attempt(here.attempt.job, here.attempt.restart - 1)
        if not past or past[-1].attempt != before.name:
            return
        folder, end = here.all_attempts / before.name, past[-1]
        if end.outcome == "lost" and not (folder / "summary.json").exists():
            reason = f"attempt {before.name} left no record of its end"
            here.log("lost", kind=end.kind, reason=reason, lost=before.name, node=", ".join(end.nodes))
        elif end.kind == "restarted" and (kind := accounted_kind(before, _ACCOUNTING_SECONDS)) != "restarted":
            reason = f"accounting knows why attempt {before.name} was started again"
            here.log("explained", kind=kind, reason=reason, ended=before.name)
            self._keep(replace(end, kind=kind), folder)

    def restarts_already(self) -> bool:
        """Whether Slurm starts this job again by itself, as it does after a node's failure."""
        state = job_state(self.here.attempt.job) if self.here.on_slurm else None
        return state is not None and state.restarts > self.here.attempt.restart

    def conclude(self, found: Outcome, work: Work) -> int:
        """Decide whether the job is started again, requeue it in that case, and return the driver's exit code."""
        here, past = self.here, self.past()
        if not (here.folder / "start.json").exists():
            past += reversed(unrecorded(here.all_attempts, here.attempt))
        summary = Summary(here.attempt.name, found, here.progress() > here.before, work.kind, work.nodes)
        self._keep(summary, here.folder)
        if found in ("again", "interrupted"):
            summary = replace(summary, kind=self._why(work.signalled))
            self._keep(summary, here.folder)
        verdict = decide(past, summary, without_progress=here.tasks.without_progress, crashes=here.tasks.crashes)
        if not verdict.again:
            event = summary.outcome if summary.outcome in ("done", "stopped") else "failed"
            here.log("cancelled" if summary.kind == "cancelled" else event, reason=verdict.reason, kind=summary.kind)
            say(f"=== {here.tasks.stage} pack {here.pack}: {verdict.reason}")
            return _EXIT_CODES.get(summary.outcome, 1)
        name = "lost" if summary.outcome == "lost" else "requeue" if here.on_slurm else "again"
        here.log(name, reason=verdict.reason, kind=summary.kind, node=here.node)
        if here.on_slurm:
            return self._requeue(verdict, bad_nodes([*past, summary]))
        return EXIT_AGAIN

    def _why(self, signalled: bool) -> Kind:
        """Why the ranks or the driver were signalled to end, as far as that can be known."""
        if not signalled:
            return ""
        if not self.here.on_slurm:
            return "requested"
        state = job_state(self.here.attempt.job)
        return state.kind(self.here.attempt, self.here.tasks.signal_seconds) if state else ""

    def _keep(self, summary: Summary, folder: Path) -> None:
        """Write the summary in its attempt's folder.

        A full disk must not keep the job from being requeued, so errors are only reported.
        """
        try:
            summary.write(folder)
        except (OSError, UserError) as error:
            say(f"the attempt's summary could not be written: {error}")

    def _requeue(self, verdict: Verdict, avoid: list[str]) -> int:
        """Have Slurm start this job again, if it is willing to, and return when the ranks have ended."""
        here = self.here
        if here.tasks.logs:  # without the folder of its log, Slurm cannot start the job again
            with suppress(OSError):
                Path(here.tasks.logs).mkdir(parents=True, exist_ok=True)
        end = requeue(here.attempt, verdict.reason, _check_claim)
        if end.result == "refused":
            here.log("failed", reason=f"{verdict.reason}; Slurm refuses to requeue: {end.words}")
            return 1
        if end.result == "cancelled":
            here.log("cancelled", kind="cancelled", reason="scancel")
            return 1
        if avoid:
            problem = exclude(here.attempt.job, avoid, here.tasks.nodes)
            reason = f"this job failed there repeatedly{f', but it is not excluded: {problem}' if problem else ''}"
            here.log("kept" if problem else "excluded", nodes=avoid, reason=reason)
        end_at = time.monotonic() + _LEAVE_SECONDS
        while self.ranks_are_running() and time.monotonic() < end_at:
            time.sleep(0.1)
        return EXIT_AGAIN


def _check_claim() -> None:
    """Raise Superseded if another attempt has replaced this one; a claim that cannot be read is ignored."""
    with suppress(OSError):
        check_claim()
