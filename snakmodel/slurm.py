"""Stages -> sbatch through submitit: arrays with stable indices, dependencies, logs that are appended to.

submitit writes and submits the batch file; the command in it is our driver with a task list, so no pickles are
involved and
a job needs nothing that happens after sbatch. The array index is the pack's number, whichever packs are submitted.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from snakmodel.attempts import log_event
from snakmodel.config import PROJECT, Resources
from snakmodel.plan import Plan
from snakmodel.publish import UserError
from snakmodel.stage import Stage

_ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
LEAKS = ("SLURM_", "SBATCH_", "SRUN_", "PMI")
"""How the variables of a surrounding job begin, which sbatch would read as options."""


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's writer of batch files, for a command of our own."""

    wants_signal = False

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """The batch file; without --signal for commands that have nothing to save."""
        lines = super()._make_submission_file_text(command, uid).split("\n")
        return "\n".join(line for line in lines if self.wants_signal or not line.startswith("#SBATCH --signal="))

    @classmethod
    def affinity(cls) -> int:
        """Batch files can be written (--dry-run) on a machine without Slurm."""
        return 2


@dataclass
class Submission:
    """One sbatch call."""

    stage: str
    packs: list[int]
    dependency: str
    job: str
    token: str


@dataclass
class SlurmScheduler:
    """Submits the missing packs of a plan, chained by dependencies."""

    plan: Plan
    dry: bool = False
    active: dict[str, dict[int, str]] = field(default_factory=dict)
    """Stage -> pack -> job that is queued or running for it."""
    submitted: list[Submission] = field(default_factory=list)

    def run(self) -> list[Submission]:
        """Submit stage by stage; return what was submitted. With `dry` only the batch files are written."""
        scrub_environment()
        self.active = {} if self.dry else active_packs(self.plan)
        for name, packs in self.plan.missing.items():
            wanted = [pack for pack in packs if pack not in self.active.get(name, {})]
            groups: dict[str, list[int]] = {}
            for pack in wanted:
                groups.setdefault(self._dependency(self.plan.chain[name], pack), []).append(pack)
            for dependency, group in groups.items():
                self._submit(self.plan.chain[name], group, dependency)
        return self.submitted

    def _dependency(self, stage: Stage, pack: int) -> str:
        """What this pack has to wait for: nothing that is done, `aftercorr` where the same index is submitted now."""
        parts: list[str] = []
        for other, kind in stage.waits.items():
            now = [one for one in self.submitted if one.stage == other]
            before = self.active.get(other, {})
            if kind == "all":
                jobs = [one.job for one in now] + sorted(set(before.values()))
                parts += [f"afterok:{job}" for job in jobs]
            else:
                parts += [f"aftercorr:{one.job}" for one in now if pack in one.packs]
                parts += [f"afterok:{before[pack]}"] if pack in before else []
        return ",".join(dict.fromkeys(parts))

    def _submit(self, stage: Stage, packs: list[int], dependency: str) -> None:
        token = uuid.uuid4().hex[:10]
        tasks = self.plan.write_task_list(stage, self._python())
        folder = self.plan.paths.batch_file(stage.name)
        executor = make_executor(self.plan, stage, folder, packs, dependency, token)
        command = shlex.join([self._python(), "-u", "-m", "snakmodel.driver", str(tasks)])
        self.plan.logs(stage.name).mkdir(parents=True, exist_ok=True)
        if self.dry:
            path = folder / f"dry-run-{len([one for one in self.submitted if one.stage == stage.name])}.sh"
            path.write_text(executor._make_submission_file_text(command, token))
            self.submitted.append(Submission(stage.name, packs, dependency, f"<{stage.name}>", token))
            return
        try:
            job = executor._submit_command(command).job_id
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
            done = ", ".join(f"{one.stage} ({one.job})" for one in self.submitted) or "nothing"
            raise UserError(
                f"Slurm refused stage {stage.name}: {str(error).strip()}\nSubmitted before it: {done}. "
                "Correct cluster.yaml and run the same command: it submits only what is missing."
            ) from error
        submission = Submission(stage.name, packs, dependency, job, token)
        self.submitted.append(submission)
        self._record(submission)

    def _record(self, one: Submission) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": one.stage, "job": one.job, "packs": one.packs}
        with self.plan.paths.submissions.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "dependency": one.dependency, "token": one.token}) + "\n")
        log_event(
            self.plan.paths.root, one.stage, "submit", job=one.job, packs=len(one.packs), dependency=one.dependency
        )

    def _python(self) -> str:
        return self.plan.config.cluster.python or sys.executable


def make_executor(
    plan: Plan, stage: Stage, folder: Path, packs: Sequence[int], dependency: str, token: str
) -> _Executor:
    """A submitit executor with everything that the batch file of these packs says."""
    slurm = plan.config.cluster.slurm
    resources = plan.config.cluster.with_defaults(stage.resources)
    folder.mkdir(parents=True, exist_ok=True)
    executor = _Executor(folder)
    executor.wants_signal = stage.resumable
    log = str(plan.logs(stage.name) / "%5a.out")
    width = min(slurm.array_parallelism, len(packs))
    additional: dict[str, Any] = {
        "array": f"{array_ranges(packs)}%{width}",
        "output": log,
        "requeue": True,
        "kill-on-invalid-dep": "yes",
    }
    executor.update_parameters(
        **_parameters(resources),
        job_name=f"{plan.paths.name}-{stage.name}-{token}",
        comment=token,
        mail_type=slurm.mail_type,
        mail_user=slurm.mail_user,
        dependency=dependency or None,
        signal_delay_s=slurm.signal_seconds,
        setup=["trap : TERM", f"cd {shlex.quote(str(PROJECT))} || exit 1", *(resources.setup or [])],
        stderr_to_stdout=True,
        use_srun=False,
        wckey=None,
        additional_parameters=additional,
    )
    return executor


def _parameters(resources: Resources) -> dict[str, Any]:
    """Resources in submitit's parameter names."""
    return {
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "cpus_per_task": resources.cpus,
        "mem": f"{int(resources.mem_gb * 1024)}MB" if resources.mem_gb else None,
        "gpus_per_node": resources.gpus_per_node or None,
        "gres": resources.gres,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
    }


def array_ranges(packs: Sequence[int]) -> str:
    """Numbers in Slurm's spelling: [0, 1, 2, 7] -> 0-2,7."""
    parts: list[list[int]] = []
    for pack in sorted(packs):
        if parts and pack == parts[-1][1] + 1:
            parts[-1][1] = pack
        else:
            parts.append([pack, pack])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def active_packs(plan: Plan) -> dict[str, dict[int, str]]:
    """Stage -> pack -> job, for every pack of this run that Slurm has queued or running.

    Raises UserError if Slurm is silent.
    """
    journal = read_submissions(plan.paths.submissions)
    if not journal:
        return {}
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--states=all", "--format=%F %K %T"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        raise UserError(
            f"squeue did not answer, so it is unknown what is queued; nothing was submitted: {asked.stderr.strip()}"
        )
    stages = {line["job"]: line["stage"] for line in journal}
    found: dict[str, dict[int, str]] = {}
    for line in asked.stdout.splitlines():
        job, index, state = line.split()
        if job in stages and index.isdigit() and state not in _ENDED:
            found.setdefault(stages[job], {})[int(index)] = job
    return found


def read_submissions(path: Path) -> list[Mapping[str, Any]]:
    """The journal of a run's sbatch calls."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def scrub_environment() -> None:
    """Drop the variables of a surrounding job, which sbatch would read as options; SLURM_CONF stays."""
    for name in list(os.environ):
        if name.startswith(LEAKS) and name != "SLURM_CONF":
            del os.environ[name]


def choose(scheduler: str) -> str:
    """Resolve `auto`: local only where there is no sbatch or no Slurm configuration.

    A silent controller is an error.
    """
    if scheduler != "auto":
        return scheduler
    if shutil.which("sbatch") is None:
        return "local"
    named = os.environ.get("SLURM_CONF")
    if named and not Path(named).exists():
        raise UserError(
            f"SLURM_CONF names {named}, which does not exist. Correct or unset it, or say --scheduler local."
        )
    asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True)
    words = asked.stdout + asked.stderr
    if "failed to fetch config" in words or "configuration source" in words:
        return "local"
    if asked.returncode or "UP" not in words:
        raise UserError(
            f"there is a Slurm here, but its controller does not answer: {words.strip()}\n"
            "Wait for it, or say --scheduler local to run everything on this machine."
        )
    return "slurm"
