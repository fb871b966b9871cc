"""The ranks of a task, started through srun or as children on this machine, and watched until they end.

srun's own exit code says little, since it is the largest of all ranks' codes; what became of each rank is in its exit
record.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from run_contract.errors import EXIT_DONE, EXIT_NO_ROOM
from run_contract.output import say
from run_contract.process import die_with_parent
from snakmodel.job.containers import supervisor_python
from snakmodel.job.watchdog import Watchdog, furthest_behind, log_size, newest
from snakmodel.run.attempt_files import FORWARD_VARIABLE, hung_path, read_progress, started_path
from snakmodel.run.task_list import TaskList

_RANK_GRACE_SECONDS = 30
_HUNG_GRACE_SECONDS = 60
_START_PAUSES = (5, 15, 30, 60)
"""Seconds to wait before srun is tried again when it could not start anything, as while the controller is down."""


class Ranks:
    """Runs the processes of one task after the other. `signalled` says whether this job has been signalled to end."""

    def __init__(
        self, path: Path, tasks: TaskList, folder: Path, signalled: Callable[[], bool], hung: Callable[[int, str], None]
    ) -> None:
        self.path = path
        self.tasks = tasks
        self.folder = folder
        self.signalled = signalled
        self.report_hung = hung
        """Called with the task and the reason when the watchdog gives up on a task."""
        self.on_slurm = "SLURM_JOB_ID" in os.environ
        self.processes: list[subprocess.Popen[bytes]] = []

    def codes(self) -> list[int | None]:
        """Exit codes of the processes that were started: the ranks' codes, or srun's, which is the largest of them."""
        return [process.returncode for process in self.processes]

    def running(self) -> bool:
        """Whether any of the processes has not ended."""
        return None in [process.poll() for process in self.processes]

    def run(self, index: int) -> bool:
        """Run the task's ranks to their end. Returns False if, on Slurm, this job is signalled to end meanwhile."""
        supervise = [supervisor_python(self.tasks), "-u", "-m", "snakmodel.job.supervisor", str(self.path)]
        supervise += ["--task", str(index), "--folder", str(self.folder)]
        if not self.on_slurm:
            self.processes = self._start_children(supervise)
            self._attend(index)
            return True
        for pause in (*_START_PAUSES, None):
            self.processes = self._start_srun(supervise)
            if not self._attend(index):
                return False
            spoken = self.processes[0].returncode in (EXIT_DONE, EXIT_NO_ROOM)
            if spoken or pause is None or started_path(self.folder, index).exists():
                return True
            say(f"srun could not start the task; again in {pause} s")
            self._pause(pause)
            if self.signalled():
                return False
        return True

    def _attend(self, index: int) -> bool:
        """Wait for the ranks to end, and watch them; on Slurm, return False as soon as this job is signalled to end."""
        watchdog = self._watchdog(index)
        ranks_signalled = given_up = None
        while self.running():
            if self.signalled() and self.on_slurm:
                return False
            now = time.monotonic()
            crashed = any(rank.returncode not in (None, 0) for rank in self.processes)
            if ranks_signalled is None and (self.signalled() or crashed) and not self.on_slurm:
                ranks_signalled = now
                self._signal_ranks(signal.SIGTERM)
            if ranks_signalled is not None and now - ranks_signalled > _RANK_GRACE_SECONDS and crashed:
                self._signal_ranks(signal.SIGKILL)
            if given_up is None and watchdog and watchdog.expired():
                given_up = now
                self._give_up(index, watchdog)
            if given_up is not None and now - given_up > _HUNG_GRACE_SECONDS:
                self._signal_ranks(signal.SIGKILL)
            time.sleep(0.05)
        return True

    def _watchdog(self, index: int) -> Watchdog | None:
        """The watchdog over the log, the iteration and the signs of life that the ranks or their supervisors leave."""
        if log_size(1) is None:
            return None
        signs: Callable[[], object] = lambda: (  # noqa: E731 - it is one expression
            log_size(1),
            read_progress(self.tasks),
            newest(self.folder, index),
        )
        return Watchdog(self.tasks.hung_seconds, signs)

    def _give_up(self, index: int, watchdog: Watchdog) -> None:
        reason = f"no log line, no iteration, no heartbeat for {watchdog.silent_seconds():.0f} s"
        if last := furthest_behind(self.folder, index):
            reason += f"; {last}"
        self.report_hung(index, reason)
        say(f"=== {self.tasks.stage} task {index} hangs: {reason}")
        with suppress(OSError):  # on a full disk, the ranks are killed without showing their stacks
            hung_path(self.folder, index).touch()

    def _start_srun(self, supervise: list[str]) -> list[subprocess.Popen[bytes]]:
        tasks = self.tasks
        srun = [
            "srun",
            f"--nodes={tasks.nodes}",
            f"--ntasks={tasks.ranks}",
            f"--ntasks-per-node={tasks.ranks_per_node}",
        ]
        srun += [f"--cpus-per-task={tasks.cpus}", "--kill-on-bad-exit=1", "--unbuffered"]
        # Ranks need the claim and what the set-up lines export, whatever the site's or the user's default for srun is.
        srun += ["--export=ALL", *tasks.srun_args]
        return [subprocess.Popen([*srun, *supervise], cwd=tasks.project, preexec_fn=die_with_parent)]

    def _start_children(self, supervise: list[str]) -> list[subprocess.Popen[bytes]]:
        if self.tasks.nodes > 1:
            raise SystemExit(
                f"error: stage {self.tasks.stage} wants {self.tasks.nodes} nodes; without Slurm there is one"
            )
        ranks = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), FORWARD_VARIABLE: "1"} for rank in range(self.tasks.ranks)
        ]
        return [
            subprocess.Popen(supervise, cwd=self.tasks.project, env={**os.environ, **rank}, preexec_fn=die_with_parent)
            for rank in ranks
        ]

    def _signal_ranks(self, number: int) -> None:
        for rank in self.processes:
            if rank.poll() is None:
                rank.send_signal(number)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.signalled():
            time.sleep(0.1)
