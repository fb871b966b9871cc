"""python -m snakmodel.job.driver TASKLIST [--pack N]

The batch step of every job: does the tasks of one pack that have no done marker.

For each task it verifies the markers of what the task reads, starts the ranks (through srun, or as children on this
machine), reads their exit records and writes the done marker. Then it alone decides whether the job is done, is
requeued or has failed.

Exit codes: 0 done; 75 to be run again (on Slurm, it is requeued already); 76 stopped on request; 3 inputs missing; 1
failed or cancelled.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from run_contract.claim import ATTEMPT_VARIABLE, CLAIM_VARIABLE, check_claim
from run_contract.entry_point import run_main
from run_contract.errors import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_INPUTS_MISSING,
    EXIT_NO_ROOM,
    EXIT_STOPPED,
    NoRoom,
    Superseded,
    UserError,
)
from run_contract.output import say
from run_contract.publish import write_json
from snakmodel.job.ranks import Ranks
from snakmodel.run import reads
from snakmodel.run.attempt_files import hung_path, read_progress, started_path
from snakmodel.run.attempts import (
    Attempt,
    ExitRecord,
    Kind,
    Outcome,
    Summary,
    Verdict,
    bad_nodes,
    claim_path,
    culprits,
    decide,
    history,
    log_event,
    outcome,
    take_claim,
    unrecorded,
)
from snakmodel.run.markers import READ, Marker, judge
from snakmodel.run.task_list import InputSpec, TaskList
from snakmodel.slurm.own_job import accounted_end, exclude, job_state, requeue

_LEAVE_SECONDS = 600
_EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "refused": EXIT_INPUTS_MISSING}


class _ToldToEnd(Exception):
    """Raised when a signal arrives while this process itself is busy with checksums."""


class Driver:
    """Makes one attempt at one pack."""

    def __init__(self, path: Path, pack: int) -> None:
        self.signalled = False
        self.interruptible = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self.path = path
        self.tasks = TaskList.read(path)
        if not 0 <= pack < len(self.tasks.packs):
            raise SystemExit(f"error: {path} has packs 0 to {len(self.tasks.packs) - 1}, not {pack}")
        self.pack = pack
        self.attempt = Attempt.current()
        self.attempts = self.tasks.root / "attempts" / self.tasks.stage / f"{pack:05d}"
        self.folder = self.attempts / self.attempt.name
        self.on_slurm = "SLURM_JOB_ID" in os.environ
        self.node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        self.before = self._progress()
        self.ranks = Ranks(path, self.tasks, self.folder, lambda: self.signalled, self._on_hung)
        self.told_ranks = False
        self.kind: Kind = ""
        self.failed_on: list[str] = []
        self.read: dict[tuple[str, int], Marker] = {}
        """(Stage, task) -> the marker of a task whose outputs are read."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self.interruptible:
            self.interruptible = False
            raise _ToldToEnd

    @contextmanager
    def _ends_at_signal(self) -> Iterator[None]:
        """Let a signal end the body, which computes checksums of large files, by raising _ToldToEnd."""
        if self.signalled:
            raise _ToldToEnd
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False

    def run(self) -> int:
        """Work through the pack, and return the exit code."""
        try:
            return self._conclude(self._work_while_there_is_room())
        except Superseded as error:
            self._log("superseded", reason=str(error))
            raise

    def _work_while_there_is_room(self) -> Outcome:
        """Work through the pack. A disk too full for the claim, the start or a marker counts as a crash (retried)."""
        try:
            self._claim()
            return self._work()
        except NoRoom as error:
            say(f"error: {error}", error=True)
            self._crashed("disk-full", [])
            return "crashed"

    def _claim(self) -> None:
        claim = claim_path(self.tasks.root, self.tasks.stage, self.pack)
        if not take_claim(claim, self.attempt):
            raise Superseded(f"a later start of job {self.attempt.job} already runs")
        os.environ[CLAIM_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(claim), self.attempt.name

    def _work(self) -> Outcome:
        write_json(self.folder / "start.json", {"progress": self.before, "node": self.node})
        self._report_lost()
        self._log("start", node=self.node)
        worst: Outcome = "done"
        for index in self.tasks.packs[self.pack]:
            if self.tasks.is_done(index):
                say(f"task {index} is done already")
                continue
            if self.signalled:
                worst = "interrupted"
                break
            found = self._task(index)
            worst = found if worst == "done" else worst
            if found in ("again", "stopped", "interrupted", "lost"):
                worst = found
                break
        return worst

    def _report_lost(self) -> None:
        """Log a `lost` event if the start before this one left no record of how it ended."""
        past = self._past()
        before = Attempt(self.attempt.job, self.attempt.restart - 1).name
        said = (self.attempts / before / "summary.json").exists()
        if past and past[-1].outcome == "lost" and past[-1].attempt == before and not said:
            reason = f"attempt {before} left no record of its end"
            node = ", ".join(past[-1].nodes)
            self._log("lost", kind=past[-1].kind, reason=reason, lost=before, node=node)

    def _past(self) -> list[Summary]:
        """The summaries of the earlier starts of this job, oldest first."""
        return history(self.attempts, self.attempt, self.before, self._unrecorded_kind)

    def _unrecorded_kind(self, attempt: Attempt) -> Kind:
        """Why an earlier start left no summary. Where accounting does not know, its node is assumed to be lost."""
        end = accounted_end(attempt) if self.on_slurm else ""
        if end in ("", "NODE_FAIL"):
            return "node-failure"
        return "preempted" if end == "PREEMPTED" else "no-record"

    def _progress(self) -> int:
        """A number that grows with the pack's progress: a resumable stage's iteration, else the count of done tasks."""
        if self.tasks.progress is not None:
            return read_progress(self.tasks) or 0
        return sum(self.tasks.is_done(index) for index in self.tasks.packs[self.pack])

    def _task(self, index: int) -> Outcome:
        """Run one task and, if all its ranks are done, write its marker."""
        try:
            with self._ends_at_signal():
                problem = self._input_problem(index)
                content = "" if problem else reads.content(self.tasks, index, self.read)
                renewed = reads.renewed(self.tasks, index, content)
        except _ToldToEnd:
            return "interrupted"
        if problem:
            say(f"error: {self.tasks.stage} task {index}: {problem}", error=True)
            return "refused"
        if renewed:
            check_claim()
            renewed.write(self.tasks.marker_path(self.tasks.stage, index))
            say(f"task {index}: what it reads is the same as when it was done; its outputs stay")
            return "done"
        records = [ExitRecord.path(self.folder, index, rank) for rank in range(self.tasks.ranks)]
        for path in (*records, hung_path(self.folder, index), started_path(self.folder, index)):
            path.unlink(missing_ok=True)
        before = reads.versions(self.tasks.tasks[index].reads)
        if not self.ranks.run(index):
            return "interrupted"
        found = self._judge([ExitRecord.read(path) for path in records])
        if found == "done":
            found = self._mark_done(index, content, before)
        say(f"--- {self.tasks.stage} task {index}: {found}")
        return found

    def _judge(self, records: list[ExitRecord | None]) -> Outcome:
        found = outcome(records, self.signalled)
        self.told_ranks = any(record and record.signalled for record in records)
        hung = any(record and record.hung for record in records) or self.kind == "hung"
        if hung and found not in ("done", "again"):
            found = "crashed"
        if found == "crashed" and not any(records) and self._restarts_already():
            self.kind, self.failed_on = "node-failure", [self.node] if self.tasks.nodes == 1 else []
            return "lost"
        if found == "crashed":
            codes = {record.rank if record else "?": record.code if record else None for record in records}
            full = EXIT_NO_ROOM in (*codes.values(), *self.ranks.codes())
            blamed = culprits(records) or ([self.node] if self.tasks.nodes == 1 else [])
            kind: Kind = "hung" if hung else "disk-full" if full else "crash"
            self._crashed(kind, [] if kind == "disk-full" else blamed, codes=codes)
        return found

    def _crashed(self, kind: Kind, nodes: list[str], **details: object) -> None:
        """Record why this attempt crashed, and on which nodes."""
        self.kind, self.failed_on = kind, nodes
        self._log("crash", kind=kind, nodes=nodes, **details)

    def _on_hung(self, index: int, reason: str) -> None:
        self.kind = "hung"
        self._log("hung", kind="hung", reason=reason, task=index)

    def _mark_done(self, index: int, content: str, before: list[tuple[int, int]]) -> Outcome:
        """Write the marker of a task. `before` holds the versions of the files from outside when the task began."""
        task, root = self.tasks.tasks[index], self.tasks.root
        try:
            with self._ends_at_signal():
                marker = replace(Marker.of(root, task.key, task.outputs, counts_file=task.counts), content=content)
                if task.reads:
                    marker.counts[READ] = reads.digests(task.reads, before)
        except _ToldToEnd:
            return "interrupted"
        except (OSError, ValueError) as error:
            say(f"error: {self.tasks.stage} task {index}: {error}", error=True)
            self.kind = "crash"
            return "crashed"
        check_claim()
        marker.write(self.tasks.marker_path(self.tasks.stage, index))
        return "done"

    def _input_problem(self, index: int) -> str | None:
        """What is wrong with the inputs of a task, or None: their markers and, where asked for, full checksums."""
        for source in self.tasks.tasks[index].inputs:
            for number in reads.numbers(self.tasks, source):
                problem = self._one_input_problem(source, number)
                if problem:
                    remedy = "Run jobs/submit_all.py again: it redoes what is missing."
                    return f"input from stage {source.stage}, task {number}: {problem}. {remedy}"
        return None

    def _one_input_problem(self, source: InputSpec, number: int) -> str | None:
        path, key = self.tasks.marker_path(source.stage, number), self.tasks.keys[source.stage][number]
        found = judge(path, self.tasks.root, key, full=source.full, only=source.only)
        if found.marker is None:
            return "it has no readable done marker"
        if found.marker.key != key:
            return "its done marker is of another command or other inputs"
        self.read[source.stage, number] = found.marker
        if found.problem and source.full:
            path.unlink(missing_ok=True)
            return f"{found.problem}; its marker was removed"
        return found.problem

    def _conclude(self, found: Outcome) -> int:
        """Requeue the job, or return the exit code that belongs to the attempt's outcome."""
        past = self._past()
        if not (self.folder / "start.json").exists():
            past += reversed(unrecorded(self.attempts, self.attempt))
        summary = Summary(self.attempt.name, found, self._progress() > self.before, self.kind, self.failed_on)
        self._keep(summary)
        if found in ("again", "interrupted"):
            summary = replace(summary, kind=self._why(found))
            self._keep(summary)
        verdict = decide(past, summary, without_progress=self.tasks.without_progress, crashes=self.tasks.crashes)
        if not verdict.again:
            event = summary.outcome if summary.outcome in ("done", "stopped") else "failed"
            self._log("cancelled" if summary.kind == "cancelled" else event, reason=verdict.reason, kind=summary.kind)
            say(f"=== {self.tasks.stage} pack {self.pack}: {verdict.reason}")
            return _EXIT_CODES.get(summary.outcome, 1)
        name = "lost" if summary.outcome == "lost" else "requeue" if self.on_slurm else "again"
        self._log(name, reason=verdict.reason, kind=summary.kind, node=self.node)
        if self.on_slurm:
            return self._requeue(verdict, bad_nodes([*past, summary]))
        return EXIT_AGAIN

    def _why(self, found: Outcome) -> Kind:
        """Why the ranks or this process were signalled to end, as far as that can be known."""
        if not self.signalled and not self.told_ranks:
            return ""
        if not self.on_slurm:
            return "requested"
        state = job_state(self.attempt.job)
        return state.kind(self.attempt, self.tasks.signal_seconds) if state else ""

    def _keep(self, summary: Summary) -> None:
        """Write the summary. A full disk must not keep the job from being requeued, so errors are only reported."""
        try:
            summary.write(self.folder)
        except (OSError, UserError) as error:
            say(f"the attempt's summary could not be written: {error}")

    def _requeue(self, verdict: Verdict, avoid: list[str]) -> int:
        """Have Slurm start this job again, if it is willing to, and return when the ranks have ended."""
        job = self.attempt.job
        if self.tasks.logs:  # without the folder of its log, Slurm cannot start the job again
            with suppress(OSError):
                Path(self.tasks.logs).mkdir(parents=True, exist_ok=True)
        end = requeue(self.attempt, verdict.reason, self._check_claim)
        if end.result == "refused":
            self._log("failed", reason=f"{verdict.reason}; Slurm refuses to requeue: {end.words}")
            return 1
        if end.result == "cancelled":
            self._log("cancelled", kind="cancelled", reason="scancel")
            return 1
        if avoid:
            problem = exclude(job, avoid, self.tasks.nodes)
            reason = f"this job failed there repeatedly{f', but it is not excluded: {problem}' if problem else ''}"
            self._log("kept" if problem else "excluded", nodes=avoid, reason=reason)
        end_at = time.monotonic() + _LEAVE_SECONDS
        while self.ranks.running() and time.monotonic() < end_at:
            time.sleep(0.1)
        return EXIT_AGAIN

    def _restarts_already(self) -> bool:
        """Whether Slurm starts this job again by itself, as it does after a node's failure."""
        state = job_state(self.attempt.job) if self.on_slurm else None
        return state is not None and state.restarts > self.attempt.restart

    def _check_claim(self) -> None:
        """Raise Superseded if another attempt has replaced this one; a claim that cannot be read is ignored."""
        with suppress(OSError):
            check_claim()

    def _log(self, event: str, **details: object) -> None:
        try:
            log_event(self.tasks.root, self.tasks.stage, event, pack=self.pack, attempt=self.attempt.name, **details)
        except OSError as error:
            say(f"event {event} could not be written: {error}")


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m snakmodel.job.driver", description=__doc__.splitlines()[2])
    parser.add_argument("tasklist", type=Path, help="the stage's task list")
    parser.add_argument("--pack", type=int, help="number of the pack (default: SLURM_ARRAY_TASK_ID, else 0)")
    args = parser.parse_args()
    pack = args.pack if args.pack is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    return Driver(args.tasklist, pack).run()


if __name__ == "__main__":
    run_main(main)
