"""What accounting allows a user, as sacctmgr reports it: associations, QOS, and the QOS that belong to partitions.

limits.py counts queued jobs against these limits, and admission.py compares time limits with them.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snakmodel.config.cluster import Resources
from snakmodel.slurm.ask import ask

_USER = ["DefaultAccount", "Account", "Partition", "DefaultQOS", "MaxSubmitJobs", "MaxJobs", "GrpSubmitJobs", "MaxWall"]
_QOS = ["Name", "MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs", "MaxJobsPerUser", "MaxWall"]


@dataclass(frozen=True)
class AccountingPlace:
    """Account, QOS and partition by which a stage's jobs are counted."""

    account: str
    qos: str
    partition: str
    """The partition that the stage names (the first, if it names several), or else the default partition."""
    partition_qos: str
    """The partition's own QOS; empty where it has none."""


@dataclass(frozen=True)
class Accounting:
    """What sacctmgr says: the user's associations with the limits that they inherit, every QOS, and the partitions."""

    user: str
    associations: Sequence[Mapping[str, str]]
    qos: Mapping[str, Mapping[str, str]]
    partition_qos: Mapping[str, str]
    default_partition: str
    group_submit: Mapping[str, str]
    """Maps each account that has a GrpSubmitJobs to its value."""

    @classmethod
    def read(cls, settings: Mapping[str, str]) -> Accounting | None:
        """Ask sacctmgr; returns None where Slurm enforces no limits. Raises Unanswered.

        `settings` is what `scontrol show config` lists, as slurm_settings returns it.
        """
        if not re.search(r"limits|safe", settings.get("AccountingStorageEnforce", "")):
            return None
        user, cluster = getpass.getuser(), f"cluster={settings['ClusterName']}"
        own = _table(["user", f"name={user}", "withassoc", cluster], _USER)
        accounts = ",".join(sorted({row["Account"] for row in own}))
        above = _table(["assoc", f"account={accounts}", cluster], ["Account", "User", "GrpSubmitJobs"])
        partitions, default = _partitions()
        return cls(
            user,
            own,
            {row["Name"]: row for row in _table(["qos"], _QOS)},
            partitions,
            default,
            {row["Account"]: row["GrpSubmitJobs"] for row in above if not row["User"] and row["GrpSubmitJobs"]},
        )

    def place(self, resources: Resources) -> AccountingPlace:
        """Account, QOS and partition of a job, whose resources have to be those that Cluster.with_defaults returns."""
        partition = (resources.partition or self.default_partition).split(",")[0]
        account = resources.account or next((row["DefaultAccount"] for row in self.associations), "")
        default = (row["DefaultQOS"] for row in self.of(account, partition) if row["DefaultQOS"])
        qos = resources.qos or next(default, "normal")
        return AccountingPlace(account, qos, partition, self.partition_qos.get(partition, ""))

    def of(self, account: str, partition: str) -> list[Mapping[str, str]]:
        """The user's associations with an account that apply in a partition."""
        rows = [row for row in self.associations if row["Account"] == account]
        return [row for row in rows if row["Partition"] in ("", partition)]

    def max_wall(self, place: AccountingPlace) -> tuple[str, str] | None:
        """The longest time limit that is allowed in a place, in Slurm's spelling, and the name of what sets this limit.

        A limit of the QOS takes precedence over one of the association. The result is None where no limit is set.
        """
        for name in filter(None, (place.partition_qos, place.qos)):
            if wall := self.qos.get(name, {}).get("MaxWall"):
                return wall, f"QOS {name}"
        walls = [row["MaxWall"] for row in self.of(place.account, place.partition) if row["MaxWall"]]
        return (walls[0], f"account {place.account}") if walls else None


def slurm_settings(patience: float = 0.0) -> dict[str, str]:
    """The settings that `scontrol show config` lists. Raises Unanswered after `patience` seconds of silence."""
    lines = ask(["scontrol", "show", "config"], patience).splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    return {name.strip(): value.strip() for name, value in pairs}


def _table(what: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
    lines = ask(["sacctmgr", "--noheader", "--parsable2", "show", *what, f"format={','.join(fields)}"])
    return [dict(zip(fields, line.split("|"), strict=True)) for line in lines.splitlines()]


def _partitions() -> tuple[dict[str, str], str]:
    """The QOS of each partition that has one, by the partition's name, and the name of the default partition."""
    found, default = {}, ""
    for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = values.get("PartitionName", "")
        if values.get("QoS", "N/A") != "N/A":
            found[name] = values["QoS"]
        if values.get("Default") == "YES":
            default = name
    return found, default
