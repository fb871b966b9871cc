"""What Slurm lets one person queue, and how many shards an array element takes so that the whole chain fits into it.

Every element of an array counts as a job. MaxArraySize bounds the indices, MaxJobCount all jobs that the controller
remembers, and where accounting enforces limits the association's and the QOS's MaxSubmit bound this user's.
"""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snakmodel.config import Cluster
from snakmodel.publish import UserError
from snakmodel.squeue import ENDED, Unanswered, ask
from snakmodel.stage import Stage


@dataclass(frozen=True)
class Limit:
    """An upper bound on queued jobs, and how much of it is taken."""

    name: str
    most: int
    used: int

    @property
    def room(self) -> int:
        """Jobs that may be queued besides those that are."""
        return max(0, self.most - self.used)

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
    running: int | None
    """Jobs that may run at once (MaxJobs), or None."""
    message_timeout: float
    """Seconds after which a command gives up on the controller."""

    @property
    def tightest(self) -> Limit:
        """The bound that leaves the least room."""
        return min(self.queue, key=lambda limit: limit.room)

    @property
    def smallest(self) -> int:
        """Jobs that could be queued if nothing was."""
        return min(limit.most for limit in self.queue)


def read_limits(cluster: Cluster, partitions: Sequence[str], patience: float = 0.0) -> Limits:
    """Ask Slurm what holds for this user. Raises Unanswered when the controller is silent.

    `partitions`: as from `partitions_of`.
    """
    settings = _settings(ask(["scontrol", "show", "config"], patience))
    size = int(settings.get("MaxArraySize", "1001"))
    tasks = re.search(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", ""))
    jobs = _queued(patience)
    queue = [Limit("MaxJobCount", int(settings.get("MaxJobCount", "10000")), len(jobs))]
    running: list[int] = []
    if re.search(r"limits|safe", settings.get("AccountingStorageEnforce", "")):
        try:
            more, running = _accounting_limits(settings["ClusterName"], cluster, partitions, jobs)
            queue += more
        except Unanswered as error:
            print(f"note: submit limits are unknown, so none is assumed: {error}", file=sys.stderr)
    timeout = re.match(r"\d+", settings.get("MessageTimeout", "10"))
    seconds = float(timeout[0]) if timeout else 10.0
    array_tasks = min(size, int(tasks[1])) if tasks else size
    return Limits(size, array_tasks, tuple(queue), min(running, default=None), seconds)


def partitions_of(cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    """The partitions that stages name; empty stands for the cluster's default."""
    return sorted({stage.resources.partition or cluster.slurm.partition or "" for stage in stages})


def _settings(text: str) -> dict[str, str]:
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line]
    return {name.strip(): value.strip() for name, value in pairs}


@dataclass(frozen=True)
class _Job:
    """What a limit may count a queued job by."""

    user: str
    account: str
    qos: str
    live: bool


def _queued(patience: float) -> list[_Job]:
    """Every job that the controller remembers, one an array element."""
    text = ask(["squeue", "--noheader", "--array", "--all", "--states=all", "--format=%u|%a|%q|%T"], patience)
    rows = [line.strip().split("|") for line in text.splitlines()]
    return [_Job(user, account, qos, state not in ENDED) for user, account, qos, state in rows]


def _accounting_limits(
    name: str, cluster: Cluster, partitions: Sequence[str], jobs: Sequence[_Job]
) -> tuple[list[Limit], list[int]]:
    """The association's and the QOS's limits that are set, and the MaxJobs among them."""
    user, live = getpass.getuser(), [job for job in jobs if job.live]
    fields = ["DefaultAccount", "Account", "MaxSubmitJobs", "MaxJobs", "GrpSubmitJobs", "DefaultQOS"]
    own = _table(["user", f"name={user}", "withassoc", f"cluster={name}"], fields)
    account = cluster.slurm.account or next((row["DefaultAccount"] for row in own), "")
    mine = [row for row in own if row["Account"] == account]
    above = _table(["assoc", f"account={account}", f"cluster={name}"], ["User", "GrpSubmitJobs"])
    found = _Found([], [])
    for row in mine:
        found.add(f"MaxSubmitJobs of account {account}", row["MaxSubmitJobs"], _count(live, user=user, account=account))
        found.add(f"GrpSubmitJobs of {user}", row["GrpSubmitJobs"], _count(live, user=user, account=account))
        found.running += [int(row["MaxJobs"])] if row["MaxJobs"] else []
    for row in above:
        if not row["User"]:
            found.add(f"GrpSubmitJobs of account {account}", row["GrpSubmitJobs"], _count(live, account=account))
    default = next((row["DefaultQOS"] for row in mine if row["DefaultQOS"]), "normal")
    wanted = {cluster.slurm.qos or default, *_partition_qos(partitions)}
    fields = ["Name", "MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs", "MaxJobsPerUser"]
    for row in _table(["qos"], fields):
        qos = row["Name"]
        if qos not in wanted:
            continue
        found.add(f"MaxSubmitJobsPerUser of QOS {qos}", row["MaxSubmitJobsPerUser"], _count(live, user=user))
        per_account = row["MaxSubmitJobsPerAccount"]
        found.add(f"MaxSubmitJobsPerAccount of QOS {qos}", per_account, _count(live, account=account))
        found.add(f"GrpSubmitJobs of QOS {qos}", row["GrpSubmitJobs"], _count(live, qos=qos))
        found.running += [int(row["MaxJobsPerUser"])] if row["MaxJobsPerUser"] else []
    return found.limits, found.running


@dataclass
class _Found:
    """Limits on the way."""

    limits: list[Limit]
    running: list[int]

    def add(self, name: str, most: str, used: int) -> None:
        """Note a limit if it is set."""
        if most:
            self.limits.append(Limit(name, int(most), used))


def _count(jobs: Sequence[_Job], **which: str) -> int:
    return sum(all(getattr(job, name) == value for name, value in which.items()) for job in jobs)


def _table(what: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
    lines = ask(["sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={','.join(fields)}"])
    return [dict(zip(fields, line.split("|"), strict=True)) for line in lines.splitlines()]


def _partition_qos(partitions: Sequence[str]) -> set[str]:
    """The QOS that partitions in use bring along."""
    found = set()
    for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        named = values.get("PartitionName") in partitions
        if (named or (not all(partitions) and values.get("Default") == "YES")) and values.get("QoS") != "N/A":
            found.add(values["QoS"])
    return found


def pack_for_queue(cluster: Cluster, stages: Sequence[Stage], *, needed: bool = True) -> int:
    """The shards that an array element of a new run takes: cluster.yaml's number, or more where the queue is small.

    Unless `needed`, a silent Slurm is taken for one without limits (--dry-run works without any).
    """
    try:
        limits = read_limits(cluster, partitions_of(cluster, stages))
    except Unanswered:
        if needed:
            raise
        return cluster.shards_per_job
    return shards_per_job(stages, cluster.shards_per_job, limits)


def shards_per_job(stages: Sequence[Stage], minimum: int, limits: Limits) -> int:
    """The fewest shards an array element can take, from `minimum` on, so that all stages fit into the queue at once.

    Where they cannot, because of the stages that have no shards, the largest stage alone fits, and the rest follows by
    continuation. The number is frozen for the life of a run while the queue comes and goes, so what others have queued
    counts for three quarters of a limit at most.
    """
    sharded = [len(stage.tasks) for stage in stages if stage.per_shard]
    if not sharded:
        return minimum
    budget = min(max(limit.room, limit.most // 4) for limit in limits.queue)
    others = sum(len(stage.tasks) for stage in stages if not stage.per_shard)

    def whole(size: int) -> bool:
        return sum(-(-count // size) for count in sharded) + others <= budget

    def largest(size: int) -> bool:
        return -(-max(sharded) // size) <= max(1, budget - 1)

    fits = whole if whole(max(sharded)) else largest
    least = max(minimum, -(-max(sharded) // limits.array_size))
    return _first(least, max(least, *sharded), fits)


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
