"""Which job each pack of a run has, which jobs a pack has to wait for, and what Slurm still knows of these jobs.

Nothing in here asks Slurm: what it lists (id -> name, as `ask.my_jobs` returns it) is handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from snakmodel.chain.stage import Stage
from snakmodel.slurm.ask import same_job
from snakmodel.slurm.journal import Submission


@dataclass(frozen=True)
class WrongId:
    """An id that sbatch seemed to print for a job that Slurm lists under a different id."""

    stage: str
    token: str
    printed: str
    actual: str


@dataclass(frozen=True)
class LookUp:
    """What Slurm's list says about some jobs of a stage."""

    wrong_ids: list[WrongId]
    forgotten: list[int]
    """The packs of the jobs that Slurm does not know any more."""


@dataclass
class JobTable:
    """The job of each pack that is queued, running or submitted."""

    queued_before: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Maps stages and their packs to the jobs that were queued or running before this process submitted anything."""
    tokens: dict[tuple[str, str], str] = field(default_factory=dict)
    """Maps (stage, job) to the job's token, which tells it from a later job to which Slurm has given the same id."""
    jobs: dict[str, dict[int, str]] = field(init=False)
    """Maps each stage to the job of each of its packs."""

    def __post_init__(self) -> None:
        self.jobs = {stage: dict(packs) for stage, packs in self.queued_before.items()}

    def of(self, stage: str) -> Mapping[int, str]:
        """The job of each pack of one stage."""
        return self.jobs.get(stage, {})

    def enter(self, one: Submission) -> None:
        """Enter the job that Slurm has accepted for a submission."""
        self.tokens[one.stage, one.job] = one.token
        self.jobs.setdefault(one.stage, {}).update(dict.fromkeys(one.packs, one.job))

    def remove(self, stage: str, packs: Iterable[int]) -> None:
        """Remove the jobs of these packs, which Slurm has forgotten."""
        for pack in packs:
            del self.jobs[stage][pack]

    def group_by_dependency(self, stage: Stage, packs: Sequence[int]) -> dict[str, list[int]]:
        """Group packs by the dependency that they need.

        A pack needs none for what is done already, `aftercorr` where the pack of the same number is submitted now, and
        `afterok` where that pack was queued before or where the stage waits for the whole of another one.
        """
        whole: list[str] = []
        same: list[str] = []
        for other, kind in stage.waits.items():
            if kind == "all":
                whole += [f"afterok:{job}" for job in sorted(set(self.of(other).values()))]
            else:
                same.append(other)
        groups: dict[str, list[int]] = {}
        for pack in packs:
            parts = list(whole)
            for other in same:
                job = self.of(other).get(pack)
                before = self.queued_before.get(other, {}).get(pack)
                parts += [f"{'afterok' if job == before else 'aftercorr'}:{job}"] if job else []
            groups.setdefault(",".join(dict.fromkeys(parts)), []).append(pack)
        return groups

    def after_any(self, submissions: Sequence[Submission]) -> str:
        """The dependency on the end of all jobs of these submissions, as far as they are still in the table."""
        kept = {job for packs in self.jobs.values() for job in packs.values()}
        return ",".join(dict.fromkeys(f"afterany:{one.job}" for one in submissions if one.job in kept))

    def after_all(self, stages: Iterable[str]) -> str:
        """The dependency on the end of all jobs of these stages."""
        jobs = (job for stage in stages for job in self.of(stage).values())
        return ",".join(dict.fromkeys(f"afterany:{job}" for job in jobs))

    def look_up(self, stage: str, known: Mapping[str, str], jobs: Iterable[str] | None = None) -> LookUp:
        """Look for jobs of a stage (by default all of them) among the jobs that Slurm lists in `known` (id -> name).

        A job's token is always searched for before the job counts as forgotten, because the id may be a wrong number
        that a wrapper of sbatch printed. The right id then takes the place of the wrong one in the table.
        """
        wrong_ids: list[WrongId] = []
        forgotten: list[int] = []
        for job in list(dict.fromkeys(self.of(stage).values() if jobs is None else jobs)):
            packs = sorted(pack for pack, held in self.of(stage).items() if held == job)
            actual = self._actual_id(stage, job, known)
            if not actual:
                forgotten += packs
            elif actual != job:
                token = self.tokens[stage, job]
                self.jobs[stage].update(dict.fromkeys(packs, actual))
                self.tokens[stage, actual] = token
                wrong_ids.append(WrongId(stage, token, job, actual))
        return LookUp(wrong_ids, sorted(forgotten))

    def _actual_id(self, stage: str, job: str, known: Mapping[str, str]) -> str:
        """The id under which Slurm lists a job; empty if it does not list the job."""
        token = self.tokens.get((stage, job), "")  # empty if the job was found in the queue by its token
        if same_job(known.get(job, ""), token) if token else job in known:
            return job
        return next((other for other, name in known.items() if token and name.endswith(f"-{token}")), "")
