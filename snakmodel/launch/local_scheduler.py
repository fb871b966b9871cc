"""The embedded scheduler: runs the same stages, task lists, drivers and markers on this machine, without Slurm.

A pack whose inputs are done is started as a driver process while cores are free. Ctrl-C and TERM are passed on, so that
commands which can save their state do so, and a launcher that is killed takes its children along. A launcher that is
run again continues with what is missing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from run_contract.entry_point import STOPPED
from run_contract.errors import EXIT_AGAIN, EXIT_DONE, EXIT_STOPPED
from run_contract.output import say
from run_contract.process import die_with_parent
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Stage
from snakmodel.config.sections import PROJECT
from snakmodel.run import training_numbers
from snakmodel.run.attempts import next_restart
from snakmodel.slurm.jobs import array_ranges

_GRACE_SECONDS = 60
_LOG_TAIL = 15
_LOOK_SECONDS = 2.0


@dataclass
class _StartedPack:
    """A pack whose driver was started: the process, and how often the pack had been started before."""

    stage: Stage
    pack: int
    cores: int
    restart: int = 0
    process: subprocess.Popen[bytes] | None = None


@dataclass
class _Report:
    """What is shown while stages run: on a terminal one bar per stage, elsewhere one line per finished stage."""

    console: Console
    bars: Progress
    ids: dict[str, TaskID] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)

    def begin(self, stage: str, total: int) -> None:
        """Show a stage, of which the first pack has been started."""
        if stage not in self.ids:
            self.ids[stage] = self.bars.add_task(stage, total=total)
            self.started[stage] = time.monotonic()

    def reach(self, stage: str, iteration: int, last: int) -> None:
        """Show how far a training has got: its bar counts iterations, and not its single pack."""
        self.bars.update(self.ids[stage], completed=iteration, total=last)

    def advance(self, stage: str, left: int) -> None:
        """Show that a pack of a stage is done, and that `left` packs are not."""
        if left == 0:
            self.bars.update(self.ids[stage], completed=self.bars.tasks[self.ids[stage]].total)
        else:
            self.bars.advance(self.ids[stage])
        if left == 0 and not self.console.is_terminal:
            print(f"{stage}: done in {time.monotonic() - self.started[stage]:.1f} s", flush=True)


class LocalScheduler:
    """Runs the missing packs of a plan, on no more than a given number of cores at the same time."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.python = plan.config.cluster.python or sys.executable
        self.cores = plan.config.cluster.local.cpus or len(os.sched_getaffinity(0))
        self.waiting = {name: list(packs) for name, packs in plan.missing.items()}
        self.left = {name: set(packs) for name, packs in plan.missing.items()}
        self.running: list[_StartedPack] = []
        self.failed: list[_StartedPack] = []
        self.signalled: float | None = None
        """When this process was signalled to end, by the monotonic clock; None if it was not."""
        self.job = f"local{os.getpid()}"
        """The name of the attempts' job: this process, or the Slurm job that it runs in."""
        self.on_signalled: Callable[[], object] = lambda: None
        """Called once after this process was signalled to end and has signalled its tasks, before they have ended."""
        self.looked = 0.0
        """When the progress of a training was last looked at, by the monotonic clock."""

    def run(self) -> int:
        """Run everything that is missing, and return the exit code.

        If anything is raised meanwhile, for example because nothing can be printed any more, running tasks are first
        signalled to save and to leave, and are waited for.
        """
        for name in self.waiting:
            self.plan.write_task_list(self.plan.chain[name], self.python)
        console = Console()
        bars = Progress(
            TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        report = _Report(console, bars)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with bars if console.is_terminal else nullcontext():
                while self.running or (self.signalled is None and self._start_ready(report)):
                    self._collect(report)
                    self._start_ready(report)
                    self._look_at_training(report)
                    self._answer_once()
                    time.sleep(0.05)
                self._answer_once()
        except BaseException:
            self._drain()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._conclude()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled is None:
            self._stop()
            say("\nstopping: running tasks are signalled to save and leave; run the same command to continue")

    def _answer_once(self) -> None:
        """Call `on_signalled` the first time that this finds the scheduler signalled to end."""
        if self.signalled is not None:
            on_signalled, self.on_signalled = self.on_signalled, lambda: None
            on_signalled()

    def _stop(self) -> None:
        """Signal running tasks to save and to leave, and start nothing more."""
        self.signalled = time.monotonic()
        for job in self.running:
            assert job.process is not None
            job.process.terminate()

    def _drain(self) -> None:
        """Stop, and return when everything that runs has ended; what still runs after the time to save is killed."""
        self._stop()
        end = time.monotonic() + _GRACE_SECONDS
        for job in self.running:
            assert job.process is not None
            try:
                job.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()

    def _start_ready(self, report: _Report) -> bool:
        """Start the packs that can start now; returns whether there were any."""
        started = False
        if self.signalled is not None:
            return False
        for name, packs in self.waiting.items():
            stage = self.plan.chain[name]
            for pack in list(packs):
                cores = stage.resources.cpus * stage.resources.ranks
                used = sum(job.cores for job in self.running)
                if not self._is_ready(stage, pack) or (used and used + cores > self.cores):
                    continue
                packs.remove(pack)
                report.begin(name, len(self.plan.missing[name]))
                self._start(_StartedPack(stage, pack, cores, next_restart(self.plan.paths.root, name, pack, self.job)))
                started = True
        return started

    def _is_ready(self, stage: Stage, pack: int) -> bool:
        for other, kind in stage.waits.items():
            left = self.left.get(other, set())
            if (kind == "all" and left) or pack in left:
                return False
        return True

    def _start(self, job: _StartedPack) -> None:
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            self.python,
            "-m",
            "snakmodel.job.driver",
            str(self.plan.paths.task_list(job.stage.name)),
            "--pack",
            str(job.pack),
        ]
        scrubbed = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        own = {"SNAKMODEL_JOB": self.job, "SNAKMODEL_RESTART": str(job.restart)}
        with log.open("ab") as output:
            job.process = subprocess.Popen(
                command, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**scrubbed, **own}, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.running.append(job)

    def _collect(self, report: _Report) -> None:
        """Take note of the drivers that have ended, and start those again that ask for it."""
        if self.signalled is not None and time.monotonic() - self.signalled > _GRACE_SECONDS:
            for job in self.running:
                assert job.process is not None
                job.process.kill()
        for job in list(self.running):
            assert job.process is not None
            code = job.process.poll()
            if code is None:
                continue
            self.running.remove(job)
            if code == EXIT_DONE:
                self.left[job.stage.name].discard(job.pack)
                report.advance(job.stage.name, len(self.left[job.stage.name]))
            elif code == EXIT_AGAIN and self.signalled is None:
                self._start(_StartedPack(job.stage, job.pack, job.cores, job.restart + 1))
            elif self.signalled is None or code not in (EXIT_AGAIN, EXIT_STOPPED):
                self.failed.append(job)

    def _look_at_training(self, report: _Report) -> None:
        """Show from time to time how far a running training is."""
        training = [job.stage.name for job in self.running if job.stage.progress]
        if not training or not report.console.is_terminal or time.monotonic() < self.looked + _LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        if iteration := training_numbers.newest(self.plan.paths.root).get("iteration"):
            report.reach(training[0], int(iteration), self.plan.config.recipe.training.train_iters)

    def _log(self, job: _StartedPack) -> Path:
        return self.plan.logs(job.stage.name) / f"{job.pack:05d}.out"

    def _conclude(self) -> int:
        for jobs, lines in self._alike():
            stage, packs, log = jobs[0].stage.name, [job.pack for job in jobs], self._log(jobs[0])
            which = f"pack {packs[0]}" if len(packs) == 1 else f"packs {array_ranges(packs)} in the same way"
            code = jobs[0].process and jobs[0].process.returncode
            say(f"\n{stage}, {which}: failed (exit code {code}). The end of {log}:", error=True)
            for line in lines:
                say(f"  {line}", error=True)
        if self.signalled is not None:
            say(STOPPED)
            return 128 + signal.SIGINT
        if self.failed:
            say("\nRepair it and run the same command: it continues with what is missing.", error=True)
            return 1
        return 0

    def _alike(self) -> list[tuple[list[_StartedPack], list[str]]]:
        """The failed packs of each stage, grouped by their last error, each group with the end of a log.

        Errors that differ in numbers alone count as the same error.
        """
        groups: dict[tuple[str, str], tuple[list[_StartedPack], list[str]]] = {}
        for job in self.failed:
            lines = self._log(job).read_text(errors="replace").splitlines()[-_LOG_TAIL:]
            error = next((line for line in reversed(lines) if line.startswith("error: ")), "\n".join(lines))
            groups.setdefault((job.stage.name, re.sub(r"\d+", "#", error)), ([], lines))[0].append(job)
        return list(groups.values())


def check_selection(plan: RunPlan, selected: Sequence[str]) -> list[str]:
    """Sentences on stages that a selected stage waits for, and that are neither done nor selected themselves."""
    problems = []
    for name in plan.missing:
        for other in plan.chain[name].waits:
            if plan.missing[name] and other not in selected:
                undone = [i for i in range(len(plan.chain[other].tasks)) if plan.chain.marker_problem(other, i)]
                if undone:
                    problems.append(f"{name} waits for {other}, of which {len(undone)} task(s) are not done")
    return problems
