"""Cancels everything of one run, or of one of its stages, that is queued or running, and nothing else.

A job that is signalled to end saves its state and asks Slurm to start it again, which can bring a cancelled job back
(seen on Slurm 22.05). So this module waits until every job is gone. A job that has come back is cancelled again before
it starts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.config.sections import suggest
from snakmodel.monitor.run_files import RunFiles, find_run
from snakmodel.run.attempts import log_event
from snakmodel.slurm.ask import Unanswered, ask, use_cluster
from snakmodel.slurm.jobs import RUNNING, Job, Owner, ask_squeue

_SETTLE_SECONDS = 300
_IDS_PER_CALL = 500


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """The command jobs/cancel.py: show what would be cancelled, ask the user, and cancel it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the run's folder or name")
    parser.add_argument("--stage", help="only this stage's jobs (Slurm removes those that wait for them)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    args = parser.parse_args(argv)
    files = RunFiles.read(find_run(args.run))
    names = [stage.name for stage in files.stages]
    if args.stage and args.stage not in names:
        raise UserError(f"there is no stage {args.stage} in {files.root}. {suggest(args.stage, names)}")
    use_cluster(files.cluster)
    owner = Owner.of(files.root, files.journal)
    jobs = _active(files, owner, args.stage)
    launcher = _launcher(files, args.stage)
    if not jobs and not launcher:
        print(f"Nothing to cancel: nothing of {args.stage or files.root} is queued or running.")
        return 0
    _show(jobs, launcher)
    for job in {job.array: job for _, job in jobs if args.stage}.values():
        if len(several := owner.stages_of(job)) > 1:
            print(f"note: job {job.array} works on {', '.join(several)} together, so all of it is cancelled")
    _confirm(args.yes)
    if launcher:
        _stop_launcher(files.root, launcher)
    if jobs:
        _cancel(files, owner, args.stage, jobs)
    return 0


def _active(files: RunFiles, owner: Owner, stage: str | None) -> list[tuple[str, Job]]:
    """(Stage, job) of everything of the run that is queued or running. Raises UserError when Slurm is silent."""
    if not files.journal and not (files.root / "sbatch").is_dir():
        return []
    try:
        listed = ask_squeue()
    except Unanswered as error:
        raise UserError(f"it is unknown what is queued, so nothing was cancelled: {error}. Try again later.") from None
    found = [(name, job) for job in listed if job.active for name in owner.stages_of(job)]
    return [(name, job) for name, job in found if stage in (None, name)]


def _launcher(files: RunFiles, stage: str | None) -> dict[str, Any]:
    """The process that holds the run's lock, if it is on this host and the whole run is to be cancelled; else empty."""
    holder = files.holder
    if not holder:
        return {}
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    if stage:
        print(f"note: a launcher works on this run ({who}); it can only be stopped as a whole, without --stage")
        return {}
    if holder.get("host") != os.uname().nodename:
        print(f"note: a launcher works on this run ({who}); stop it there, with the same command")
        return {}
    return holder


def _show(jobs: Sequence[tuple[str, Job]], launcher: dict[str, Any]) -> None:
    if launcher:
        print(f"launcher: process {launcher['pid']} on this machine, since {launcher.get('since')}, with its tasks")
    for stage in dict.fromkeys(stage for stage, _ in jobs):
        own = [job for name, job in jobs if name == stage]
        running = sum(job.state in RUNNING for job in own)
        ids = ", ".join(dict.fromkeys(job.array for job in own))
        print(f"{stage}: job {ids}: {running} running, {len(own) - running} queued")


def _confirm(yes: bool) -> None:
    """Ask the user. Raises UserError unless the answer is yes, and where there is no terminal to ask at."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nothing was cancelled: there is no terminal to ask at. Add --yes if this is what you want.")
    try:
        answer = input("Cancel all this? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was cancelled")


def _stop_launcher(root: Path, launcher: dict[str, Any]) -> None:
    try:
        os.kill(int(launcher["pid"]), signal.SIGTERM)
    except ProcessLookupError:
        print("the launcher has ended meanwhile")
        return
    except PermissionError:
        raise UserError(f"process {launcher['pid']} belongs to another user, who has to stop it") from None
    log_event(root, "", "cancel", launcher=f"{launcher['pid']} on {launcher.get('host')}")
    print(f"process {launcher['pid']} was signalled to stop; it gives its tasks time to save")


def _cancel(files: RunFiles, owner: Owner, stage: str | None, jobs: list[tuple[str, Job]]) -> None:
    """Cancel the jobs, those submitted last first, and make sure that none comes back."""
    ids = list(dict.fromkeys(job.array for _, job in jobs))
    for name in dict.fromkeys(name for name, _ in jobs):
        own = list(dict.fromkeys(job.array for other, job in jobs if other == name))
        log_event(files.root, name, "cancel", jobs=own, by=os.uname().nodename)
    chosen = set(ids)
    end, again = time.monotonic() + _SETTLE_SECONDS, 0.0
    left = jobs
    while left and time.monotonic() < end:
        if time.monotonic() >= again or any(job.state not in RUNNING for _, job in left):
            _scancel(sorted({job.array for _, job in left}, key=int, reverse=True))
            again = time.monotonic() + 30
        time.sleep(1)
        left = [(name, job) for name, job in _active(files, owner, stage) if job.array in chosen]
    if left:
        states = ", ".join(f"{job.id} ({job.state.lower()})" for _, job in left[:5])
        raise UserError(
            f"scancel was accepted, but after {_SETTLE_SECONDS} s Slurm still lists {states}. "
            "Run the same command again."
        )
    tasks = len({job.id for _, job in jobs})
    print(f"Cancelled {tasks} task(s) of {len(ids)} job(s). The launcher, run again, continues where it was.")


def _scancel(ids: Sequence[str]) -> None:
    try:
        for start in range(0, len(ids), _IDS_PER_CALL):
            ask(["scancel", *ids[start : start + _IDS_PER_CALL]])
    except Unanswered as error:
        raise UserError(f"not everything was cancelled: {error}. Run the same command again.") from None
