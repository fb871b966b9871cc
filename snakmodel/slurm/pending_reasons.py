"""Why a job waits in Slurm's queue, in plain words, and what a user must type where waiting alone will not help.

The words of `squeue --format=%r` come from job_state_reason_string in Slurm's sources (22.05 to 25.05) and, in lower
case, from the texts that slurmctld writes itself, such as `launch failed requeued held`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NEVER = "DependencyNeverSatisfied"
"""The reason of a job that waits for one which failed or was cancelled."""


@dataclass(frozen=True)
class Reason:
    """Why a job waits, and what a user can do about it."""

    words: str
    """The explanation that the table shows."""
    remedy: str = ""
    """What the user has to do; empty where waiting is enough. JOB stands for the job's id."""


_RELEASE = "scontrol release JOB"
_ADMINISTRATORS = "ask your administrators"
_LIMITS = "sacctmgr show assoc user=$USER shows the limits of your account"
_QOS = "sacctmgr show qos shows the limits of the QOS"
_LOWER = "lower what the stage asks for in cluster.yaml, cancel the job (jobs/cancel.py) and run the launcher again"
_CHANGE = "correct it in cluster.yaml, cancel the job (jobs/cancel.py) and run the launcher again"

_REASONS = {
    "None": Reason("just submitted, or about to start"),
    "Priority": Reason("other jobs come first"),
    "Resources": Reason("waits for free nodes"),
    "Dependency": Reason("waits for other jobs"),
    "BeginTime": Reason("was requeued and may start again shortly"),
    "JobArrayTaskLimit": Reason("as many of its array run as array_parallelism allows"),
    "Licenses": Reason("waits for a licence"),
    "Cleaning": Reason("its earlier start is being cleaned up"),
    "Prolog": Reason("its node is being prepared"),
    "Reservation": Reason("waits for its reservation to begin"),
    "FedJobLock": Reason("the clusters of the federation are agreeing on who starts it"),
    "SchedDefer": Reason("the scheduler puts off starting jobs at the moment"),
    "BurstBufferResources": Reason("waits for room in the burst buffer"),
    "BurstBufferStageIn": Reason("its burst buffer is being filled"),
    "QOSUsageThreshold": Reason("your recent use is over the threshold of the QOS"),
    "NodeDown": Reason("a node that it needs is down"),
    "FrontEndDown": Reason("the cluster's front end is down", _ADMINISTRATORS),
    "ReqNodeNotAvail": Reason(
        "nodes that it may use are down, drained or reserved",
        "it may start when they are back (sinfo -R); else name other nodes or another partition in cluster.yaml",
    ),
    "JobHeldUser": Reason("held by you", _RELEASE),
    "JobHeldAdmin": Reason("held by the administrators", _ADMINISTRATORS),
    "JobHoldMaxRequeue": Reason(
        "held, as it was requeued more often than the cluster allows", f"look into its log, then {_RELEASE}"
    ),
    "PartitionDown": Reason("its partition is down", f"{_ADMINISTRATORS}, or choose another partition"),
    "PartitionInactive": Reason("its partition starts no jobs", f"{_ADMINISTRATORS}, or choose another partition"),
    "PartitionTimeLimit": Reason("its time limit is over the partition's", f"minutes is too high: {_LOWER}"),
    "PartitionNodeLimit": Reason("it asks for more nodes than the partition allows", f"nodes is too high: {_LOWER}"),
    "PartitionConfig": Reason("the partition does not allow what it asks for", _CHANGE),
    "AccountNotAllowed": Reason("its account may not use the partition", f"account is not allowed: {_CHANGE}"),
    "QOSNotAllowed": Reason("its QOS may not be used there", f"qos is not allowed: {_CHANGE}"),
    "InvalidAccount": Reason("its account does not exist", f"account is wrong: {_CHANGE}"),
    "InvalidQOS": Reason("its QOS does not exist", f"qos is wrong: {_CHANGE}"),
    "BadConstraints": Reason("no node has what it asks for", f"constraint is wrong: {_CHANGE}"),
    "Constraints": Reason("no free node has the features that it asks for"),
    "MaxMemPerLimit": Reason("it asks for more memory than is allowed", f"mem_gb is too high: {_LOWER}"),
    "DeadLine": Reason("its deadline cannot be met", _CHANGE),
    "ReservationDeleted": Reason("its reservation is gone", f"reservation is wrong: {_CHANGE}"),
    "BurstBufferOperation": Reason("an operation of its burst buffer failed", _ADMINISTRATORS),
    "SystemFailure": Reason("Slurm itself failed", _ADMINISTRATORS),
    "JobLaunchFailure": Reason("its launch failed", f"look at its node and its log, then {_RELEASE}"),
    "AssociationJobLimit": Reason("your account runs as many jobs as it may"),
    "AssociationResourceLimit": Reason("your account uses as much as it may"),
    "AssociationTimeLimit": Reason("your account has used its time", f"{_LIMITS}; {_ADMINISTRATORS} for more"),
    "QOSJobLimit": Reason("the QOS runs as many jobs as it may"),
    "QOSResourceLimit": Reason("the QOS uses as much as it may"),
    "QOSTimeLimit": Reason("its time limit is over that of the QOS", f"minutes is too high: {_LOWER}"),
}
_FAMILIES = (
    (r"(launch failed|env retrieval failed|job).*requeued.*held", Reason(
        "held, as Slurm could not start it", f"look at its node (sinfo -R) and its log, then {_RELEASE}")),
    (r"held", Reason("held", _RELEASE)),
    (r"nodes required for job are down", Reason(
        "nodes that it needs are down, drained or reserved", "it may start when they are back (sinfo -R)")),
    (r"^Assoc\w*Minutes", Reason("your account has used its time", f"{_LIMITS}; {_ADMINISTRATORS} for more")),
    (r"^AssocMax\w*(PerJob|PerNode)|^AssocMaxWall", Reason(
        "one such job is more than your account allows", f"{_LIMITS}; {_LOWER}")),
    (r"^Assoc(Grp|Max)", Reason("your account uses as much as it may at once", "")),
    (r"^QOSMin", Reason("it asks for less than the QOS demands", f"{_QOS}; {_CHANGE}")),
    (r"^QOS\w*Minutes", Reason("the QOS has used its time", f"{_QOS}; {_ADMINISTRATORS} for more")),
    (r"^QOSMax\w*(PerJob|PerNode)|^QOSMaxWall", Reason(
        "one such job is more than the QOS allows", f"{_QOS}; {_LOWER}")),
    (r"^Max\w*PerAccount", Reason(
        "the jobs of your account use as much together as the QOS allows", "")),
    (r"^(QOS(Grp|Max)|MaxJobs|MaxSubmit)", Reason("the QOS uses as much as it may at once", "")),
)  # fmt: skip
"""Patterns for reasons that come in many variants, whether in upper or lower case; the first that matches counts."""


def explain(found: str, job: str) -> Reason:
    """What Slurm's reason for the waiting of `job` means. A reason that is not known here is shown as it is."""
    text = found.strip().strip("()")
    word = text.partition(",")[0].strip() or "None"
    known = _REASONS.get(word) or next(
        (reason for pattern, reason in _FAMILIES if re.search(pattern, text, re.IGNORECASE)), None
    )
    if known is None:
        return Reason(f"Slurm says {text}", f"{_ADMINISTRATORS} what `{text}` means here")
    return Reason(f"{known.words} ({text or word})", known.remedy.replace("JOB", job))
