"""The drill on each partition in use: one small real job that tries out what a week of training relies on.

The job goes through the same batch file, driver, srun, container and requeue as every other job; its ranks run
drill_rank.py. It has a time limit of two minutes, and runs on two nodes where the partition has them. `run` submits all
drills at once, waits for at most five minutes and returns what was seen; `findings` judges it.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from run_contract.publish import write_text
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Chain, Stage, Task
from snakmodel.config.cluster import Resources
from snakmodel.config.load import Config
from snakmodel.preflight.drill_rank import HELLO, REPORT, Note
from snakmodel.run.attempts import Attempt
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.admission import Partition
from snakmodel.slurm.ask import run_tool
from snakmodel.slurm.submitter import SlurmScheduler

DRILL_SECONDS = 300
_MINUTES = 2
_NOTICE_SECONDS = 30
_WAITING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "SIGNALING")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: the check's name, the result, and what to do if it is not good."""

    name: str
    result: str
    """One of pass, note, warn and fail."""
    found: str
    remedy: str = ""


@dataclass
class Drill:
    """The drill on one partition, and what was seen of it."""

    partition: str
    asked: Resources
    folder: Path
    hello: str
    log: Path
    job: str = ""
    submitted: float = 0.0
    limit: float | None = None
    """When the time limit of the first attempt is reached, in seconds since 1970."""
    state: str = ""
    notes: list[Note] = field(default_factory=list)

    def attempt(self, restart: int) -> list[Note]:
        """The notes that the ranks of the first (0), second (1), … attempt wrote."""
        name = Attempt(f"{self.job}_0", restart).name
        return [note for note in self.notes if note.attempt == name]

    @property
    def ended(self) -> bool:
        """Whether the job has ended for good."""
        return not self.state.startswith(_WAITING)

    def look(self) -> None:
        """Ask Slurm for the job's state, and read the notes that the ranks wrote."""
        asked = run_tool(["squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T %r|%e"])
        if asked.returncode == 0:
            self.state, _, end = asked.stdout.strip().partition("|")
            if self.limit is None and self.state.startswith("RUNNING") and end[:1].isdigit():
                self.limit = datetime.fromisoformat(end.split("\n")[0]).timestamp()
        self.notes = []
        for path in sorted(self.folder.glob("*.rank-*.json")):
            try:
                self.notes.append(Note(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue  # the file system shows a file before its content; the next look finds it


def run(
    config: Config, root: Path, wanted: Mapping[str, tuple[Partition, Resources]], say: Callable[[str], None]
) -> list[Drill]:
    """Submit a drill for each partition, and wait for all. Leaves nothing behind unless a drill did not succeed."""
    name = f"{root.name}-preflight-{uuid.uuid4().hex[:6]}"
    home = root / "preflight" / name
    plan, drills = _plan(config, home, wanted)
    for drill in drills:
        drill.folder.mkdir(parents=True)
        write_text(drill.folder / HELLO, drill.hello)
    try:
        for one in SlurmScheduler(plan).run().submitted:
            drill = next(drill for drill in drills if f"drill-{drill.partition}" == one.stage)
            drill.job, drill.submitted, drill.state = one.job, time.time(), "PENDING"
        say(f"drill on {', '.join(wanted)}: up to {DRILL_SECONDS // 60} minutes; logs in {plan.logs('<drill>').parent}")
        end = time.monotonic() + DRILL_SECONDS
        while not all(drill.ended for drill in drills) and time.monotonic() < end:
            time.sleep(1)
            for drill in drills:
                drill.look()
    finally:
        left = [drill.job for drill in drills if drill.job and not (drill.folder / REPORT).exists()]
        if left:
            run_tool(["scancel", *left])
    if not left:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(plan.logs("x").parent, ignore_errors=True)
        if not any(home.parent.iterdir()):
            home.parent.rmdir()
    return drills


def _plan(config: Config, home: Path, wanted: Mapping[str, tuple[Partition, Resources]]) -> tuple[RunPlan, list[Drill]]:
    """The plan of the drills: a chain with one task per partition, in a folder of its own."""
    slurm = config.cluster.slurm.model_copy(update={"signal_seconds": _NOTICE_SECONDS})
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"slurm": slurm})})
    paths = RunPaths(home)
    stages, drills = [], []
    for name, (partition, resources) in wanted.items():
        asked = small(resources, partition)
        argv = ("python", "-m", "snakmodel.preflight.drill_rank", str(home / name))
        stage = Stage(
            f"drill-{name}",
            (Task(argv, (f"{name}/{REPORT}",)),),
            asked,
            resumable=True,
            progress=f"{name}/progress",
            environment={"OMP_NUM_THREADS": "1"},
        )
        stages.append(stage)
        log = config.cluster.logs / paths.name / stage.name / "00000.out"
        drills.append(Drill(name, asked, home / name, uuid.uuid4().hex, log))
    every: dict[str, Any] = {stage.name: [[0]] for stage in stages}
    missing = {stage.name: [0] for stage in stages}
    return RunPlan(config, paths, Chain.of(home, stages), every, missing, None, []), drills


def small(resources: Resources, partition: Partition) -> Resources:
    """What a drill asks for instead of a stage: one rank on up to two nodes, the stage's cores, and its kind of GPU."""
    return resources.model_copy(
        update={
            "partition": partition.name,
            "nodes": min(2, partition.nodes),
            "ranks_per_node": 1,
            "mem_gb": min(resources.mem_gb, 8.0) if resources.mem_gb else None,
            "gpus_per_node": min(1, resources.gpus_per_node),
            "minutes": _MINUTES,
        }
    )


def findings(drill: Drill) -> list[Finding]:
    """The findings that follow from what was seen of a drill."""
    first = drill.attempt(0)
    if len(first) < drill.asked.ranks:
        return [_not_started(drill, len(first))]
    nodes = ", ".join(note.node for note in first)
    waited = min(note.started for note in first) - drill.submitted
    judged = [
        Finding("start", "pass", f"{len(first)} rank(s) on {nodes}, {waited:.0f} s after sbatch"),
        _imports(first),
        _cores(drill, first),
        _shared(drill, first),
        _network(first),
        _signal(drill, first),
        _requeue(drill, first),
    ]
    return [Finding(f"{drill.partition}: {one.name}", one.result, one.found, one.remedy) for one in judged]


def _not_started(drill: Drill, notes: int) -> Finding:
    name = f"{drill.partition}: start"
    if drill.state.startswith("PENDING"):
        found = f"job {drill.job} did not start within {DRILL_SECONDS // 60} minutes ({drill.state})"
        return Finding(name, "fail", found, "Run this again when the partition has room, or with --no-drill.")
    lines = drill.log.read_text(errors="replace").strip().splitlines()[-5:] if drill.log.exists() else []
    found = f"{notes} of {drill.asked.ranks} rank(s) of job {drill.job} wrote to {drill.folder}; {drill.state}"
    remedy = f"Read {drill.log}" + (
        f": {' | '.join(lines)}" if lines else ": it does not exist, so no node saw `logs`."
    )
    return Finding(name, "fail", found, f"{remedy} Are `runs`, `logs` and the project's folder shared by all nodes?")


def _imports(notes: list[Note]) -> Finding:
    wrong = [f"{note.node}: {note.imports_problem}" for note in notes if note.imports_problem]
    if wrong:
        remedy = "Correct `python` and slurm.setup in cluster.yaml, or the container's image."
        return Finding("packages", "fail", "; ".join(wrong), remedy)
    slowest = max(note.imports_seconds or 0.0 for note in notes)
    return Finding("packages", "pass", f"Python and all packages import, in {slowest:.0f} s at most")


def _cores(drill: Drill, notes: list[Note]) -> Finding:
    asked, granted = drill.asked.cpus, min(note.cores for note in notes)
    if granted < asked:
        remedy = "Ask for no more cores than a node has, or ask the administrators how tasks are bound."
        return Finding("cores", "fail", f"a rank may use {granted} core(s), asked for {asked}", remedy)
    bound = "" if granted == asked else " (ranks are not bound to their own cores here)"
    return Finding("cores", "pass", f"a rank may use {granted} core(s), asked for {asked}{bound}")


def _shared(drill: Drill, notes: list[Note]) -> Finding:
    blind = [note.node for note in notes if note.hello != drill.hello]
    if blind:
        found = f"{', '.join(blind)} did not see what this machine had just written"
        return Finding("shared disk", "fail", found, "Put `runs` on a file system that all nodes share.")
    return Finding(
        "shared disk", "pass", "the nodes read what this machine wrote, and this machine read what they wrote"
    )


def _network(notes: list[Note]) -> Finding:
    wrong = [note.network_problem for note in notes if note.network_problem]
    if wrong:
        remedy = (
            "Name the network interface in slurm.interface, or ask whether nodes may talk to each other on any port."
        )
        return Finding("network", "fail", "; ".join(wrong), remedy)
    if len(notes) == 1:
        return Finding("network", "note", "not tried: the partition has one node")
    return Finding("network", "pass", "; ".join(note.network for note in notes if note.rank))


def _signal(drill: Drill, notes: list[Note]) -> Finding:
    remedy = "Training then saves only every training.save_interval steps: lower it, and ask the administrators."
    if any(note.signal != "SIGUSR2" for note in notes):
        got = ", ".join(f"{note.node} got {note.signal or 'none'}" for note in notes)
        return Finding(
            "signal", "fail", f"SIGUSR2 was asked for {_NOTICE_SECONDS} s before the time limit, but {got}", remedy
        )
    if drill.limit is None:
        return Finding("signal", "pass", "SIGUSR2 reached every rank before the time limit")
    notice = drill.limit - max(note.signalled or 0.0 for note in notes)
    return Finding("signal", "pass", f"SIGUSR2 reached every rank {notice:.0f} s before the time limit "
                                     f"(asked for {_NOTICE_SECONDS})")  # fmt: skip


def _requeue(drill: Drill, notes: list[Note]) -> Finding:
    second = drill.attempt(1)
    if not second:
        found = f"job {drill.job} did not start again ({drill.state or 'unknown state'}); log: {drill.log}"
        remedy = (
            "Ask the administrators whether jobs may be requeued (JobRequeue, scontrol requeue) and how long it takes."
        )
        return Finding("requeue", "fail", found, remedy)
    seconds = min(note.started for note in second) - max(note.signalled or 0.0 for note in notes)
    return Finding("requeue", "pass", f"the job started again {seconds:.0f} s after the signal")
