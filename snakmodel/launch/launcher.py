"""The launchers' common part: from arguments to configuration, plan and scheduler, and to what the user sees.

jobs/submit_all.py takes the whole chain; the other launchers take a part of it.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from run_contract.errors import UserError
from run_contract.output import printable
from snakmodel.chain import training_sum
from snakmodel.chain.build import STAGES, stages_of
from snakmodel.chain.containers import check_local
from snakmodel.chain.plan import RunPlan, make_plan, select
from snakmodel.config import load as configuration
from snakmodel.config.load import Config
from snakmodel.config.sections import PROJECT
from snakmodel.launch.local_scheduler import LocalScheduler, check_selection
from snakmodel.run.lock import run_lock
from snakmodel.slurm.admission import check_resources
from snakmodel.slurm.ask import use_cluster
from snakmodel.slurm.batch_file import choose
from snakmodel.slurm.jobs import array_ranges
from snakmodel.slurm.limits import pack_for_queue
from snakmodel.slurm.submitter import SAVED_SECONDS, SlurmScheduler, SubmissionReport

_CONTINUATION_SECONDS = 3600.0
_SQUEUE = 'squeue --me --format="%.16i %.9T %.10M %.4D  %j  %R"'
"""The format shows whole names: by default squeue cuts them after eight characters, which hides the stages of a run."""
_NO_CONTROLS = dict.fromkeys([*range(32), 127])
_PROBE_BYTES = 1 << 16
"""Number of bytes for a test of writing: more than what a full disk may still take into its last block."""


def parse(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags that all launchers share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=PROJECT / "recipes" / "demo.yaml", help="what to do (default: recipes/demo.yaml)"
    )
    parser.add_argument(
        "--cluster", type=Path, default=PROJECT / "cluster.yaml", help="where to do it (default: cluster.yaml)"
    )
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/<recipe name>)")
    parser.add_argument("--scheduler", choices=["auto", "local", "slurm"], help="default: what cluster.yaml says")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="leave out the stages before this one")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="leave out the stages after this one")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="take these stages alone")
    parser.add_argument(
        "--restart-from", nargs="+", default=[], metavar="STAGE",
        help="redo these stages and all that follow, also with a changed recipe; old checkpoints are moved aside",
    )  # fmt: skip
    parser.add_argument(
        "--check-inputs", action="store_true",
        help="compare all input files with what was read of them, not only those whose size or time changed",
    )  # fmt: skip
    parser.add_argument(
        "--steal-lock", action="store_true", help="take over the run from a launcher that no longer exists"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write the batch files and show the plan; submit nothing"
    )
    parser.add_argument(
        "--wait-for-room", action="store_true",
        help="stay and submit the rest as the queue empties, instead of leaving it to a continuation job",
    )  # fmt: skip
    parser.add_argument("--continues", metavar="SERIES", help=argparse.SUPPRESS)  # in a continuation job
    return parser.parse_args(argv)


def _resubmit_command(args: argparse.Namespace, root: Path) -> list[str]:
    """The command line of the launcher that submits what is left of this run."""
    command = [sys.executable, str(Path(sys.argv[0]).absolute()), "--recipe", str(args.recipe.absolute())]
    command += ["--cluster", str(args.cluster.absolute()), "--run-dir", str(root), "--scheduler", "slurm"]
    for flag, values in (("--from", [args.first]), ("--until", [args.last]), ("--only", args.only)):
        command += [flag, *values] if any(values) else []
    return command


def launch(description: str, stages: Sequence[str] = STAGES, argv: Sequence[str] | None = None) -> int:
    """Run or submit what is missing of some stages of the chain, and return the exit code."""
    args = parse(description, argv)
    config = configuration.load(args.recipe, args.cluster, STAGES)
    select(stages_of(config.recipe), None, None, args.restart_from)
    selected = select(stages_of(config.recipe, stages), args.first, args.last, args.only)
    root = (args.run_dir or config.cluster.runs / config.recipe.name).absolute()
    scheduler = args.scheduler or config.cluster.scheduler
    use_cluster(config.cluster.slurm.clusters)
    if not (args.dry_run and scheduler == "slurm"):
        scheduler = choose(scheduler)
    logs = config.cluster.logs / root.name
    with _no_empty_folders_left(root, logs):
        make_writable(root, "the run's folder", "another --run-dir")
        make_writable(logs, "the folder for logs", "another `logs` in cluster.yaml")
        return _start(args, config, selected, root, scheduler)


def _start(args: argparse.Namespace, config: Config, selected: Sequence[str], root: Path, scheduler: str) -> int:
    """Plan the run and hand it to the scheduler; return the exit code."""
    # A continuation job may start while the launcher that submitted it, or one of a user, is still at work.
    with run_lock(root, steal=args.steal_lock, patience=_CONTINUATION_SECONDS if args.continues else 0.0):
        fit = None if scheduler == "local" else partial(pack_for_queue, config.cluster, needed=not args.dry_run)
        make = partial(make_plan, config, root, selected, dry=args.dry_run, check_inputs=args.check_inputs, fit=fit)
        plan = make(args.restart_from)
        _explain(plan, selected, dry=args.dry_run)
        if scheduler == "local":
            code = _run_locally(plan, dry=args.dry_run)
            if code or not plan.unfinished or args.dry_run:
                return code
            plan = make([])
            _explain(plan, selected, dry=args.dry_run)
            return _run_locally(plan, dry=args.dry_run)
        resubmit_command = _resubmit_command(args, root)
        return _submit(SlurmScheduler(plan, args.dry_run, args.wait_for_room, resubmit_command, args.continues))


@contextmanager
def _no_empty_folders_left(*folders: Path) -> Iterator[None]:
    """Remove folders that the body made, if it fails before there is anything in them."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def make_writable(folder: Path, what: str, remedy: str) -> None:
    """Make a folder, and write into it to see whether that is possible.

    Raises UserError when it fails, as on a full disk, and when the folder's name cannot be written into batch files.
    """
    if printable(str(folder)) != str(folder).translate(_NO_CONTROLS):
        raise UserError(
            f"{what}, {printable(str(folder))!r}, has a name that is not UTF-8 or holds control characters, so it "
            f"cannot be written into batch files. Rename it, or give {remedy}."
        )
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{what}, {folder}, cannot be written: {error.strerror}. {_mend(error, folder)}or give {remedy}."
        ) from error


def _mend(error: OSError, folder: Path) -> str:
    """What to do about a folder that cannot be written, as the beginning of a sentence that ends in an alternative."""
    if in_the_way := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        return f"{in_the_way} is a file: move it away, "
    return "Free space " if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Correct its permissions "


def _explain(plan: RunPlan, selected: Sequence[str], *, dry: bool) -> None:
    for note in plan.notes:
        print(f"note: {note}")
    problems = check_selection(plan, selected)
    if problems:
        raise UserError("; ".join(problems) + ". Select these stages too (--from, --only), or none.")
    if plan.missing.get("train"):
        for line in training_sum.lines(plan, dry=dry):
            print(line)


def _console() -> Console:
    """A console that prints `[x]` and `:x:` in the names of files as they are."""
    return Console(markup=False, emoji=False)


def _run_locally(plan: RunPlan, *, dry: bool) -> int:
    check_local(plan.config.cluster)
    console = _console()
    if dry:
        console.print(_table(plan))
        return 0
    if not any(plan.missing.values()):
        console.print(f"Nothing to do: every selected stage of {plan.paths.root} is done.")
        return 0
    console.print(f"Running {plan.paths.root} on this machine; logs in {plan.logs('<stage>')}")
    return LocalScheduler(plan).run()


def _submit(scheduler: SlurmScheduler) -> int:
    plan = scheduler.plan
    if not scheduler.dry:
        check_resources(plan)
    report = scheduler.run()
    submitted = report.submitted
    console = _console()
    console.print(_table(plan, report))
    given_up = {name: packs for name, packs in report.given_up.items() if packs}
    for name, packs in given_up.items():
        console.print(
            f"{name}: packs {array_ranges(list(packs))} are not submitted again: they, or packs that they need, failed"
        )
    if scheduler.dry:
        console.print(f"Dry run: nothing was submitted. Batch files: {plan.paths.batch_file('<stage>')}")
    elif submitted:
        console.print(
            f"Submitted {sum(len(one.packs) for one in submitted)} tasks in {len(submitted)} jobs. What to type next:\n"
            f"  {_SQUEUE}   # watch them, with their stages\n"
            f"  tail -F {plan.logs('<stage>')}/*.out   # read along\n"
            f"  the same command again   # submit what is missing, should something fail",
            soft_wrap=True,
        )
    elif not report.left and not given_up:
        console.print("Nothing was submitted: every selected stage is done, queued or running.")
    if report.is_to_be_continued:
        console.print("A continuation job plans and submits the other stages when these have ended.")
    if report.left:
        console.print(
            f"{report.left} tasks do not fit into the queue ({report.limits and report.limits.tightest}); "
            "a continuation job submits them when these have ended."
        )
    if submitted and not scheduler.dry:
        console.print(f"Making sure that Slurm has kept them; this takes up to {SAVED_SECONDS} s.")
    for note in scheduler.resubmit_forgotten():
        console.print(f"{note}: its controller was restarted. Submitted again.")
    return 1 if given_up and not submitted else 0


def _table(plan: RunPlan, report: SubmissionReport | None = None) -> Table:
    """A table with one row per stage: its tasks, how many are done or active, and the jobs that were submitted now."""
    table = Table(title=f"{plan.paths.name}: {plan.paths.root}", title_justify="left")
    for column in ("stage", "tasks", "done", "active", "job", "waits for"):
        table.add_column(column, justify="right" if column in ("tasks", "done", "active") else "left", overflow="fold")
    for name, missing in plan.missing.items():
        packs = len(plan.packs[name])
        active = len(report.queued_before.get(name, {})) if report else 0
        now = [one for one in report.submitted if one.stage == name] if report else []
        waits = "; ".join(one.dependency for one in now if one.dependency) or ", ".join(plan.chain[name].waits)
        jobs = ", ".join(f"{one.job} ({len(one.packs)})" for one in now)
        table.add_row(name, str(packs), str(packs - len(missing)), str(active), jobs, waits)
    return table
