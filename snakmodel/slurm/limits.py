"""Slurm's limits on a user's queued jobs, and how many shards per array element make a whole chain fit into them.

Slurm counts every element of an array as a job. MaxArraySize bounds the array indices, and MaxJobCount bounds all jobs
that the controller remembers. Where accounting enforces limits, the MaxSubmit limits of the association and of the QOS
bound this user's jobs too; they are looked up for the account and the QOS that each stage names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from run_contract.errors import UserError
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster
from snakmodel.slurm.accounting import Accounting, AccountingPlace, slurm_settings
from snakmodel.slurm.ask import ENDED, Unanswered, ask


@dataclass(frozen=True)
class Limit:
    """An upper bound on jobs, and how much of it is taken."""

    name: str
    most: int
    used: int
    stages: frozenset[str] | None = None
    """The stages whose jobs count against this limit; None stands for all stages."""

    @property
    def room(self) -> int:
        """How many more jobs may be queued."""
        return max(0, self.most - self.used)

    def counts(self, stage: str) -> bool:
        """Whether the jobs of a stage count against this limit."""
        return self.stages is None or stage in self.stages

    def __str__(self) -> str:
        return f"{self.name} = {self.most}, {self.used} of it in use"


@dataclass(frozen=True)
class Limits:
    """All limits that apply to this user's submissions at the moment."""

    array_size: int
    """MaxArraySize: every array index has to be smaller than this."""
    array_tasks: int
    """Largest number of elements in one array: max_array_tasks, or MaxArraySize where that is not set."""
    queue: tuple[Limit, ...]
    """Limits on queued jobs; at least one of them counts the jobs of every stage."""
    running: tuple[Limit, ...]
    """Limits on jobs that run at the same time (MaxJobs)."""
    message_timeout: float
    """Seconds after which one of Slurm's commands gives up waiting for the controller."""

    @property
    def tightest(self) -> Limit:
        """The limit on queued jobs that leaves the least room."""
        return min(self.queue, key=lambda limit: limit.room)

    def width(self, stage: str) -> int | None:
        """How many jobs of a stage may run at the same time, or None if that is not limited."""
        return min((limit.most for limit in self.running if limit.counts(stage)), default=None)


def read_limits(cluster: Cluster, stages: Sequence[Stage], patience: float = 0.0) -> Limits:
    """Ask Slurm which limits apply to this user's jobs of these stages.

    Raises Unanswered when the controller is silent for `patience` seconds. When only accounting is silent, a note is
    printed and none of its limits are assumed.
    """
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
class _CountedJob:
    """The properties of a queued job by which a limit may count it."""

    user: str
    account: str
    qos: str
    partition: str
    live: bool


def _queued(patience: float) -> list[_CountedJob]:
    """Every job that the controller remembers, with one entry per array element."""
    text = ask(["squeue", "--noheader", "--array", "--all", "--states=all", "--format=%u|%a|%q|%P|%T"], patience)
    rows = [line.strip().split("|") for line in text.splitlines()]
    return [
        _CountedJob(user, account, qos, partition, state not in ENDED) for user, account, qos, partition, state in rows
    ]


def _accounting_limits(
    accounting: Accounting, places: Mapping[str, AccountingPlace], jobs: Sequence[_CountedJob]
) -> tuple[list[Limit], list[Limit]]:
    """The limits of the associations and the QOS, as far as they are set: on queued jobs, and on running jobs."""
    user, live = accounting.user, [job for job in jobs if job.live]
    queue, running = _Found(), _Found()
    for account, partition in sorted({(place.account, place.partition) for place in places.values()}):
        which = frozenset(name for name, one in places.items() if (one.account, one.partition) == (account, partition))
        for row in accounting.of(account, partition):
            # One association may apply to several partitions; its limit then covers the jobs in all of them together.
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
    """Collects limits by name; a limit that applies to several groups of stages counts the stages of all of them."""

    limits: dict[str, Limit] = field(default_factory=dict)

    def add(self, name: str, most: str, used: int, stages: frozenset[str]) -> None:
        """Add a limit, if it is set."""
        if most:
            before = self.limits[name].stages if name in self.limits else frozenset()
            self.limits[name] = Limit(name, int(most), used, stages | (before or frozenset()))


def _where(jobs: Sequence[_CountedJob], **which: str) -> list[_CountedJob]:
    return [job for job in jobs if all(getattr(job, name) == value for name, value in which.items())]


def pack_for_queue(cluster: Cluster, stages: Sequence[Stage], *, needed: bool = True) -> int:
    """How many shards per array element a new run uses: cluster.yaml's number, or more where the queue is small.

    When Slurm is silent, this raises Unanswered if the answer is `needed`. Otherwise Slurm is assumed to have no
    limits, since --dry-run has to work without Slurm.
    """
    try:
        limits = read_limits(cluster, stages)
    except Unanswered:
        if needed:
            raise
        return cluster.shards_per_job
    return shards_per_job(stages, cluster.shards_per_job, limits)


def shards_per_job(stages: Sequence[Stage], minimum: int, limits: Limits) -> int:
    """The smallest number of shards per array element, from `minimum` on, that fits all stages into the queue at once.

    Where they cannot fit because of the stages that have no shards, the number is chosen so that each stage fits on its
    own, and continuation jobs submit the rest. The number stays fixed for the life of a run, while the queue fills and
    empties. For this reason the jobs that are queued at the moment are assumed to take up at most three quarters of a
    limit.
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
    """The smallest number from `low` to `high` for which `fits` holds; `fits` is monotonous and holds for `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def check_indices(stage: str, packs: int, per_shard: bool, limits: Limits) -> None:
    """Raise UserError when a stage has more array elements than this cluster has array indices."""
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
