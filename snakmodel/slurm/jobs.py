"""What Slurm knows of the jobs of one run: squeue is asked first, then sacct about jobs that squeue has forgotten.

A job belongs to a run when its name ends in a token of the run's journal, or when its batch file lies in the run's
folder; a launcher that was killed before it wrote the journal leaves such jobs. This also keeps two runs of the same
name apart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snakmodel.slurm.ask import BY_HAND, Unanswered, ask

RUNNING = frozenset(
    ["RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"]
)
QUEUED = frozenset(["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"])
FAILED = frozenset(["FAILED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"])
INTERRUPTED = frozenset(["PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"])
"""States of jobs that ended through no fault of their command."""
CONTINUATION = "continuation"
"""Stands in the journal in place of a stage's name, for the job that submits the rest of a run."""
_IDS_PER_CALL = 500


@dataclass(frozen=True)
class Job:
    """One array element; the index is None for a job that is no array."""

    array: str
    index: int | None
    state: str
    reason: str
    node: str
    name: str
    command: str

    @property
    def id(self) -> str:
        """The job's id in Slurm's spelling, such as 10_3."""
        return self.array if self.index is None else f"{self.array}_{self.index}"

    @property
    def active(self) -> bool:
        """Whether the job is queued or running."""
        return self.state in RUNNING or self.state in QUEUED


@dataclass(frozen=True)
class Owner:
    """Tells the jobs of one run from all other jobs."""

    root: Path
    stages: Mapping[str, str]
    """Maps the token of each sbatch call to the stage that it submitted."""
    by_hand: Mapping[str, Mapping[str, Sequence[int]]]
    """Maps job ids to stages and their packs, for jobs that were submitted by hand and cannot be recognised by name."""

    @classmethod
    def of(cls, root: Path, journal: Sequence[Mapping[str, Any]]) -> Owner:
        """Make an owner from the run's journal of submissions."""
        tokens: dict[str, str] = {}
        by_hand: dict[str, dict[str, Sequence[int]]] = {}
        for one in journal:
            token, stage = str(one.get("token") or BY_HAND), str(one.get("stage", ""))
            if not token.startswith(BY_HAND):
                tokens[token] = stage
            elif one.get("job"):
                by_hand.setdefault(str(one["job"]), {})[stage] = one.get("packs", ())
        return cls(root.resolve(), tokens, by_hand)

    def work(self, job: Job) -> list[tuple[str, int | None]]:
        """The (stage, pack) of this run that a job is for; several where a job by hand works through them.

        The list is empty if the job does not belong to this run. The pack is None if the job is no element of an array.
        """
        token = job.name.rpartition("-")[2]
        if token in self.stages:
            return [(self.stages[token], job.index)]
        if job.array in self.by_hand:
            tasks = self.by_hand[job.array].items()
            return [(stage, pack) for stage, packs in tasks for pack in (packs if job.index is None else [job.index])]
        batch = self.root / "sbatch"
        path = Path(job.command)
        if path.is_absolute() and path.resolve().is_relative_to(batch):
            return [(path.resolve().relative_to(batch).parts[0], job.index)]
        return []

    def stages_of(self, job: Job) -> list[str]:
        """The stages of this run that a job is for."""
        return list(dict.fromkeys(stage for stage, _ in self.work(job)))


def ask_squeue() -> list[Job]:
    """All jobs of this user that the controller remembers, including those that have ended. Raises Unanswered."""
    layout = "%F|%K|%T|%r|%N|%j|%o"
    user = str(os.getuid())
    out = ask(["squeue", "--noheader", "--array", "--states=all", "--user", user, f"--format={layout}"])
    jobs = []
    for line in out.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7:
            array, index, state, reason, node, name, command = fields
            jobs.append(Job(array, int(index) if index.isdigit() else None, state, reason, node, name, command))
    return jobs


def ask_sacct(ids: Iterable[str]) -> list[Job]:
    """The records that accounting has of some job ids, one per array element. Raises Unanswered."""
    every = list(dict.fromkeys(ids))
    jobs: list[Job] = []
    for start in range(0, len(every), _IDS_PER_CALL):
        chosen = ",".join(every[start : start + _IDS_PER_CALL])
        out = ask(["sacct", "-X", "-n", "-P", "-j", chosen, "-o", "JobID,State,Reason,NodeList,JobName"])
        for line in out.splitlines():
            fields = line.split("|", 4)
            if len(fields) == 5:
                jobs += _records(*fields)
    return jobs


def _records(job: str, state: str, reason: str, node: str, name: str) -> list[Job]:
    """One record of sacct as a job per element; elements that never started share a record such as 10_[1-2,7%4]."""
    array, _, elements = job.partition("_")
    word = state.split(" ")[0] if state else ""
    where = "" if node == "None assigned" else node
    numbers: list[int | None] = list(_expand(elements)) if elements else [None]
    return [Job(array, number, word, reason, where, name, "") for number in numbers]


def _expand(elements: str) -> list[int]:
    """The array indices in Slurm's spelling as numbers: [0-2,7%4] -> 0 1 2 7; 3 -> 3."""
    found: list[int] = []
    for part in re.sub(r"%.*", "", elements.strip("[]")).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last if last.isdigit() else first) + 1)
    return found


def array_ranges(packs: Sequence[int]) -> str:
    """Array indices in Slurm's spelling: [0, 1, 2, 7] -> 0-2,7."""
    parts: list[list[int]] = []
    for pack in sorted(packs):
        if parts and pack == parts[-1][1] + 1:
            parts[-1][1] = pack
        else:
            parts.append([pack, pack])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


@dataclass
class Queue:
    """What Slurm says about the jobs of a run."""

    packs: dict[tuple[str, int], list[Job]] = field(default_factory=dict)
    """Maps each (stage, pack) to the jobs for it that squeue or sacct knows."""
    others: list[tuple[str, Job]] = field(default_factory=list)
    """Stage and job of each active job of the run that is for no pack, such as the one that submits the rest."""
    shared: set[str] = field(default_factory=set)
    """Ids of jobs that work through several packs, each as soon as there are cores for it."""
    by_id: dict[str, Job] = field(default_factory=dict)
    """Maps ids to jobs, for everything that squeue listed, including the jobs of other runs."""
    answered: bool = True
    notes: list[str] = field(default_factory=list)

    def take(self, job: Job, work: Sequence[tuple[str, int | None]]) -> None:
        """Record a job under each pack that it is for."""
        for stage, pack in work:
            if pack is not None:
                self.packs.setdefault((stage, pack), []).append(job)
        if len(work) > 1:
            self.shared.add(job.id)


def look(owner: Owner, journal: Sequence[Mapping[str, Any]], wanted: Mapping[str, set[int]]) -> Queue:
    """Ask squeue about the run, then sacct about the packs in `wanted` (stage -> packs) that squeue has forgotten."""
    queue = Queue()
    try:
        listed = ask_squeue()
    except Unanswered as error:
        listed, queue.answered = [], False
        queue.notes.append(f"Slurm did not answer ({error}); what follows is what the run's files say")
    for job in listed:
        queue.by_id[job.id] = job
        queue.take(job, work := owner.work(job))
        if job.active:
            queue.others += [(stage, job) for stage, pack in work if stage not in wanted or pack is None]
    _add_forgotten(queue, owner, journal, wanted)
    return queue


def _add_forgotten(
    queue: Queue, owner: Owner, journal: Sequence[Mapping[str, Any]], wanted: Mapping[str, set[int]]
) -> None:
    listed = {job.array for jobs in queue.packs.values() for job in jobs}
    ids = [
        str(one["job"])
        for one in journal
        if one.get("job") and str(one["job"]) not in listed and wanted.get(one["stage"], set()) & set(one["packs"])
    ]
    if not ids:
        return
    try:
        recorded = ask_sacct(ids)
    except Unanswered as error:
        why = "accounting is off" if "disabled" in str(error) else str(error)
        queue.notes.append(f"jobs that left the queue cannot be looked up ({why}); their markers and events count")
        return
    for job in recorded:
        # Where squeue answered, it lists everything that is queued or running, so a record in which sacct still calls
        # another job active is out of date.
        if not (job.active and queue.answered):
            queue.take(job, owner.work(job))
