"""python -m snakmodel.launch.by_hand STAGE [STAGE …] [--recipe R] [--cluster C] [--run-dir D]

What the batch files in sbatch/ run: stages of the chain inside this job, or on this machine where there is no job.

It plans as jobs/submit_all.py does and writes the same task lists, so that both run the same commands, see each other's
markers and can be mixed. A single task is run by the command that the launcher would submit: the driver, which starts
srun and requeues the job. Several tasks are worked through by the embedded scheduler, on the cores of the job. Either
way the job enters itself into the run's journal, so that the launcher, jobs/status.py and jobs/cancel.py know of it.

The exit codes are those of the driver, with 3 where an earlier step is not done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from run_contract.claim import ATTEMPT_VARIABLE
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_AGAIN, InputsMissing, NoRoom, UserError
from run_contract.output import say
from run_contract.publish import write_json
from snakmodel.chain.build import STAGES, stages_of
from snakmodel.chain.collect_stage import uncollected
from snakmodel.chain.plan import RunPlan, make_plan, select
from snakmodel.config import load as configuration
from snakmodel.config.load import Config
from snakmodel.config.sections import PROJECT
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.run.attempts import Attempt, Summary, decide, history, log_event
from snakmodel.run.lock import run_lock
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.ask import BY_HAND, use_cluster
from snakmodel.slurm.batch_file import active_packs, read_submissions
from snakmodel.slurm.jobs import array_ranges
from snakmodel.slurm.journal import Journal, Submission
from snakmodel.slurm.own_job import End, job_state, requeue
from snakmodel.slurm.sbatch_calls import driver_command

STEPS: Mapping[str, Sequence[str]] = {
    "0.preprocess": STAGES[: STAGES.index("tokenize")],
    "1.container": [],
    "2.tokenize": ["tokenize", "merge-tokens", "data-card", "index"],
    "3.convert": ["convert"],
    "4.verify": ["verify"],
    "5.shard": ["shard"],
    "6.train": ["train"],
    "7.merge": ["merge"],
    "8.export-hf": ["export-hf", "verify-export"],
    "9.push": ["push"],
}
"""Maps the name of each batch file to the stages that it runs, in order."""

_LOCK_SECONDS = 300


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m snakmodel.launch.by_hand", description=__doc__.splitlines()[2])
    parser.add_argument("stages", nargs="+", metavar="STAGE", help=f"among {', '.join(STAGES)}")
    parser.add_argument("--recipe", type=Path, default=PROJECT / "recipes" / "demo.yaml")
    parser.add_argument("--cluster", type=Path, default=PROJECT / "cluster.yaml")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/<recipe name>)")
    args = parser.parse_args()
    config = configuration.load(args.recipe, args.cluster, STAGES)
    root = (args.run_dir or config.cluster.runs / config.recipe.name).absolute()
    on_slurm = "SLURM_JOB_ID" in os.environ
    use_cluster(None if on_slurm else config.cluster.slurm.clusters)
    if on_slurm:  # temporary names must differ between nodes, on which process numbers recur
        os.environ[ATTEMPT_VARIABLE] = Attempt.current().name
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    selected = select(stages_of(config.recipe), None, None, stages_of(config.recipe, args.stages))
    plan = plan_by_hand(config, root, selected, int(element) if element else None)
    code = run_plan(plan)
    return run_plan(plan_by_hand(config, root, selected, None)) if plan.unfinished and code == 0 else code


def run_plan(plan: RunPlan) -> int:
    """Run what is missing of a plan in this job, or on this machine where there is no job; return the exit code."""
    on_slurm = "SLURM_JOB_ID" in os.environ
    units = [(name, pack) for name, packs in plan.missing.items() for pack in packs]
    if not units:
        print(f"Nothing to do: {', '.join(plan.missing)} of {plan.paths.root} is done.")
        return 0
    refuse_missing_inputs(plan)
    _refuse_what_is_active(plan)
    if on_slurm and len(units) == 1:
        return _become_driver(plan, *units[0])
    return _work_through(plan, on_slurm=on_slurm)


def plan_by_hand(config: Config, root: Path, selected: Sequence[str], element: int | None) -> RunPlan:
    """The plan of some stages or, in a job array, of one of its elements.

    Only the first job of a run freezes the plan, while it holds the run's lock. Later jobs are bound to what was frozen
    and write nothing, so that many may start at the same time.
    """
    end = time.monotonic() + _LOCK_SECONDS
    while not _is_planned(config, root):
        with ExitStack() as held:
            try:
                held.enter_context(run_lock(root))
            except UserError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
                continue
            make_plan(config, root, selected, [], dry=False)
    plan = make_plan(config, root, selected, [], dry=True)
    for note in plan.notes:
        say(f"note: {note}")
    return plan if element is None else one_element(plan, element)


def _is_planned(config: Config, root: Path) -> bool:
    """Whether an earlier job has frozen the plan, as far as the run can be planned now."""
    paths = RunPaths(root)
    return paths.frozen.exists() and (paths.shards.exists() or bool(uncollected(config.recipe)))


def one_element(plan: RunPlan, element: int) -> RunPlan:
    """The part of a plan that one element of a job array has to do.

    Raises UserError if these stages cannot share an array, or if there is no such element.
    """
    names = list(plan.missing)
    sizes = {name: len(plan.packs[name]) for name in names}
    first = sizes[names[0]]
    joins = [
        name for name in names for other, kind in plan.chain[name].waits.items() if kind == "all" and other in names
    ]
    if len(set(sizes.values())) > 1 or (joins and first > 1):
        lines = [f"{name} (--array={array_ranges(range(size))})" for name, size in sizes.items()]
        raise UserError(
            f"these stages cannot share a job array: {', '.join(lines)}. Submit the file without --array, "
            "or once for each stage, naming it: sbatch --array=… FILE STAGE"
        )
    if element >= first:
        raise UserError(
            f"{names[0]} has the elements 0 to {first - 1}, not {element}: --array={array_ranges(range(first))}"
        )
    return replace(plan, missing={name: [pack for pack in plan.missing[name] if pack == element] for name in names})


def refuse_missing_inputs(plan: RunPlan) -> None:
    """Raise InputsMissing if a stage waits for something that is neither done nor about to be done here."""
    problems = []
    for name, packs in plan.missing.items():
        for other, kind in plan.chain[name].waits.items() if packs else ():
            if other in plan.missing:
                continue
            same = [index for pack in packs for index in plan.packs[name][pack]]
            needed = same if kind == "same" else range(len(plan.chain[other].tasks))
            undone = [index for index in needed if plan.chain.marker_problem(other, index)]
            step = next((step for step, stages in STEPS.items() if other in stages), "0.preprocess")  # custom-NAME
            if undone:
                problems.append(
                    f"{name} waits for {other} (sbatch/{step}.sbatch), of which {len(undone)} task(s) are not done"
                )
    if problems:
        raise InputsMissing(
            f"{'; '.join(problems)}. Run this first (see sbatch/README.md). Run folder: {plan.paths.root}"
        )


def _refuse_what_is_active(plan: RunPlan) -> None:
    """Raise UserError if another job of this run has one of the plan's tasks queued or running."""
    if shutil.which("squeue") is None:
        return
    mine = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    journal = read_submissions(plan.paths.submissions)
    no_arrays = {line["job"] for line in journal if line["token"] == BY_HAND + line["job"]}
    for name, active in active_packs(plan).items():
        for pack in plan.missing.get(name, []):
            if (job := active.get(pack, mine)) != mine:
                element = job if job in no_arrays else f"{job}_{pack}"
                raise UserError(
                    f"{name} task {pack} is queued or running in job {element}. "
                    f"Wait for it, or take it over: scancel {element}, then submit this again."
                )


def _become_driver(plan: RunPlan, name: str, pack: int) -> int:
    """Replace this process by the driver of one task, whose log is the file that a launcher's job would write."""
    stage = plan.chain[name]
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    wanted = stage.resources
    if nodes < wanted.nodes or cores < wanted.ranks_per_node * wanted.cpus:
        raise UserError(
            f"this job has {nodes} node(s) of {cores} core(s), but {name} asks for {wanted.nodes} node(s) of "
            f"{wanted.ranks_per_node} rank(s) of {wanted.cpus} core(s) in cluster.yaml. Correct the #SBATCH lines: "
            f"--nodes={wanted.nodes} --ntasks-per-node={wanted.ranks_per_node} --cpus-per-task={wanted.cpus}"
        )
    python = plan.config.cluster.python or sys.executable
    command = [*driver_command(python, plan.write_task_list(stage, python)), "--pack", str(pack)]
    _record(plan)
    log = plan.logs(name) / f"{pack:05d}.out"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        say(f"{name} task {pack}: log in {log}")
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    except OSError as error:
        say(f"note: its log is this file: {error}")
    os.chdir(PROJECT)
    os.execvp(command[0], command)


def _record(plan: RunPlan) -> None:
    """Enter what this job has to do into the run's journal, as a launcher does for its jobs.

    A full disk does not keep the job from running.
    """
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
    token = BY_HAND + (f"{job}-{element}" if element else job)
    known = {(line["stage"], line["token"]) for line in read_submissions(plan.paths.submissions)}
    for name, packs in plan.missing.items():
        if packs and (name, token) not in known:
            try:
                Journal(plan.paths).accept(Submission(name, packs, "", token, job=job))
            except OSError as error:
                say(f"note: jobs/status.py and jobs/cancel.py will not know of this job: {error}")


def _work_through(plan: RunPlan, *, on_slurm: bool) -> int:
    """Run several tasks with the embedded scheduler, inside a Slurm job or without one."""
    return _SharedJob(plan).run() if on_slurm else LocalScheduler(plan).run()


class _SharedJob:
    """This Slurm job, which works through several tasks. It does for them together what the driver does for one."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.attempt = Attempt.current()
        self.attempts = plan.paths.root / "attempts" / "by-hand"
        self.before = self._done()
        self.code = 1
        """The exit code to use once this job was signalled to end."""
        self.scheduler = LocalScheduler(plan)
        self.scheduler.job = self.attempt.job
        self.scheduler.on_signalled = self._conclude
        if "SLURM_CPUS_ON_NODE" in os.environ:
            self.scheduler.cores = int(os.environ["SLURM_CPUS_ON_NODE"])

    def run(self) -> int:
        """Work through the tasks; if Slurm ends this job before all are done, have it started again where wanted."""
        _record(self.plan)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # this notice is meant for commands that save
        with suppress(NoRoom):
            write_json(self._folder / "start.json", {"progress": self.before, "node": os.uname().nodename})
        code = self.scheduler.run()
        return code if self.scheduler.signalled is None else self.code

    @property
    def _folder(self) -> Path:
        return self.attempts / self.attempt.name

    def _done(self) -> int:
        """The number of tasks that are done."""
        markers = self.plan.paths.root / "markers"
        return sum(len(list((markers / name).glob("*.json"))) for name in self.plan.missing)

    def _conclude(self) -> None:
        """Decide as the driver does whether this job is to be started again, and if so ask for it at once.

        There is no time to lose, since Slurm is about to kill the job.
        """
        retries, state = self.plan.config.cluster.retries, job_state(self.attempt.job)
        kind = state.kind(self.attempt, 0) if state else ""
        summary = Summary(self.attempt.name, "interrupted", self._done() > self.before, kind)
        with suppress(NoRoom, OSError):
            summary.write(self.attempts / self.attempt.name)
        past = history(self.attempts, self.attempt, self.before)
        verdict = decide(past, summary, without_progress=retries.without_progress, crashes=retries.crashes)
        if verdict.again:
            end = requeue(self.attempt, verdict.reason, lambda: None)
        else:
            say(f"=== {self.attempt.job} is not requeued: {verdict.reason}")
            end = End("cancelled" if kind == "cancelled" else "refused")
        self.code = EXIT_AGAIN if end.result == "requeued" else 1
        event = {"requeued": "requeue", "cancelled": "cancelled", "refused": "failed"}[end.result]
        details = {"attempt": self.attempt.name, "kind": kind, "reason": end.words or verdict.reason}
        for name in self.plan.missing:
            with suppress(OSError):
                log_event(self.plan.paths.root, name, event, **details)


if __name__ == "__main__":
    run_main(main)
