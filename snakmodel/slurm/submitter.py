"""Turns a plan into sbatch calls: with dependencies, within Slurm's limits, and with a way to submit the rest later.

Stage by stage, the missing packs are submitted as a few arrays, each of which waits for the jobs whose outputs the
stage reads. What Slurm has no room for is submitted later: either by one continuation job, which runs the same launcher
again when everything before it has ended, or by this process, which then waits for room.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.chain.plan import Plan
from snakmodel.chain.stage import Stage
from snakmodel.slurm.ask import my_jobs, same_job
from snakmodel.slurm.batch_file import active_packs, make_executor, read_submissions, scrub_environment
from snakmodel.slurm.jobs import CONTINUATION, array_ranges
from snakmodel.slurm.journal import Journal, Refused, Submission
from snakmodel.slurm.limits import Limits, Room, check_indices, read_limits

_POLL_SECONDS = 15
SAVED_SECONDS = 7
"""slurmctld writes what it has accepted to disk within five seconds; if it is killed before that, it forgets it."""
_REMEMBERED_SECONDS = 240
"""Slurm lists ended jobs for at least this long, if MinJobAge has its default of 300 s."""


@dataclass
class SlurmScheduler:
    """Submits the missing packs of a plan, chained by dependencies."""

    plan: Plan
    dry: bool = False
    wait: bool = False
    """Wait here for room in the queue, instead of leaving the rest to a continuation job."""
    again: Sequence[str] = ()
    """Command that submits the rest of a run; a continuation job runs it with `--continues SERIES` added."""
    continues: str | None = None
    """In a continuation job: the series of submissions that it continues."""
    active: dict[str, dict[int, str]] = field(default_factory=dict)
    """Stage -> pack -> the job that was queued or running for it at the start."""
    submitted: list[Submission] = field(default_factory=list)
    given_up: dict[str, set[int]] = field(default_factory=dict)
    """Stage -> packs that a continuation job leaves out, since they, or packs that they need, failed in this series."""
    left: int = 0
    """Number of packs that the continuation job will submit."""

    def __post_init__(self) -> None:
        self.series = self.continues or uuid.uuid4().hex[:10]
        self.patience = 0.0 if self.continues is None else 3600.0
        self.journal = Journal(self.plan.paths)
        self.limits: Limits | None = None
        self.jobs: dict[str, dict[int, str]] = {}
        self.tokens: dict[tuple[str, str], str] = {}
        """(Stage, job) -> token. The id alone does not tell: a controller that has lost its state uses ids again."""
        self.inside = ""
        """Id of the array job that this process runs in, as a continuation job does; empty outside of one."""

    def run(self) -> list[Submission]:
        """Submit stage by stage, and return what was submitted. With `dry`, only the batch files are written."""
        self.inside = os.environ.get("SLURM_ARRAY_JOB_ID", "")
        scrub_environment()
        if not self.dry:
            self._look_around()
        self._submit_all({name: packs for name, packs in self._wanted().items() if packs})
        return self.submitted

    def confirm(self) -> list[str]:
        """Make sure that Slurm has kept what it accepted, submit again what it has lost, and return notes about that.

        Slurm forgets jobs only if its controller is killed within seconds of accepting them, so only the latest jobs
        can be lost. Raises Unanswered.
        """
        lost = {} if self.dry else self._forgotten()
        if not lost:
            return []
        for stage, packs in lost.items():
            self.jobs[stage] = {pack: job for pack, job in self.jobs[stage].items() if pack not in packs}
        before = len(self.submitted)
        self.limits = self._read_limits()
        self._submit_all({stage: packs for stage, packs in lost.items() if stage != CONTINUATION})
        if CONTINUATION in lost and not self.jobs[CONTINUATION]:
            self._continue()
        again = self.submitted[before:]
        return [f"Slurm had forgotten stage {one.stage}'s packs {array_ranges(one.packs)}" for one in again]

    def _forgotten(self) -> dict[str, list[int]]:
        """Stage -> packs that Slurm accepted but does not know any more, once it must have written them to disk."""
        fresh = [one for one in self.submitted if time.monotonic() - one.accepted < _REMEMBERED_SECONDS]
        if not fresh:
            return {}
        time.sleep(max(0.0, max(one.accepted for one in fresh) + SAVED_SECONDS - time.monotonic()))
        known = my_jobs(self.journal.patience)
        lost: dict[str, list[int]] = {}
        for one in fresh:
            current = self.tokens[one.stage, one.job] == one.token
            if current and not self._holds(one.stage, one.job, known):
                packs = [pack for pack in one.packs if self.jobs[one.stage].get(pack) == one.job]
                lost.setdefault(one.stage, []).extend(pack for pack in packs if not self._has_ended(one, pack))
        return {stage: packs for stage, packs in lost.items() if packs}

    def _holds(self, stage: str, job: str, known: Mapping[str, str]) -> bool:
        """Whether Slurm, which lists the jobs in `known` (id -> name), still has a job.

        The job's token is always searched for before anything is submitted again, because the id may be a wrong number
        that a wrapper of sbatch printed. The right id then replaces the wrong one everywhere.
        """
        token = self.tokens.get((stage, job), "")  # empty if the job was found in the queue by its token
        if same_job(known.get(job, ""), token) if token else job in known:
            return True
        found = next((other for other, name in known.items() if token and name.endswith(f"-{token}")), "")
        if not found:
            return False
        print(f"note: the job of stage {stage} is {found}, not {job} as sbatch seemed to say")
        packs = sorted(pack for pack, held in self.jobs[stage].items() if held == job)
        self.jobs[stage].update(dict.fromkeys(packs, found))
        self.tokens[stage, found] = token
        for one in self.submitted:
            if one.token == token:
                one.job = found
                self.journal.accept(one)
        return True

    def _has_ended(self, one: Submission, pack: int) -> bool:
        """Whether a submission's job has recorded how it ended with a pack; in that case it was not forgotten."""
        folder = self.plan.paths.root / "attempts" / one.stage / f"{pack:05d}"
        return any(folder.glob(f"{one.job}_{pack}.r*/summary.json"))

    def _submit_all(self, todo: dict[str, list[int]]) -> None:
        """Submit these packs in chain order as far as there is room, and make sure that the rest is submitted later."""
        while any(todo.values()):
            room = self._room(todo)
            for name in todo:
                todo[name] = self._stage(name, todo[name], room)
                if todo[name]:
                    break
            if any(todo.values()) and not self.wait:
                self.left = sum(len(packs) for packs in todo.values())
                self._continue()
                break
            if any(todo.values()):
                self.limits = self._read_limits()

    def _look_around(self) -> None:
        """Read the limits, settle the submissions that an earlier launcher left open, and find out what is queued."""
        self.limits = self._read_limits()
        for name in self.plan.missing:
            check_indices(name, len(self.plan.packs[name]), self.plan.chain[name].per_shard, self.limits)
        self.journal.message_timeout = self.limits.message_timeout
        self.journal.settle()
        self.active = active_packs(self.plan, self.patience)
        self.jobs = {name: dict(packs) for name, packs in self.active.items()}
        lines = read_submissions(self.plan.paths.submissions)
        self.tokens = {(line["stage"], line["job"]): line["token"] for line in lines}

    def _read_limits(self) -> Limits:
        stages = [*self.plan.chain.stages, self._continuation()]
        return read_limits(self.plan.config.cluster, stages, self.patience)

    def _wanted(self) -> dict[str, list[int]]:
        """Stage -> packs to submit: those that are missing and not queued.

        A continuation job also leaves out the packs that were tried before in its series, and the packs that wait for
        such packs.
        """
        lines = read_submissions(self.plan.paths.submissions) if self.continues else []
        tried = {
            (line["stage"], pack) for line in lines if line.get("series") == self.continues for pack in line["packs"]
        }
        wanted: dict[str, list[int]] = {}
        for name, packs in self.plan.missing.items():
            queued = self.active.get(name, {})
            bad = {pack for pack in packs if (name, pack) in tried and pack not in queued}
            for other, kind in self.plan.chain[name].waits.items():
                lost = self.given_up.get(other, set())
                bad |= set(packs) if kind == "all" and lost else lost & set(packs)
            self.given_up[name] = bad
            wanted[name] = [pack for pack in packs if pack not in queued and pack not in bad]
        return wanted

    def _has_continuation(self) -> bool:
        """Whether another job that submits the rest is queued already."""
        return bool(set(self.active.get(CONTINUATION, {}).values()) - {self.inside})

    def _room(self, todo: Mapping[str, list[int]]) -> Room:
        """The room in the queue: for one pack of the first stage at least, and for a continuation job if it is needed.

        With `wait`, and inside a continuation job, this waits until there is room; otherwise it raises UserError.
        """
        first = next(name for name, packs in todo.items() if packs)
        said = ""
        while True:
            room = Room(self.limits)
            whole = room.holds(todo)
            if not whole and not self.wait and not self._has_continuation():
                room.take(CONTINUATION, 1)
            limit = room.tightest(first)
            if limit is None or (not self.wait and self._has_continuation()):
                return room
            # When this process waits for room, a few larger arrays are better than many small ones.
            least = min(len(todo[first]), max(1, limit.most // 4)) if self.wait else 1
            if room.of(first) >= least:
                break
            what = f"{limit}; {sum(len(packs) for packs in todo.values())} packs are left to submit"
            if limit.most < least + room.taken.get(limit.name, 0):
                raise UserError(f"{what}. This limit is too small for a chain of jobs: ask for a larger one.")
            if not self.wait and self.continues is None:
                raise UserError(f"no room in the queue: {what}. Wait, or add --wait-for-room.")
            if what != said:
                print(f"waiting for room: {what}", flush=True)
                said = what
            time.sleep(_POLL_SECONDS)
            self.limits = self._read_limits()
        if not whole and not self.wait and not self.again:
            raise UserError(f"this does not fit into the queue: {limit}. Add --wait-for-room.")
        return room

    def _stage(self, name: str, packs: list[int], room: Room) -> list[int]:
        """Submit as many packs of a stage as there is room for, and return the packs that are left."""
        stage = self.plan.chain[name]
        while packs and room.of(name):
            self._confirm(stage, room)
            groups = self._by_dependency(stage, packs)
            for dependency, group in groups.items():
                now = group[: min(room.of(name), self.limits.array_tasks if self.limits else len(group))]
                if now:
                    self._submit(stage, now, dependency)
                    room.take(name, len(now))
            done = self.jobs.get(name, {})
            packs = [pack for pack in packs if pack not in done]
        return packs

    def _confirm(self, stage: Stage, room: Room) -> None:
        """Make sure that Slurm still knows the jobs that a stage depends on.

        Slurm treats a dependency on a job that it has forgotten as met at once. Packs that a forgotten job has finished
        need no dependency, and packs that it has not finished are submitted again. Raises UserError if there is no room
        for them.
        """
        if self.dry or not any(self.jobs.get(other) for other in stage.waits):
            return
        known = my_jobs(self.patience)
        for other in stage.waits:
            held = self.jobs.get(other, {})
            missing = [job for job in dict.fromkeys(held.values()) if not self._holds(other, job, known)]
            gone = sorted(pack for pack, job in held.items() if job in missing)
            for pack in gone:
                del held[pack]
            lost = [pack for pack in gone if not self._is_done(other, pack)]
            if lost:
                print(
                    f"note: Slurm has forgotten jobs of stage {other}; submitting its packs {array_ranges(lost)} again"
                )
                left = self._stage(other, lost, room)
                if left:
                    raise UserError(
                        f"no room for packs {array_ranges(left)} of stage {other}; run the same command again"
                    )

    def _is_done(self, stage: str, pack: int) -> bool:
        return not any(self.plan.chain.marker_problem(stage, index) for index in self.plan.packs[stage][pack])

    def _by_dependency(self, stage: Stage, packs: Sequence[int]) -> dict[str, list[int]]:
        """Group packs by the dependency that they need.

        A pack needs none for what is done already, `aftercorr` where the pack of the same number is submitted now, and
        `afterok` where that pack was queued before or where the stage waits for the whole of another one.
        """
        whole: list[str] = []
        same: list[str] = []
        for other, kind in stage.waits.items():
            if kind == "all":
                whole += [f"afterok:{job}" for job in sorted(set(self.jobs.get(other, {}).values()))]
            else:
                same.append(other)
        groups: dict[str, list[int]] = {}
        for pack in packs:
            parts = list(whole)
            for other in same:
                job = self.jobs.get(other, {}).get(pack)
                before = self.active.get(other, {}).get(pack)
                parts += [f"{'afterok' if job == before else 'aftercorr'}:{job}"] if job else []
            groups.setdefault(",".join(dict.fromkeys(parts)), []).append(pack)
        return groups

    def _submit(self, stage: Stage, packs: list[int], dependency: str) -> None:
        tasks = self.plan.write_task_list(stage, self._python())
        self._send(
            stage, packs, dependency, shlex.join([self._python(), "-u", "-m", "snakmodel.job.driver", str(tasks)])
        )

    def _send(self, stage: Stage, packs: list[int], dependency: str, command: str) -> None:
        one = Submission(stage.name, packs, dependency, uuid.uuid4().hex[:10], self.series)
        folder = self.plan.paths.batch_file(stage.name)
        width = self.limits.width(stage.name) if self.limits else None
        executor = make_executor(self.plan, stage, folder, packs, dependency, one.token, width)
        self.plan.logs(stage.name).mkdir(parents=True, exist_ok=True)
        if self.dry:
            path = folder / f"dry-run-{len([other for other in self.submitted if other.stage == stage.name])}.sh"
            path.write_bytes(os.fsencode(executor.text(command)))
            one.job = f"<{stage.name}>"
        else:
            try:
                self.journal.submit(one, lambda: executor.send(command))
            except Refused as error:
                done = ", ".join(f"{other.stage} ({other.job})" for other in self.submitted) or "nothing"
                raise UserError(
                    f"Slurm refused stage {stage.name}: {error}\nSubmitted before it: {done}. "
                    "Correct cluster.yaml and run the same command: it submits only what is missing."
                ) from error
        one.accepted = time.monotonic()
        self.submitted.append(one)
        self.tokens[stage.name, one.job] = one.token
        self.jobs.setdefault(stage.name, {}).update(dict.fromkeys(packs, one.job))

    def _continuation(self) -> Stage:
        """The stage that stands for the job that submits the rest."""
        alone = {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "gres": None}
        return Stage(CONTINUATION, (), self.plan.config.cluster.defaults.model_copy(update=alone))

    def _continue(self) -> None:
        """Submit the continuation job: when everything submitted so far has ended, it submits the rest."""
        if self._has_continuation():
            return
        stage = self._continuation()
        resources = stage.resources
        launcher = shlex.join(["timeout", "-s", "INT", f"{resources.minutes * 60 - 90}", *self.again])
        command = (
            f"cd {shlex.quote(str(Path.cwd()))} && {launcher} --continues {self.series}; code=$?\n"
            "# 124: there was no room all the time. Requeued, it goes on waiting.\n"
            '[ $code = 124 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_0" && sleep 60\n'
            "exit $code"
        )
        kept = {job for packs in self.jobs.values() for job in packs.values()}
        before = dict.fromkeys(f"afterany:{one.job}" for one in self.submitted if one.job in kept)
        dependency = ",".join(before)
        self._send(stage, [0], dependency, command)

    def _python(self) -> str:
        return self.plan.config.cluster.python or sys.executable
