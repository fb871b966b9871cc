"""Checks whether Slurm would run a stage's jobs, and says what to do about a refusal.

`sbatch --test-only` is asked about one array element with the stage's real batch file. Dependencies are left out,
because `--test-only` accepts even a dependency on a job that never existed. It does not look at the time limit of a
partition (unless EnforcePartLimits is set), of a QOS or of an account: Slurm accepts a job beyond it, which then stays
PENDING for ever. So these limits are compared here. How many jobs may be queued is a different question, which
limits.py answers.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Resources
from snakmodel.slurm.accounting import Accounting, slurm_settings
from snakmodel.slurm.ask import Unanswered, run_tool
from snakmodel.slurm.batch_file import make_executor

_NO_ROOM = re.compile(r"MaxSubmit|MaxJobs|temporarily unable to accept", re.IGNORECASE)
"""Words of a refusal that means that nothing is wrong with the job, and there is just no room for it now."""


@dataclass(frozen=True)
class Refusal:
    """Why a stage's jobs could not run, in Slurm's words, and what the user can do about it."""

    words: str
    remedy: str


@dataclass(frozen=True)
class Partition:
    """What sinfo says about a partition."""

    name: str
    default: bool
    minutes: float
    nodes: int
    gres: str


def partitions() -> dict[str, Partition]:
    """Every partition that this user can see. Raises UserError if the controller does not answer."""
    # %P marks the default partition with a star; a partition whose nodes differ has several lines.
    asked = run_tool(["sinfo", "--noheader", "--format=%P|%l|%D|%G"])
    if asked.returncode:
        raise UserError(
            f"Slurm's controller does not answer, so nothing was submitted: {_words(asked)}\n"
            "Wait for it, or ask the administrators."
        )
    found: dict[str, Partition] = {}
    for line in asked.stdout.splitlines():
        name, limit, nodes, gres = line.split("|")
        before = found.get(name.rstrip("*"))
        count, resources = int(nodes), gres.replace("(null)", "")
        if before:
            count, resources = count + before.nodes, ",".join(filter(None, [before.gres, resources]))
        found[name.rstrip("*")] = Partition(name.rstrip("*"), name.endswith("*"), minutes(limit), count, resources)
    return found


def partition_of(resources: Resources, known: dict[str, Partition]) -> Partition | None:
    """The partition that a job would run in: the one it names (the first, if it names several), else the default."""
    if resources.partition:
        return known.get(resources.partition.split(",")[0])
    return next((one for one in known.values() if one.default), None)


def minutes(text: str) -> float:
    """The minutes of a time limit in Slurm's spelling, [D-]H:M:S or M:S; any other text counts as no limit."""
    if not re.fullmatch(r"[\d:-]+", text):
        return float("inf")
    days, _, clock = text.rpartition("-")
    hours, minute, second = ([0, 0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minute + second / 60


def read_accounting() -> Accounting | None:
    """What accounting allows this user; None where Slurm enforces no limits, or where accounting does not answer."""
    try:
        return Accounting.read(slurm_settings())
    except Unanswered:
        return None


def refusal(
    plan: RunPlan, stage: Stage, known: dict[str, Partition], accounting: Accounting | None = None
) -> Refusal | None:
    """Why Slurm would not run an array element of this stage, or None if it would."""
    resources = plan.config.cluster.with_defaults(stage.resources)
    with tempfile.TemporaryDirectory(prefix="snakmodel-") as folder:
        executor = make_executor(plan, stage, Path(folder), [0], "", "test-only")
        file = Path(folder) / "test-only.sh"
        file.write_bytes(os.fsencode(executor._make_submission_file_text("true", "test-only")))
        asked = run_tool(["sbatch", "--test-only", str(file)])
    words = _words(asked)
    partition = partition_of(resources, known)
    if asked.returncode and not _NO_ROOM.search(words) and not _waits_for_nodes(words, partition):
        return Refusal(words, _remedy(words, resources, known))
    if partition and resources.minutes > partition.minutes:
        return Refusal(
            f"{resources.minutes} minutes are over the limit of partition {partition.name}, "
            f"{partition.minutes:g} minutes: the job would stay PENDING (PartitionTimeLimit)",
            f"Set minutes to {partition.minutes:g} or less (training continues where it was), or another partition.",
        )
    wall = accounting.max_wall(accounting.place(resources)) if accounting else None
    if wall and resources.minutes > (most := minutes(wall[0])):
        return Refusal(
            f"{resources.minutes} minutes are over MaxWall of {wall[1]}, {most:g} minutes: the job would stay PENDING",
            f"Set minutes to {most:g} or less (training continues where it was), or another qos or account.",
        )
    return None


def _waits_for_nodes(words: str, partition: Partition | None) -> bool:
    """Whether only nodes that are down or drained at the moment keep a job from running.

    Slurm's words for that are the same as for a job that can never run. A job that even the whole partition could not
    run is still refused by sbatch itself.
    """
    if partition is None or "node configuration" not in words.lower():
        return False
    away = ["--states=down,drain,drained,draining,fail,maint,no_respond", "--format=%n"]
    return bool(run_tool(["sinfo", "--noheader", f"--partition={partition.name}", *away]).stdout.strip())


def _words(asked: subprocess.CompletedProcess[str]) -> str:
    return "; ".join((asked.stderr + asked.stdout).strip().splitlines()) or f"exit code {asked.returncode}"


def _remedy(words: str, resources: Resources, known: dict[str, Partition]) -> str:
    """What to change in cluster.yaml, together with what this cluster has to offer."""
    said = words.lower()
    if "partition" in said and "account" not in said:
        return f"partition is {resources.partition!r}; this cluster has: {', '.join(known)}."
    if "account" in said:
        return f"account is {resources.account!r}; {_associations('account')}"
    if "qos" in said:
        return f"qos is {resources.qos!r}; {_associations('qos')}"
    if "gres" in said or (resources.has_gpus and "node configuration" in said):
        there = "; ".join(f"{one.name}: {one.gres or 'none'}" for one in known.values())
        asked = resources.gres or f"gpus_per_node {resources.gpus_per_node}"
        return f"{asked} on {resources.nodes} node(s) is asked for; generic resources by partition: {there}."
    if "feature" in said:
        return f"constraint is {resources.constraint!r}; `sinfo -o '%P %f'` lists what nodes offer."
    if "node name" in said:
        return f"exclude is {resources.exclude!r}; `sinfo -N` lists the nodes."
    if "node configuration" in said:
        cpus = resources.ranks_per_node * resources.cpus
        wanted = f"{resources.nodes} node(s) with {cpus} cores and {resources.mem_gb or 'default'} GB each"
        return f"{wanted} are asked for; `sinfo -o '%P %D %c %m'` lists nodes, cores and MB of each partition."
    if "time limit" in said:
        return f"minutes is {resources.minutes}; `sinfo -o '%P %l'` lists the partitions' limits."
    if "contact" in said or "no answer" in said or "connect" in said:
        return "Slurm's controller does not answer: wait for it, or ask the administrators."
    return "Correct cluster.yaml, or ask the administrators what this means."


def _associations(column: str) -> str:
    """The accounts or the QOS that sacctmgr allows this user, as a sentence."""
    asked = run_tool(
        ["sacctmgr", "-nP", "show", "assoc", f"user={pwd.getpwuid(os.getuid()).pw_name}", f"format={column}"]
    )
    names = sorted({name for line in asked.stdout.split() for name in line.split(",")})
    if asked.returncode or not names:
        return "`sacctmgr show assoc user=$USER` lists what you may use."
    return f"you may use: {', '.join(names)}."


def check_resources(plan: RunPlan) -> None:
    """Raise UserError before anything is submitted, if Slurm could not run some stage of a plan or one that follows.

    Slurm is asked once per set of resources. The error speaks of all refused stages at once, with Slurm's words and a
    remedy.
    """
    known, accounting = partitions(), read_accounting()
    stages = [*(plan.chain[name] for name, packs in plan.missing.items() if packs), *plan.later]
    problems = []
    for same in alike(plan, stages):
        found = refusal(plan, same[0], known, accounting)
        if found:
            names = ", ".join(stage.name for stage in same)
            problems.append(f"stage {names}: Slurm says: {found.words}\n  {found.remedy}")
    if problems:
        text = "\n".join(problems)
        raise UserError(
            f"Slurm would not run this; nothing was submitted.\n{text}\nCorrect cluster.yaml and try again."
        )


def alike(plan: RunPlan, stages: Sequence[Stage]) -> list[list[Stage]]:
    """Group the stages that ask Slurm for the same resources."""
    groups: dict[str, list[Stage]] = {}
    for stage in stages:
        asked = plan.config.cluster.with_defaults(stage.resources)
        key = asked.model_dump_json(exclude={"setup", "srun_args", "container"}) + str(stage.resumable)
        groups.setdefault(key, []).append(stage)
    return list(groups.values())
