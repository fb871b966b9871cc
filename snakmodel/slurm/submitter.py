"""Turns a plan into sbatch calls: with dependencies, within Slurm's limits, and with a way to submit the rest later.

Stage by stage, the missing packs are submitted as a few arrays, each of which waits for the jobs whose outputs the
stage reads. What Slurm has no room for is submitted later: either by one continuation job, which runs the same launcher
again when everything before it has ended, or by this process, which then waits for room.

wanted_packs.py knows what to submit, room.py how much of it fits, job_table.py which jobs a pack waits for, and
sbatch_calls.py how to submit. This module asks Slurm what it knows, and uses the four in turn.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from run_contract.errors import UserError
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Stage
from snakmodel.slurm.ask import my_jobs
from snakmodel.slurm.batch_file import active_packs, read_submissions, scrub_environment
from snakmodel.slurm.job_table import JobTable
from snakmodel.slurm.jobs import CONTINUATION, array_ranges
from snakmodel.slurm.journal import Journal, Submission
from snakmodel.slurm.limits import Limits, check_indices, read_limits
from snakmodel.slurm.room import QueueRoom, Room
from snakmodel.slurm.sbatch_calls import SbatchCalls, continuation_stage
from snakmodel.slurm.wanted_packs import tried_packs, wanted_packs

SAVED_SECONDS = 7
"""slurmctld writes what it has accepted to disk within five seconds; if it is killed before that, it forgets it."""
_REMEMBERED_SECONDS = 240
"""Slurm lists ended jobs for at least this long, if MinJobAge has its default of 300 s."""


@dataclass(frozen=True)
class SubmissionReport:
    """What a scheduler has done with a plan."""

    submitted: Sequence[Submission]
    queued_before: Mapping[str, Mapping[int, str]]
    """Maps stages and their packs to the jobs that were queued or running at the start."""
    given_up: Mapping[str, set[int]]
    """Maps stages to the packs that are left out, because they, or packs that they need, failed in this series."""
    left: int
    """The number of packs that the continuation job will submit."""
    limits: Limits | None
    """The limits that were read last; None in a dry run."""
    is_to_be_continued: bool = False
    """Whether a continuation job will plan and submit further stages."""


@dataclass
class SlurmScheduler:
    """Submits the missing packs of a plan, chained by dependencies."""

    plan: RunPlan
    dry: bool = False
    wait: bool = False
    """Wait here for room in the queue, instead of leaving the rest to a continuation job."""
    resubmit_command: Sequence[str] = ()
    """The command that submits the rest of a run; a continuation job runs it with `--continues SERIES` added."""
    continues: str | None = None
    """In a continuation job: the series of submissions that it continues."""

    def __post_init__(self) -> None:
        self.patience = 0.0 if self.continues is None else 3600.0
        self.journal = Journal(self.plan.paths)
        self.calls = SbatchCalls(self.plan, self.journal, self.continues or uuid.uuid4().hex[:10], self.dry)
        cluster = self.plan.config.cluster
        stages = [*self.plan.chain.stages, continuation_stage(cluster)]
        self.room = QueueRoom(
            partial(read_limits, cluster, stages, self.patience),
            stays=self.wait,
            continues=self.continues is not None,
            can_continue=bool(self.resubmit_command),
        )
        self.table = JobTable()
        self.inside = ""
        """Id of the array job that this process runs in, as a continuation job does; empty outside of one."""

    def run(self) -> SubmissionReport:
        """Submit stage by stage, and report what was submitted. With `dry`, only the batch files are written."""
        self.inside = os.environ.get("SLURM_ARRAY_JOB_ID", "")
        scrub_environment()
        if not self.dry:
            self._look_around()
        tried = tried_packs(self.plan, self.continues)
        wanted, given_up = wanted_packs(self.plan, self.table.queued_before, tried)
        left = self._submit_in_order(wanted)
        goes_on = self.plan.unfinished and not self.dry and not any(given_up.values())
        if goes_on and not left:
            self._leave_the_rest()
        return SubmissionReport(
            self.calls.submitted, self.table.queued_before, given_up, left, self.room.limits, goes_on
        )

    def resubmit_forgotten(self) -> list[str]:
        """Make sure that Slurm has kept what it accepted, submit again what it has lost, and return notes about that.

        Slurm forgets jobs only if its controller is killed within seconds of accepting them, so only the latest jobs
        can be lost. Raises Unanswered.
        """
        lost = {} if self.dry else self._forgotten_submissions()
        if not lost:
            return []
        for stage, packs in lost.items():
            self.table.remove(stage, packs)
        before = len(self.calls.submitted)
        self.room.update()
        self._submit_in_order({stage: packs for stage, packs in lost.items() if stage != CONTINUATION})
        if CONTINUATION in lost and not self.table.of(CONTINUATION):
            self._leave_the_rest()
        new = self.calls.submitted[before:]
        return [f"Slurm had forgotten stage {one.stage}'s packs {array_ranges(one.packs)}" for one in new]

    def _look_around(self) -> None:
        """Read the limits, settle the submissions that an earlier launcher left open, and find out what is queued."""
        limits = self.room.update()
        for name in self.plan.missing:
            check_indices(name, len(self.plan.packs[name]), self.plan.chain[name].per_shard, limits)
        self.journal.message_timeout = limits.message_timeout
        self.journal.settle()
        queued = active_packs(self.plan, self.patience)
        lines = read_submissions(self.plan.paths.submissions)
        self.table = JobTable(queued, {(line["stage"], line["job"]): line["token"] for line in lines})

    def _submit_in_order(self, wanted: Mapping[str, list[int]]) -> int:
        """Submit these packs in chain order as far as there is room, and make sure that the rest is submitted later.

        Returns the number of packs that are left to a continuation job.
        """
        todo = {stage: packs for stage, packs in wanted.items() if packs}
        while todo:
            room = self.room.find(todo, continuation_is_queued=self._continuation_is_queued())
            for name in list(todo):
                if left := self._submit_stage(name, todo.pop(name), room):
                    todo = {name: left, **todo}
                    break
            if todo and not self.wait:
                self._leave_the_rest()
                return sum(len(packs) for packs in todo.values())
            if todo:
                self.room.update()
        return 0

    def _submit_stage(self, name: str, packs: list[int], room: Room) -> list[int]:
        """Submit as many packs of a stage as there is room for, and return the packs that are left."""
        stage = self.plan.chain[name]
        while packs and room.of(name):
            self._restore_dependencies(stage, room)
            for dependency, group in self.table.group_by_dependency(stage, packs).items():
                if now := group[: room.array_of(name)]:
                    self.table.enter(self.calls.submit_packs(stage, now, dependency, room.width(name)))
                    room.take(name, len(now))
            packs = [pack for pack in packs if pack not in self.table.of(name)]
        return packs

    def _restore_dependencies(self, stage: Stage, room: Room) -> None:
        """Make sure that Slurm still knows the jobs that a stage depends on.

        Slurm treats a dependency on a job that it has forgotten as met at once. Packs that a forgotten job has finished
        need no dependency, and packs that it has not finished are submitted again. Raises UserError if there is no room
        for them.
        """
        if self.dry or not any(self.table.of(other) for other in stage.waits):
            return
        known = my_jobs(self.patience)
        for other in stage.waits:
            forgotten = self._look_up(other, known)
            self.table.remove(other, forgotten)
            lost = [pack for pack in forgotten if not self._is_done(other, pack)]
            if lost:
                print(
                    f"note: Slurm has forgotten jobs of stage {other}; submitting its packs {array_ranges(lost)} again"
                )
                if left := self._submit_stage(other, lost, room):
                    raise UserError(
                        f"no room for packs {array_ranges(left)} of stage {other}; run the same command again"
                    )

    def _forgotten_submissions(self) -> dict[str, list[int]]:
        """The packs of each stage that Slurm accepted but does not know any more.

        Slurm is asked once it has had the time to write them to disk.
        """
        fresh = [one for one in self.calls.submitted if time.monotonic() - one.accepted < _REMEMBERED_SECONDS]
        if not fresh:
            return {}
        time.sleep(max(0.0, max(one.accepted for one in fresh) + SAVED_SECONDS - time.monotonic()))
        known = my_jobs(self.journal.patience)
        lost: dict[str, list[int]] = {}
        for one in fresh:
            if self.table.tokens[one.stage, one.job] == one.token:  # else a later job has got the same id
                forgotten = set(self._look_up(one.stage, known, [one.job]))
                packs = [pack for pack in one.packs if pack in forgotten and not self._has_ended(one, pack)]
                lost.setdefault(one.stage, []).extend(packs)
        return {stage: packs for stage, packs in lost.items() if packs}

    def _look_up(self, stage: str, known: Mapping[str, str], jobs: Sequence[str] | None = None) -> list[int]:
        """The packs of a stage whose jobs Slurm has forgotten. Wrong ids are corrected on the way."""
        found = self.table.look_up(stage, known, jobs)
        for wrong in found.wrong_ids:
            self.calls.correct(wrong)
        return found.forgotten

    def _is_done(self, stage: str, pack: int) -> bool:
        return not any(self.plan.chain.marker_problem(stage, index) for index in self.plan.packs[stage][pack])

    def _has_ended(self, one: Submission, pack: int) -> bool:
        """Whether a submission's job has recorded how it ended with a pack; in that case it was not forgotten."""
        folder = self.plan.paths.root / "attempts" / one.stage / f"{pack:05d}"
        return any(folder.glob(f"{one.job}_{pack}.r*/summary.json"))

    def _continuation_is_queued(self) -> bool:
        """Whether another job that submits the rest is queued already."""
        return bool(set(self.table.queued_before.get(CONTINUATION, {}).values()) - {self.inside})

    def _leave_the_rest(self) -> None:
        """Submit the continuation job: when everything submitted so far has ended, it submits the rest."""
        if not self._continuation_is_queued():
            dependency = self.table.after_any(self.calls.submitted) or self.table.after_all(self.plan.missing)
            self.table.enter(self.calls.submit_continuation(self.resubmit_command, dependency))
