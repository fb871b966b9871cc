"""What Slurm lets one person queue, and how many shards an array element takes so that the whole chain fits into it.

Every element of an array counts as a job. MaxArraySize bounds the indices, MaxJobCount all jobs that the controller
remembers, and where accounting enforces limits the association's and the QOS's MaxSubmit bound this user's: those of
the account and QOS that each stage names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from run_contract.errors import UserError
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster
from snakmodel.slurm.accounting import Accounting, Place, slurm_settings
from snakmodel.slurm.ask import ENDED, Unanswered, ask


@dataclass(frozen=True)
class Limit:
    """An upper bound on jobs, and how much of it is taken."""

    name: str
    most: int
    used: int
    stages: frozenset[str] | None = None
    """Stages whose jobs it counts; None: all."""

    @property
    def room(self) -> int:
        """Jobs that may be queued besides those that are."""
        return max(0, self.most - self.used)

    def counts(self, stage: str) -> bool:
        """Whether a stage's jobs count in it."""
        return self.stages is None or stage in self.stages

    def __str__(self) -> str:
        return f"{self.name} = {self.most}, {self.used} of it in use"


@dataclass(frozen=True)
class Limits:
    """All bounds that hold for this user's submissions now."""

    array_size: int
    """Array indices are smaller than this (MaxArraySize)."""
    array_tasks: int
    """Elements of one array (max_array_tasks; MaxArraySize where it is not set)."""
    queue: tuple[Limit, ...]
    """Bounds on queued jobs; one of them at least counts every stage."""
    running: tuple[Limit, ...]
    """Bounds on jobs that run at once (MaxJobs)."""
    message_timeout: float
    """Seconds after which a command gives up on the controller."""

    @property
    def tightest(self) -> Limit:
        """The bound that leaves the least room."""
        return min(self.queue, key=lambda limit: limit.room)

    def width(self, stage: str) -> int | None:
        """Jobs of a stage that may run at once, if that is limited."""
        return min((limit.most for limit in self.running if limit.counts(stage)), default=None)


@dataclass
class Room:
    """What of the limits is free, as submissions use it up. Without limits (a dry run) there is room for everything."""

    limits: Limits | None
    taken: dict[str, int] = field(default_factory=dict)
    """Limit -> jobs submitted since it was read."""

    def tightest(self, stage: str) -> Limit | None:
        """The limit that leaves a stage the least room now."""
        every = [limit for limit in self.limits.queue if limit.counts(stage)] if self.limits else []
        return min(every, key=self._left, default=None)

    def of(self, stage: str) -> int:
        """Jobs of a stage that may be submitted now."""
        limit = self.tightest(stage)
        return sys.maxsize if limit is None else max(0, self._left(limit))

    def take(self, stage: str, count: int) -> None:
        """Note that so many jobs of a stage were submitted."""
        for limit in self.limits.queue if self.limits else ():
            if limit.counts(stage):
                self.taken[limit.name] = self.taken.get(limit.name, 0) + count

    def holds(self, wanted: Mapping[str, Sequence[int]]) -> bool:
        """Whether all of this (stage -> packs) fits."""
        return all(
            sum(len(packs) for stage, packs in wanted.items() if limit.counts(stage)) <= self._left(limit)
            for limit in (self.limits.queue if self.limits else ())
        )

    def _left(self, limit: Limit) -> int:
        return limit.room - self.taken.get(limit.name, 0)


def read_limits(cluster: Cluster, stages: Sequence[Stage], patience: float = 0.0) -> Limits:
    """Ask Slurm what holds for this user's jobs of these stages. Raises Unanswered when the controller is silent."""
    settings = slurm_settings(patience)
    size = int(settings.get("MaxArraySize", "1001"))
    tasks = re.search(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", ""))
    jobs = _queued(patience)
    queue = [Limit("MaxJobCount", int(settings.get("MaxJobCount", "10000")), len(jobs))]
    running: list[Limit] = []
    try:
        accounting = Accounting.read(settings)
        if accounting:
            places = {stage.name: accounting.place(cluster.with_defaults(stage.resources)) for stage in stages}
            more, running = _accounting_limits(accounting, places, jobs)
            queue += more
    except Unanswered as error:
        print(f"note: submit limits are unknown, so none is assumed: {error}", file=sys.stderr)
    timeout = re.match(r"\d+", settings.get("MessageTimeout", "10"))
    seconds = float(timeout[0]) if timeout else 10.0
    array_tasks = min(size, int(tasks[1])) if tasks else size
    return Limits(size, array_tasks, tuple(queue), tuple(running), seconds)


@dataclass(frozen=True)
class _Job:
    """What a limit may count a queued job by."""

    user: str
    account: str
    qos: str
    partition: str
    live: bool


def _queued(patience: float) -> list[_Job]:
    """Every job that the controller remembers, one an array element."""
    text = ask(["squeue", "--noheader", "--array", "--all", "--states=all", "--format=%u|%a|%q|%P|%T"], patience)
    rows = [line.strip().split("|") for line in text.splitlines()]
    return [_Job(user, account, qos, partition, state not in ENDED) for user, account, qos, partition, state in rows]


def _accounting_limits(
    accounting: Accounting, places: Mapping[str, Place], jobs: Sequence[_Job]
) -> tuple[list[Limit], list[Limit]]:
    """The associations' and the QOS's limits that are set: on queued jobs, and on running ones."""
    user, live = accounting.user, [job for job in jobs if job.live]
    queue, running = _Found(), _Found()
    for account, partition in sorted({(place.account, place.partition) for place in places.values()}):
        which = frozenset(name for name, one in places.items() if (one.account, one.partition) == (account, partition))
        for row in accounting.of(account, partition):
            # One association may hold for several partitions: its limit is one, over all of them.
            where = f"account {account}" + (f" in partition {partition}" if row["Partition"] else "")
            own = _where(live, user=user, account=account, **({"partition": partition} if row["Partition"] else {}))
            queue.add(f"MaxSubmitJobs of {where}", row["MaxSubmitJobs"], len(own), which)
            queue.add(f"GrpSubmitJobs of {user} in {where}", row["GrpSubmitJobs"], len(own), which)
            running.add(f"MaxJobs of {where}", row["MaxJobs"], 0, which)
        all_ = len(_where(live, account=account))
        queue.add(f"GrpSubmitJobs of account {account}", accounting.group_submit.get(account, ""), all_, which)
    for name in sorted({qos for place in places.values() for qos in (place.qos, place.partition_qos) if qos}):
        row = accounting.qos.get(name, {})
        which = frozenset(stage for stage, place in places.items() if name in (place.qos, place.partition_qos))
        inside = [job for job in live if name in (job.qos, accounting.partition_qos.get(job.partition))]
        mine = len(_where(inside, user=user))
        queue.add(f"MaxSubmitJobsPerUser of QOS {name}", row.get("MaxSubmitJobsPerUser", ""), mine, which)
        queue.add(f"GrpSubmitJobs of QOS {name}", row.get("GrpSubmitJobs", ""), len(inside), which)
        running.add(f"MaxJobsPerUser of QOS {name}", row.get("MaxJobsPerUser", ""), 0, which)
        for account in sorted({places[stage].account for stage in which}):
            most, used = row.get("MaxSubmitJobsPerAccount", ""), len(_where(inside, account=account))
            both = frozenset(stage for stage in which if places[stage].account == account)
            queue.add(f"MaxSubmitJobsPerAccount of QOS {name} for {account}", most, used, both)
    return list(queue.limits.values()), list(running.limits.values())


@dataclass
class _Found:
    """Limits on the way, by name: one that several groups of stages meet counts the stages of them all."""

    limits: dict[str, Limit] = field(default_factory=dict)

    def add(self, name: str, most: str, used: int, stages: frozenset[str]) -> None:
        """Note a limit if it is set."""
        if most:
            before = self.limits[name].stages if name in self.limits else frozenset()
            self.limits[name] = Limit(name, int(most), used, stages | (before or frozenset()))


def _where(jobs: Sequence[_Job], **which: str) -> list[_Job]:
    return [job for job in jobs if all(getattr(job, name) == value for name, value in which.items())]


def pack_for_queue(cluster: Cluster, stages: Sequence[Stage], *, needed: bool = True) -> int:
    """The shards that an array element of a new run takes: cluster.yaml's number, or more where the queue is small.

    Unless `needed`, a silent Slurm is taken for one without limits (--dry-run works without any).
    """
    try:
        limits = read_limits(cluster, stages)
    except Unanswered:
        if needed:
            raise
        return cluster.shards_per_job
    return shards_per_job(stages, cluster.shards_per_job, limits)


def shards_per_job(stages: Sequence[Stage], minimum: int, limits: Limits) -> int:
    """The fewest shards an array element can take, from `minimum` on, so that all stages fit into the queue at once.

    Where they cannot, because of the stages that have no shards, each stage alone fits, and the rest follows by
    continuation. The number is frozen for the life of a run while the queue comes and goes, so what others have queued
    counts for three quarters of a limit at most.
    """
    sharded = {stage.name: len(stage.tasks) for stage in stages if stage.per_shard}
    if not sharded:
        return minimum
    largest = max(sharded.values())

    def whole(size: int) -> bool:
        return all(
            sum(-(-len(one.tasks) // (size if one.per_shard else 1)) for one in stages if limit.counts(one.name))
            <= _budget(limit)
            for limit in limits.queue
        )

    def each(size: int) -> bool:
        return all(
            -(-count // size) <= max(1, _budget(limit) - 1)
            for limit in limits.queue
            for name, count in sharded.items()
            if limit.counts(name)
        )

    least = max(minimum, -(-largest // limits.array_size))
    return _first(least, max(least, largest), whole if whole(largest) else each)


def _budget(limit: Limit) -> int:
    return max(limit.room, limit.most // 4)


def _first(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The smallest number from `low` to `high` that fits; fitting is monotonous and `high` fits."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def check_indices(stage: str, packs: int, per_shard: bool, limits: Limits) -> None:
    """Raises UserError when a stage has more array elements than there are array indices here."""
    if packs > limits.array_size:
        remedy = (
            "The number of shards an array element takes was fixed at the run's first submission: give another "
            "--run-dir, or remove run.yaml and the run's markers."
            if per_shard
            else "Lower the number of its tasks in the recipe (dedup.ranges, export.iterations)."
        )
        raise UserError(
            f"stage {stage} has {packs} array elements, and this cluster allows indices up to "
            f"{limits.array_size - 1} (MaxArraySize). {remedy}"
        )
