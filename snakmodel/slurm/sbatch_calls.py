"""The sbatch calls of one launcher: the task list, the batch file and the submission of each array of jobs.

One of the jobs may be the continuation job, which runs the launcher again and so submits what Slurm had no room for.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster
from snakmodel.slurm.batch_file import make_executor
from snakmodel.slurm.job_table import WrongId
from snakmodel.slurm.jobs import CONTINUATION
from snakmodel.slurm.journal import Journal, Refused, Submission

_TIME_TO_LEAVE_SECONDS = 90
"""Seconds before its time limit at which the launcher in a continuation job is interrupted."""


def driver_command(python: str, tasks: Path) -> list[str]:
    """The command of every job, whether the launcher or a user has submitted it."""
    return [python, "-u", "-m", "snakmodel.job.driver", str(tasks)]


def continuation_stage(cluster: Cluster) -> Stage:
    """The stage that stands for the continuation job: one process without a GPU, with cluster.yaml's defaults."""
    alone = {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "gres": None}
    return Stage(CONTINUATION, (), cluster.defaults.model_copy(update=alone))


def continuation_command(folder: Path, resubmit_command: Sequence[str], series: str, minutes: int) -> str:
    """The shell lines that run the launcher again in `folder`, in a continuation job of so many minutes."""
    seconds = minutes * 60 - _TIME_TO_LEAVE_SECONDS
    launcher = shlex.join(["timeout", "-s", "INT", f"{seconds}", *resubmit_command])
    return (
        f"cd {shlex.quote(str(folder))} && {launcher} --continues {series}; code=$?\n"
        "# 124: there was no room all the time. Requeued, it goes on waiting.\n"
        '[ $code = 124 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_0" && sleep 60\n'
        "exit $code"
    )


@dataclass
class SbatchCalls:
    """Makes sbatch calls for a plan, and remembers them in order. With `dry`, only the batch files are written."""

    plan: RunPlan
    journal: Journal
    series: str
    """Token of the command that the user typed, which all its continuation jobs share."""
    dry: bool = False
    submitted: list[Submission] = field(default_factory=list)

    def submit_packs(self, stage: Stage, packs: list[int], dependency: str, width: int | None) -> Submission:
        """Submit packs of a stage as one array, of which `width` may run at the same time (None: as many as fit)."""
        python = self.plan.config.cluster.python or sys.executable
        tasks = self.plan.write_task_list(stage, python)
        return self._call_sbatch(stage, packs, dependency, shlex.join(driver_command(python, tasks)), width)

    def submit_continuation(self, resubmit_command: Sequence[str], dependency: str) -> Submission:
        """Submit the continuation job, which runs `resubmit_command --continues SERIES`."""
        stage = continuation_stage(self.plan.config.cluster)
        command = continuation_command(Path.cwd(), resubmit_command, self.series, stage.resources.minutes)
        return self._call_sbatch(stage, [0], dependency, command, None)

    def correct(self, wrong: WrongId) -> None:
        """Put a job's actual id into the journal and in place of the id that sbatch seemed to print."""
        print(f"note: the job of stage {wrong.stage} is {wrong.actual}, not {wrong.printed} as sbatch seemed to say")
        for one in self.submitted:
            if one.token == wrong.token:
                one.job = wrong.actual
                self.journal.accept(one)

    def _call_sbatch(
        self, stage: Stage, packs: list[int], dependency: str, command: str, width: int | None
    ) -> Submission:
        """Write the batch file that runs a command for each of these packs, and submit it. Raises UserError."""
        one = Submission(stage.name, packs, dependency, uuid.uuid4().hex[:10], self.series)
        folder = self.plan.paths.batch_file(stage.name)
        executor = make_executor(self.plan, stage, folder, packs, dependency, one.token, width)
        self.plan.logs(stage.name).mkdir(parents=True, exist_ok=True)
        if self.dry:
            number = sum(earlier.stage == stage.name for earlier in self.submitted)
            (folder / f"dry-run-{number}.sh").write_bytes(os.fsencode(executor.text(command)))
            one.job = f"<{stage.name}>"
        else:
            try:
                self.journal.submit(one, lambda: executor.send(command))
            except Refused as error:
                done = ", ".join(f"{earlier.stage} ({earlier.job})" for earlier in self.submitted) or "nothing"
                raise UserError(
                    f"Slurm refused stage {stage.name}: {error}\nSubmitted before it: {done}. "
                    "Correct cluster.yaml and run the same command: it submits only what is missing."
                ) from error
        one.accepted = time.monotonic()
        self.submitted.append(one)
        return one
