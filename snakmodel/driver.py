"""python -m snakmodel.driver TASKLIST [--pack N]

The batch step of every job. For each task of the pack that has no done marker: verify the markers of what it reads,
start the ranks (srun, or children on this machine), read their exit records, write the done marker. Then it alone
decides whether the job is done, is requeued or has failed.

Exit codes: 0 done; 75 to be run again (on Slurm: it is requeued already); 76 stopped on request; 3 inputs missing;
1 failed or cancelled.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from snakmodel.attempts import (
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
)
from snakmodel.publish import (
    ATTEMPT_VARIABLE,
    CLAIM_VARIABLE,
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_INPUTS_MISSING,
    EXIT_STOPPED,
    Marker,
    Superseded,
    check_claim,
    run_main,
    write_json,
)
from snakmodel.requeue import ask_requeue, exclude, job_state
from snakmodel.supervise import (
    FORWARD_VARIABLE,
    alive_path,
    die_with_parent,
    hung_path,
    read_progress,
    started_path,
)
from snakmodel.tasklist import InputSpec, TaskList
from snakmodel.watchdog import Watchdog, log_size, modified

_RANK_GRACE_SECONDS = 30
_HUNG_GRACE_SECONDS = 60
_START_PAUSES = (5, 15, 30, 60)
"""Before srun is tried again that could not start anything, as while the controller is down."""
_LEAVE_SECONDS = 600
_EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "refused": EXIT_INPUTS_MISSING}


class _ToldToEnd(Exception):
    """A signal came while this process was busy itself."""


class Driver:
    """One attempt at one pack."""

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
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.told_ranks = False
        self.kind: Kind = ""
        self.failed_on: list[str] = []

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self.interruptible:
            self.interruptible = False
            raise _ToldToEnd

    @contextmanager
    def _ends_at_signal(self) -> Iterator[None]:
        """While the body (checksums of large files) runs, a signal ends it with _ToldToEnd."""
        if self.signalled:
            raise _ToldToEnd
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False

    def run(self) -> int:
        """Work through the pack; return the exit code."""
        claim = claim_path(self.tasks.root, self.tasks.stage, self.pack)
        if not take_claim(claim, self.attempt):
            raise Superseded(f"a later start of job {self.attempt.job} already runs")
        os.environ[CLAIM_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(claim), self.attempt.name
        try:
            return self._work()
        except Superseded as error:
            self._log("superseded", reason=str(error))
            raise

    def _work(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
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
            if found in ("again", "stopped", "interrupted"):
                worst = found
                break
        return self._conclude(worst)

    def _report_lost(self) -> None:
        """Say so when the start before this one ended without a word."""
        past = history(self.attempts, self.attempt, self.before)
        if past and past[-1].outcome == "lost" and past[-1].attempt == self._name_before():
            reason = f"attempt {past[-1].attempt} ended without a word on {', '.join(past[-1].nodes)}"
            self._log("lost", kind=past[-1].kind, reason=reason, lost=past[-1].attempt, node=past[-1].nodes[0])

    def _name_before(self) -> str:
        return Attempt(self.attempt.job, self.attempt.restart - 1).name

    def _progress(self) -> int:
        """Grows as the pack gets further: the iteration of a resumable stage, else the number of done tasks."""
        if self.tasks.progress is not None:
            return read_progress(self.tasks) or 0
        return sum(self.tasks.is_done(index) for index in self.tasks.packs[self.pack])

    def _task(self, index: int) -> Outcome:
        """Run one task and, if all its ranks are done, write its marker."""
        try:
            with self._ends_at_signal():
                problem = self._input_problem(index)
        except _ToldToEnd:
            return "interrupted"
        if problem:
            say(f"error: {self.tasks.stage} task {index}: {problem}")
            return "refused"
        records = [ExitRecord.path(self.folder, index, rank) for rank in range(self.tasks.ranks)]
        for path in (*records, hung_path(self.folder, index), started_path(self.folder, index)):
            path.unlink(missing_ok=True)
        if not self._launch(index):
            return "interrupted"
        found = self._judge([ExitRecord.read(path) for path in records])
        if found == "done":
            found = self._mark_done(index)
        say(f"--- {self.tasks.stage} task {index}: {found}")
        return found

    def _judge(self, records: list[ExitRecord | None]) -> Outcome:
        found = outcome(records, self.signalled)
        self.told_ranks = any(record and record.signalled for record in records)
        hung = any(record and record.hung for record in records) or self.kind == "hung"
        if hung and found not in ("done", "again"):
            found = "crashed"
        if found == "crashed":
            self.kind = "hung" if hung else "crash"
            self.failed_on = culprits(records) or ([self.node] if self.tasks.nodes == 1 else [])
            codes = {record.rank if record else "?": record.code if record else None for record in records}
            self._log("crash", kind=self.kind, codes=codes, nodes=self.failed_on)
        return found

    def _mark_done(self, index: int) -> Outcome:
        task, root = self.tasks.tasks[index], self.tasks.root
        try:
            with self._ends_at_signal():
                marker = Marker.of(root, task.key, task.outputs, counts_file=task.counts)
        except _ToldToEnd:
            return "interrupted"
        except (OSError, ValueError) as error:
            say(f"error: {self.tasks.stage} task {index}: {error}")
            self.kind = "crash"
            return "crashed"
        check_claim()
        marker.write(self.tasks.marker_path(self.tasks.stage, index))
        return "done"

    def _input_problem(self, index: int) -> str | None:
        """What is wrong with the inputs of a task, or None: their markers and, where asked for, full checksums."""
        for source in self.tasks.tasks[index].inputs:
            numbers = range(len(self.tasks.keys[source.stage])) if source.index is None else [source.index]
            for number in numbers:
                problem = self._one_input_problem(source, number)
                if problem:
                    remedy = "Run jobs/submit_all.py again: it redoes what is missing."
                    return f"input from stage {source.stage}, task {number}: {problem}. {remedy}"
        return None

    def _one_input_problem(self, source: InputSpec, number: int) -> str | None:
        marker = Marker.read(self.tasks.marker_path(source.stage, number))
        if marker is None:
            return "it has no readable done marker"
        if marker.key != self.tasks.keys[source.stage][number]:
            return "its done marker is of another command or other inputs"
        problem = marker.problem(self.tasks.root, full=source.full, only=source.only)
        if problem and source.full:
            self.tasks.marker_path(source.stage, number).unlink(missing_ok=True)
            problem += "; its marker was removed"
        return problem

    def _launch(self, index: int) -> bool:
        """Run the task's ranks to their end. False if this job was told to end meanwhile, on Slurm."""
        supervise = [self.tasks.python, "-u", "-m", "snakmodel.supervise", str(self.path)]
        supervise += ["--task", str(index), "--folder", str(self.folder)]
        if not self.on_slurm:
            self.ranks = self._start_children(supervise)
            self._attend(index)
            return True
        for pause in (*_START_PAUSES, None):
            self.ranks = self._start_srun(supervise)
            if not self._attend(index):
                return False
            if self.ranks[0].returncode == 0 or pause is None or started_path(self.folder, index).exists():
                return True
            say(f"srun could not start the task; again in {pause} s")
            self._pause(pause)
            if self.signalled:
                return False
        return True

    def _attend(self, index: int) -> bool:
        """Wait for the ranks to end, watched; False as soon as Slurm tells this job to end."""
        watchdog = self._watchdog(index)
        told = given_up = None
        while None in [rank.poll() for rank in self.ranks]:
            if self.signalled and self.on_slurm:
                return False
            now = time.monotonic()
            crashed = any(rank.returncode not in (None, 0) for rank in self.ranks)
            if told is None and (self.signalled or crashed) and not self.on_slurm:
                told = now
                self._signal_ranks(signal.SIGTERM)
            if told is not None and now - told > _RANK_GRACE_SECONDS and crashed:
                self._signal_ranks(signal.SIGKILL)
            if given_up is None and watchdog and watchdog.expired():
                given_up = now
                self._give_up(index, watchdog)
            if given_up is not None and now - given_up > _HUNG_GRACE_SECONDS:
                self._signal_ranks(signal.SIGKILL)
            time.sleep(0.05)
        return True

    def _watchdog(self, index: int) -> Watchdog | None:
        """Watches the log and the iteration, and a silent single process's use of its processor."""
        if log_size(1) is None:
            return None
        signs: Callable[[], object] = lambda: (  # noqa: E731 - it is one expression
            log_size(1),
            read_progress(self.tasks),
            modified(alive_path(self.folder, index)),
        )
        return Watchdog(self.tasks.hung_seconds, signs)

    def _give_up(self, index: int, watchdog: Watchdog) -> None:
        self.kind = "hung"
        reason = f"no log line, no iteration for {watchdog.silent_seconds():.0f} s"
        self._log("hung", kind="hung", reason=reason, task=index)
        say(f"=== {self.tasks.stage} task {index} hangs: {reason}")
        hung_path(self.folder, index).touch()

    def _start_srun(self, supervise: list[str]) -> list[subprocess.Popen[bytes]]:
        tasks = self.tasks
        srun = [
            "srun",
            f"--nodes={tasks.nodes}",
            f"--ntasks={tasks.ranks}",
            f"--ntasks-per-node={tasks.ranks_per_node}",
        ]
        srun += [f"--cpus-per-task={tasks.cpus}", "--kill-on-bad-exit=1", "--unbuffered", *tasks.srun_args]
        return [subprocess.Popen([*srun, *supervise], cwd=tasks.project, preexec_fn=die_with_parent)]

    def _start_children(self, supervise: list[str]) -> list[subprocess.Popen[bytes]]:
        if self.tasks.nodes > 1:
            raise SystemExit(
                f"error: stage {self.tasks.stage} wants {self.tasks.nodes} nodes; without Slurm there is one"
            )
        ranks = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), FORWARD_VARIABLE: "1"} for rank in range(self.tasks.ranks)
        ]
        return [
            subprocess.Popen(supervise, cwd=self.tasks.project, env={**os.environ, **rank}, preexec_fn=die_with_parent)
            for rank in ranks
        ]

    def _signal_ranks(self, number: int) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _conclude(self, found: Outcome) -> int:
        """Requeue, or leave with the exit code that the attempt deserves."""
        past = history(self.attempts, self.attempt, self.before)
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
        self._log("requeue" if self.on_slurm else "again", reason=verdict.reason, kind=summary.kind)
        if self.on_slurm:
            return self._requeue(verdict, bad_nodes([*past, summary]))
        return EXIT_AGAIN

    def _why(self, found: Outcome) -> Kind:
        """Why the ranks or this process were told to end, as far as it can be known."""
        if not self.signalled and not self.told_ranks:
            return ""
        if not self.on_slurm:
            return "requested"
        state = job_state(self.attempt.job)
        return state.kind(self.attempt, self.tasks.signal_seconds) if state else ""

    def _keep(self, summary: Summary) -> None:
        """Write the summary; a full disk must not keep the job from being requeued."""
        try:
            summary.write(self.folder)
        except OSError as error:
            say(f"the attempt's summary could not be written: {error}")

    def _requeue(self, verdict: Verdict, avoid: list[str]) -> int:
        """Ask Slurm to start this job again, until it does; then leave when the ranks have ended."""
        job = self.attempt.job
        pause = 0.5
        while not self._requeued_or_cancelled(job):
            self._check_claim()
            answer = ask_requeue(job)
            if answer.accepted:
                break
            if answer.permanent:
                self._log("failed", reason=f"{verdict.reason}; Slurm refuses to requeue: {answer.words}")
                say(f"error: Slurm refuses to requeue {job}: {answer.words}")
                return 1
            say(f"scontrol requeue {job}: {answer.words}; again in {pause:.1f} s")
            time.sleep(pause)
            pause = min(60.0, pause * 2)
        if self.kind == "cancelled":
            self._log("cancelled", kind="cancelled", reason="scancel")
            return 1
        say(f"=== requeued {job}: {verdict.reason}")
        if avoid:
            problem = exclude(job, avoid, self.tasks.nodes)
            reason = f"this job failed there repeatedly{f', but it is not excluded: {problem}' if problem else ''}"
            self._log("kept" if problem else "excluded", nodes=avoid, reason=reason)
        end = time.monotonic() + _LEAVE_SECONDS
        while None in [rank.poll() for rank in self.ranks] and time.monotonic() < end:
            time.sleep(0.1)
        return EXIT_AGAIN

    def _requeued_or_cancelled(self, job: str) -> bool:
        """Whether Slurm starts this job again by itself, or a person has cancelled it (then `kind` says so)."""
        state = job_state(job)
        if state is None:
            return False
        if state.kind(self.attempt, 0) == "cancelled":
            self.kind = "cancelled"
        return self.kind == "cancelled" or state.restarts > self.attempt.restart

    def _check_claim(self) -> None:
        """Raise Superseded if this attempt was replaced; an unreadable claim says nothing."""
        with suppress(OSError):
            check_claim()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.signalled:
            time.sleep(0.1)

    def _log(self, event: str, **details: object) -> None:
        try:
            log_event(self.tasks.root, self.tasks.stage, event, pack=self.pack, attempt=self.attempt.name, **details)
        except OSError as error:
            say(f"event {event} could not be written: {error}")


def say(text: str) -> None:
    """Print to the job's log, errors to stderr; a full disk must not end the driver."""
    with suppress(OSError):
        print(text, file=sys.stderr if text.startswith("error:") else sys.stdout, flush=True)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m snakmodel.driver", description=__doc__.splitlines()[2])
    parser.add_argument("tasklist", type=Path, help="the stage's task list")
    parser.add_argument("--pack", type=int, help="number of the pack (default: SLURM_ARRAY_TASK_ID, else 0)")
    args = parser.parse_args()
    pack = args.pack if args.pack is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    return Driver(args.tasklist, pack).run()


if __name__ == "__main__":
    run_main(main)
