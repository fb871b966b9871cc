"""python jobs/preflight.py [--recipe R] [--cluster C] [--run-dir D] [--scheduler S] [--no-drill]

Checks everything that can be known before a run is submitted, in the order in which a run would meet it: configuration,
folders, plan, disk space, whether Slurm would run each stage, array sizes, preemption, and a drill on each partition.
Prints a table and the remedies, and exits with 1 if anything failed. Nothing of the run itself is submitted or changed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from run_contract.errors import UserError
from snakmodel.chain.build import STAGES, stages_of
from snakmodel.chain.containers import check_local
from snakmodel.chain.disk_forecast import forecast_plan, free, used
from snakmodel.chain.plan import RunPlan, make_plan
from snakmodel.config import load as configuration
from snakmodel.config.cluster import Resources
from snakmodel.config.load import Config
from snakmodel.config.sections import PROJECT
from snakmodel.launch.launcher import make_writable
from snakmodel.preflight import drill
from snakmodel.preflight.drill import Finding
from snakmodel.slurm.admission import Partition, alike, partition_of, partitions, read_accounting, refusal
from snakmodel.slurm.ask import run_tool, use_cluster
from snakmodel.slurm.batch_file import choose
from snakmodel.slurm.limits import check_indices, pack_for_queue, read_limits

_COLOURS = {"pass": "green", "note": "cyan", "warn": "yellow", "fail": "red"}


class Preflight:
    """Runs the checks and collects their findings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.findings: list[Finding] = []

    def run(self) -> int:
        """Check everything, print the table, and return the exit code."""
        try:
            self._check()
        except UserError as error:
            first, _, rest = str(error).partition("\n")
            self.add("stopped", "fail", first, rest or "Correct this first; the rest was not checked.")
        show(self.findings)
        return int(any(one.result == "fail" for one in self.findings))

    def add(self, name: str, result: str, found: str, remedy: str = "") -> None:
        """Add one finding."""
        self.findings.append(Finding(name, result, found, remedy))

    def _check(self) -> None:
        config = configuration.load(self.args.recipe, self.args.cluster, STAGES)
        self.add("configuration", "pass", f"{self.args.recipe} and {self.args.cluster} are valid")
        root = (self.args.run_dir or config.cluster.runs / config.recipe.name).absolute()
        self._folders(config, root)
        wanted = self.args.scheduler or config.cluster.scheduler
        use_cluster(config.cluster.slurm.clusters)
        fit = None if wanted == "local" else partial(pack_for_queue, config.cluster, needed=False)
        plan = make_plan(config, root, stages_of(config.recipe), [], dry=True, fit=fit)
        waiting = sum(len(packs) for packs in plan.missing.values())
        self.add("plan", "pass", f"{len(plan.chain.stages)} stages, {waiting} tasks to do")
        if plan.unfinished:
            found = "the text is not collected yet, so neither its stages' tasks nor the disk could be checked"
            self.add("text", "note", found, "Run this again when it is there.")
        else:
            self._disk(plan)
        if choose(wanted) == "local":
            check_local(config.cluster)
            self.add("Slurm", "note", "not asked: the run would be on this machine")
            return
        known = partitions()
        self.add("Slurm", "pass", f"the controller answers; partitions: {', '.join(known)}")
        usable = self._stages(plan, known)
        self._sizes(plan)
        for name in usable:
            self.findings.append(preemption(name))
        if usable and not self.args.no_drill:
            for one in drill.run(config, root, usable, Console(stderr=True, markup=False, emoji=False).print):
                self.findings += drill.findings(one)

    def _folders(self, config: Config, root: Path) -> None:
        make_writable(root, "the run's folder", "another --run-dir")
        make_writable(config.cluster.logs / root.name, "the folder for logs", "another `logs` in cluster.yaml")
        self.add("folders", "pass", f"{root} and {config.cluster.logs / root.name} can be written")

    def _disk(self, plan: RunPlan) -> None:
        if plan.unfinished:
            self.add("disk space", "note", "not known before the text is collected: type this command again then")
            return
        needs, there = forecast_plan(plan), free(plan.paths.root)
        more = max(0, needs.total - used(plan.paths.root))
        found = f"{decimal(more)} more needed at most, {decimal(there)} free (a quota does not show): {needs}"
        if more > there:
            remedy = "Free space, give another --run-dir, or save checkpoints more rarely (training.save_interval)."
            self.add("disk space", "fail", found, remedy)
        else:
            self.add("disk space", "pass", found)

    def _stages(self, plan: RunPlan, known: dict[str, Partition]) -> dict[str, tuple[Partition, Resources]]:
        """Ask Slurm about every stage; return the partitions of those that it would run, each with its largest job."""
        usable: dict[str, tuple[Partition, Resources]] = {}
        accounting = read_accounting()
        for same in alike(plan, [*plan.chain.stages, *plan.later]):
            name = ", ".join(stage.name for stage in same)
            problem = refusal(plan, same[0], known, accounting)
            if problem:
                self.add(f"sbatch: {name}", "fail", problem.words, problem.remedy)
                continue
            asked = plan.config.cluster.with_defaults(same[0].resources)
            partition = partition_of(asked, known)
            self.add(f"sbatch: {name}", "pass", f"accepted in partition {partition.name if partition else '?'}")
            if partition and (partition.name not in usable or _larger(asked, usable[partition.name][1])):
                usable[partition.name] = (partition, asked)
        return usable

    def _sizes(self, plan: RunPlan) -> None:
        """Check the array elements as they would be submitted: with as many shards as needed, or as run.yaml says."""
        limits = read_limits(plan.config.cluster, plan.chain.stages)
        problems = False
        for name, packs in plan.packs.items():
            try:
                check_indices(name, len(packs), plan.chain[name].per_shard, limits)
            except UserError as error:
                problems = True
                self.add(f"array: {name}", "fail", *str(error).split(". ", 1))
        packed = max((len(pack) for packs in plan.packs.values() for pack in packs), default=1)
        largest = max(len(packs) for packs in plan.packs.values())
        if not problems:
            found = f"{largest} elements at most, of up to {packed} shard(s); MaxArraySize is {limits.array_size}"
            self.add("array sizes", "pass", f"{found}; {limits.tightest}")


def _larger(one: Resources, other: Resources) -> bool:
    return (one.has_gpus, one.ranks, one.cpus) > (other.has_gpus, other.ranks, other.cpus)


def preemption(partition: str) -> Finding:
    """What happens to a job in a partition when a more important job preempts it."""
    name, general = f"{partition}: preemption", _slurm_config()
    everything = run_tool(["scontrol", "--oneliner", "show", "partition"]).stdout.splitlines()
    rows = {row["PartitionName"]: row for row in (dict(re.findall(r"(\w+)=(\S+)", line)) for line in everything)}
    mine = rows.get(partition, {})
    kind, mode = general.get("PreemptType", "preempt/none"), mine.get("PreemptMode", general.get("PreemptMode", "OFF"))
    tier = int(mine.get("PriorityTier", "1"))
    above = [other for other, row in rows.items() if int(row.get("PriorityTier", "1")) > tier]
    if kind == "preempt/none" or mode.startswith("OFF"):
        return Finding(name, "pass", "jobs there are not preempted")
    if kind == "preempt/partition_prio" and not above:
        return Finding(name, "pass", "no partition has a higher priority")
    by = f"by {', '.join(above)}" if kind == "preempt/partition_prio" else "by other QOS"
    grace = mine.get("GraceTime", "0")
    if not mode.startswith("CANCEL"):
        return Finding(name, "pass", f"{by}, with PreemptMode={mode}, GraceTime={grace}: the job comes back by itself")
    if grace != "0":
        return Finding(name, "pass", f"{by}, with PreemptMode=CANCEL after {grace} s, in which the job requeues itself")
    remedy = (
        "Run the same command again to continue after a preemption. "
        "Use another partition, or ask the administrators for PreemptMode=REQUEUE or a GraceTime."
    )
    return Finding(
        name, "warn", f"{by}, with PreemptMode=CANCEL and no GraceTime: the job does not come back by itself", remedy
    )


def _slurm_config() -> dict[str, str]:
    """The settings that `scontrol show config` lists; empty if the controller does not answer."""
    asked = run_tool(["scontrol", "show", "config"])
    pairs = (line.partition("=") for line in asked.stdout.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def show(findings: Sequence[Finding]) -> None:
    """Print the table, and below it the remedy for each finding that has one, on unfolded lines that can be copied."""
    console = Console(markup=False, emoji=False)  # names of files are printed as they are
    table = Table(title="Preflight", title_justify="left")
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for one in findings:
        table.add_row(Text(one.result, _COLOURS[one.result]), one.name, one.found)
    console.print(table)
    for one in findings:
        if one.remedy:
            console.print(f"{one.result}: {one.name}: {one.found}\n  -> {one.remedy}", soft_wrap=True)
    failed = sum(one.result == "fail" for one in findings)
    console.print(f"{failed} of {len(findings)} checks failed." if failed else "Nothing failed.")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=PROJECT / "recipes" / "demo.yaml", help="what would be done")
    parser.add_argument("--cluster", type=Path, default=PROJECT / "cluster.yaml", help="where it would be done")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/<recipe name>)")
    parser.add_argument("--scheduler", choices=["auto", "local", "slurm"], help="default: what cluster.yaml says")
    parser.add_argument("--no-drill", action="store_true", help="submit no test jobs")
    return Preflight(parser.parse_args(argv)).run()
