"""python -m snakmodel.job.driver TASKLIST [--pack N]

The batch step of every job: does the tasks of one pack that have no done marker.

For each task it verifies the markers of what the task reads, starts the ranks (through srun, or as children on this
machine), reads their exit records and writes the done marker. Then it alone decides whether the job is done, is
requeued or has failed.

The exit code is 0 if the pack is done, 75 if it has to be run again (on Slurm, the job is requeued already), 76 if it
was stopped on request, 3 if inputs are missing, and 1 if it failed or was cancelled.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from run_contract.claim import ATTEMPT_VARIABLE, CLAIM_VARIABLE, check_claim
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_NO_ROOM, NoRoom, Superseded
from run_contract.output import say
from run_contract.publish import write_json
from snakmodel.job.ending import Ending, Work
from snakmodel.job.pack_attempt import PackAttempt
from snakmodel.job.ranks import Ranks
from snakmodel.job.task_inputs import TaskInputs
from snakmodel.run import reads
from snakmodel.run.attempt_files import hung_path, started_path
from snakmodel.run.attempts import ExitRecord, Kind, Outcome, claim_path, culprits, outcome, take_claim
from snakmodel.run.markers import READ, Marker
from snakmodel.run.task_list import TaskList


class _Signalled(Exception):
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
        self.here = PackAttempt.current(self.tasks, pack)
        self.inputs = TaskInputs(self.tasks)
        self.ranks = Ranks(path, self.tasks, self.here.folder, lambda: self.signalled, self._on_hung)
        self.ending = Ending(self.here, self.ranks.running)
        self.work = Work()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self.interruptible:
            self.interruptible = False
            raise _Signalled

    @contextmanager
    def _ends_at_signal(self) -> Iterator[None]:
        """Let a signal end the body, which computes checksums of large files, by raising _Signalled."""
        if self.signalled:
            raise _Signalled
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False

    def run(self) -> int:
        """Work through the pack, and return the exit code."""
        try:
            found = self._work_while_there_is_room()
            self.work.signalled = self.work.signalled or self.signalled
            return self.ending.conclude(found, self.work)
        except Superseded as error:
            self.here.log("superseded", reason=str(error))
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
        claim, attempt = claim_path(self.tasks.root, self.tasks.stage, self.here.pack), self.here.attempt
        if not take_claim(claim, attempt):
            raise Superseded(f"a later start of job {attempt.job} already runs")
        os.environ[CLAIM_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(claim), attempt.name

    def _work(self) -> Outcome:
        write_json(self.here.folder / "start.json", {"progress": self.here.before, "node": self.here.node})
        self.ending.report_before()
        self.here.log("start", node=self.here.node)
        worst: Outcome = "done"
        for index in self.tasks.packs[self.here.pack]:
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

    def _task(self, index: int) -> Outcome:
        """Run one task and, if all its ranks are done, write its marker."""
        try:
            with self._ends_at_signal():
                problem = self.inputs.problem(index)
                content = "" if problem else reads.content(self.tasks, index, self.inputs.markers)
                renewed = reads.renewed(self.tasks, index, content)
        except _Signalled:
            return "interrupted"
        if problem:
            say(f"error: {self.tasks.stage} task {index}: {problem}", error=True)
            return "refused"
        if renewed:
            check_claim()
            renewed.write(self.tasks.marker_path(self.tasks.stage, index))
            say(f"task {index}: what it reads is the same as when it was done; its outputs stay")
            return "done"
        folder = self.here.folder
        records = [ExitRecord.path(folder, index, rank) for rank in range(self.tasks.ranks)]
        for path in (*records, hung_path(folder, index), started_path(folder, index)):
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
        """The outcome of a task, judged by the exit records of its ranks."""
        found = outcome(records, self.signalled)
        self.work.signalled = any(record and record.signalled for record in records)
        hung = any(record and record.hung for record in records) or self.work.kind == "hung"
        if hung and found not in ("done", "again"):
            found = "crashed"
        alone = [self.here.node] if self.tasks.nodes == 1 else []
        if found == "crashed" and not any(records) and self.ending.restarts_already():
            self.work.kind, self.work.nodes = "node-failure", alone
            return "lost"
        if found == "crashed":
            codes = {record.rank if record else "?": record.code if record else None for record in records}
            full = EXIT_NO_ROOM in (*codes.values(), *self.ranks.codes())
            kind: Kind = "hung" if hung else "disk-full" if full else "crash"
            self._crashed(kind, [] if kind == "disk-full" else culprits(records) or alone, codes=codes)
        return found

    def _crashed(self, kind: Kind, nodes: list[str], **details: object) -> None:
        """Record why this attempt crashed, and on which nodes."""
        self.work.kind, self.work.nodes = kind, nodes
        self.here.log("crash", kind=kind, nodes=nodes, **details)

    def _on_hung(self, index: int, reason: str) -> None:
        self.work.kind = "hung"
        self.here.log("hung", kind="hung", reason=reason, task=index)

    def _mark_done(self, index: int, content: str, before: list[tuple[int, int]]) -> Outcome:
        """Write the marker of a task. `before` holds the versions of the files from outside when the task began."""
        task, root = self.tasks.tasks[index], self.tasks.root
        try:
            with self._ends_at_signal():
                marker = replace(Marker.of(root, task.key, task.outputs, counts_file=task.counts), content=content)
                if task.reads:
                    marker.counts[READ] = reads.digests(task.reads, before)
        except _Signalled:
            return "interrupted"
        except (OSError, ValueError) as error:
            say(f"error: {self.tasks.stage} task {index}: {error}", error=True)
            self.work.kind = "crash"
            return "crashed"
        check_claim()
        marker.write(self.tasks.marker_path(self.tasks.stage, index))
        return "done"


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
