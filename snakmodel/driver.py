"""python -m snakmodel.driver TASKLIST [--pack N]

The batch step of every job. For each task of the pack that has no done marker: verify the markers of what it reads,
start the ranks (srun, or children on this machine), read their exit records, write the done marker. Then it alone
decides whether the job is done, is requeued or has failed.

Exit codes: 0 done; 75 to be run again (only where no Slurm can requeue); 76 stopped on request; 3 inputs missing;
1 failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from snakmodel.attempts import (
    Attempt,
    ExitRecord,
    Outcome,
    Summary,
    claim_path,
    decide,
    history,
    log_event,
    outcome,
    take_claim,
)
from snakmodel.containers import supervisor_python
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
)
from snakmodel.supervise import FORWARD_VARIABLE, die_with_parent, read_progress
from snakmodel.tasklist import InputSpec, TaskList

_RANK_GRACE_SECONDS = 30
_ORDERLY = (EXIT_DONE, EXIT_AGAIN, EXIT_STOPPED)


class Driver:
    """One attempt at one pack."""

    def __init__(self, path: Path, pack: int) -> None:
        self.path = path
        self.tasks = TaskList.read(path)
        if not 0 <= pack < len(self.tasks.packs):
            raise SystemExit(f"error: {path} has packs 0 to {len(self.tasks.packs) - 1}, not {pack}")
        self.pack = pack
        self.attempt = Attempt.current()
        self.attempts = self.tasks.root / "attempts" / self.tasks.stage / f"{pack:05d}"
        self.folder = self.attempts / self.attempt.name
        self.on_slurm = "SLURM_JOB_ID" in os.environ
        self.signalled = False
        self.before = self._progress()
        self.ranks: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def run(self) -> int:
        """Work through the pack; return the exit code."""
        claim = claim_path(self.tasks.root, self.tasks.stage, self.pack)
        if not take_claim(claim, self.attempt):
            raise Superseded(f"a later start of job {self.attempt.job} already runs")
        os.environ[CLAIM_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(claim), self.attempt.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log("start", node=os.environ.get("SLURMD_NODENAME", os.uname().nodename))
        worst: Outcome = "done"
        for index in self.tasks.packs[self.pack]:
            if self.tasks.is_done(index):
                print(f"task {index} is done already", flush=True)
                continue
            found = self._task(index)
            worst = found if worst == "done" else worst
            if self.signalled or found in ("again", "stopped", "interrupted"):
                worst = found
                break
        return self._conclude(self._summary(worst))

    def _summary(self, found: Outcome) -> Summary:
        return Summary(self.attempt.name, found, self._progress() > self.before)

    def _progress(self) -> int:
        """Grows as the pack gets further: the iteration of a resumable stage, else the number of done tasks."""
        if self.tasks.progress is not None:
            return read_progress(self.tasks) or 0
        return sum(self.tasks.is_done(index) for index in self.tasks.packs[self.pack])

    def _task(self, index: int) -> Outcome:
        """Run one task and, if all its ranks are done, write its marker."""
        problem = self._input_problem(index)
        if problem:
            print(f"error: {self.tasks.stage} task {index}: {problem}", file=sys.stderr, flush=True)
            return "refused"
        for rank in range(self.tasks.ranks):
            ExitRecord.path(self.folder, index, rank).unlink(missing_ok=True)
        requeued = self._launch(index)
        if requeued:
            return "interrupted"
        records = [ExitRecord.read(ExitRecord.path(self.folder, index, rank)) for rank in range(self.tasks.ranks)]
        found = outcome(records, self.signalled)
        if found == "done":
            found = self._mark_done(index)
        print(f"--- {self.tasks.stage} task {index}: {found}", flush=True)
        return found

    def _mark_done(self, index: int) -> Outcome:
        task, root = self.tasks.tasks[index], self.tasks.root
        try:
            marker = Marker.of(root, task.key, task.outputs, counts_file=task.counts)
        except (OSError, ValueError) as error:
            print(f"error: {self.tasks.stage} task {index}: {error}", file=sys.stderr, flush=True)
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
        """Run the task's ranks to their end. True if Slurm has been asked to requeue the job meanwhile."""
        supervise = [supervisor_python(self.tasks), "-u", "-m", "snakmodel.supervise", str(self.path)]
        supervise += ["--task", str(index), "--folder", str(self.folder)]
        start = self._start_srun if self.on_slurm else self._start_children
        self.ranks = start(supervise)
        told: float | None = None
        while None in [rank.poll() for rank in self.ranks]:
            if self.signalled and self.on_slurm:
                self._requeue("ended by a signal (time limit or preemption)", self._summary("interrupted"))
                return True
            crashed = any(rank.returncode not in (None, 0) for rank in self.ranks)
            if told is None and (self.signalled or crashed) and not self.on_slurm:
                told = time.monotonic()
                self._signal_ranks(signal.SIGTERM)
            if told is not None and time.monotonic() - told > _RANK_GRACE_SECONDS and crashed:
                self._signal_ranks(signal.SIGKILL)
            time.sleep(0.05)
        return False

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

    def _conclude(self, summary: Summary) -> int:
        """Requeue, or leave with the exit code that the summary deserves."""
        past = history(self.attempts, self.attempt)
        verdict = decide(past, summary, without_progress=self.tasks.without_progress, crashes=self.tasks.crashes)
        if verdict.again and self.on_slurm:
            self._requeue(verdict.reason, summary)
        summary.write(self.folder)
        if verdict.again:
            self._log("again", reason=verdict.reason)
            return EXIT_AGAIN
        self._log("done" if summary.outcome == "done" else "failed", reason=verdict.reason)
        print(f"=== {self.tasks.stage} pack {self.pack}: {verdict.reason}", flush=True)
        return {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "refused": EXIT_INPUTS_MISSING}.get(summary.outcome, 1)

    def _requeue(self, reason: str, summary: Summary) -> None:
        """Ask Slurm to start this job again, until it does; then wait to be ended by it."""
        summary.write(self.folder)
        self._log("requeue", reason=reason)
        job = self.attempt.job
        pause = 1.0
        while True:
            check_claim()
            asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            if asked.returncode == 0:
                break
            print(
                f"scontrol requeue {job}: {asked.stderr.strip()}; again in {pause:.0f} s", file=sys.stderr, flush=True
            )
            time.sleep(pause)
            pause = min(60.0, pause * 2)
        print(f"=== requeued {job}: {reason}", flush=True)
        time.sleep(600)

    def _log(self, event: str, **details: object) -> None:
        log_event(self.tasks.root, self.tasks.stage, event, pack=self.pack, attempt=self.attempt.name, **details)


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
