"""What Slurm is given: batch files through submitit, arrays with stable indices, logs that are appended to.

submitit writes and submits the batch file; the command in it is our driver with a task list, so no pickles are
involved and a job needs nothing that happens after sbatch. The array index is the pack's number, whichever packs are
submitted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import CommandFunction, FailedSubmissionError

from run_contract.errors import UserError
from snakmodel.chain.plan import Plan
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Resources
from snakmodel.config.sbatch_options import options, pattern_of
from snakmodel.config.sections import PROJECT
from snakmodel.slurm.ask import BY_HAND, KEPT, LEAKS, my_elements, run_tool
from snakmodel.slurm.jobs import array_ranges
from snakmodel.slurm.journal import job_name, read_lines

_PARSABLE = re.compile(r"(\d+)(;\S+)?")
"""What sbatch --parsable prints: the job's id and, where there are several, the cluster's name."""
_STALLED_SECONDS = 180
"""sbatch is ended after this long; the controller alone makes it sleep 122 s where it has too many jobs."""


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's writer of batch files, for a command of our own."""

    wants_signal = False

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """The batch file; without --signal for commands that have nothing to save."""
        lines = super()._make_submission_file_text(command, uid).split("\n")
        return "\n".join(line for line in lines if self.wants_signal or not line.startswith("#SBATCH --signal="))

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        """An sbatch that cannot hang for ever."""
        return ["timeout", "--kill-after=5", str(_STALLED_SECONDS), "sbatch", "--parsable", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """The last line that is an id as --parsable prints it; a site's sbatch may print other text around it."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        ids = [match[1] for line in text.splitlines() if (match := _PARSABLE.fullmatch(line.strip()))]
        if not ids:
            raise FailedSubmissionError(f"sbatch printed no job id, but: {text.strip()!r}")
        return ids[-1]

    def text(self, command: str) -> str:
        """The batch file of a command."""
        return self._make_submission_file_text(command, "")

    def send(self, command: str) -> str:
        """Submit a command; return the job's id.

        Not by submitit's own `_submit_command`: it takes %j, %t, %A and %a in a folder's name for patterns.
        """
        path = self.folder / f"{uuid.uuid4().hex}.sh"
        path.write_bytes(os.fsencode(self.text(command)))
        output = CommandFunction(self._make_submission_command(path), verbose=False)()
        return self._get_job_id_from_submission_command(output)

    @classmethod
    def affinity(cls) -> int:
        """Batch files can be written (--dry-run) on a machine without Slurm."""
        return 2


def make_executor(
    plan: Plan,
    stage: Stage,
    folder: Path,
    packs: Sequence[int],
    dependency: str,
    token: str,
    running: int | None = None,
) -> _Executor:
    """A submitit executor with everything that the batch file of these packs says.

    `running`: how many may run at once by the account's or QOS's MaxJobs, where that is limited.
    """
    slurm = plan.config.cluster.slurm
    resources = plan.config.cluster.with_defaults(stage.resources)
    folder.mkdir(parents=True, exist_ok=True)
    executor = _Executor(folder)
    executor.wants_signal = stage.resumable
    log = f"{_pattern(plan.logs(stage.name))}/%5a.out"
    width = min(slurm.array_parallelism, len(packs), running or len(packs))
    additional: dict[str, Any] = {
        "array": f"{array_ranges(packs)}%{width}",
        "output": log,
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "clusters": slurm.clusters,
        **options(resources.sbatch_args or []),
        **_further(resources),
    }
    executor.update_parameters(
        **_parameters(resources),
        job_name=job_name(plan.paths, stage.name, token),
        comment=token,
        mail_type=slurm.mail_type,
        mail_user=slurm.mail_user,
        dependency=dependency or None,
        signal_delay_s=slurm.signal_seconds,
        setup=["trap : TERM", f"cd {shlex.quote(str(PROJECT))} || exit 1", *(resources.setup or [])],
        stderr_to_stdout=True,
        use_srun=False,
        wckey=resources.wckey,
        additional_parameters={name: value for name, value in additional.items() if value is not None},
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
        "mem_per_cpu": resources.mem_per_cpu,
        "gpus_per_node": resources.gpus_per_node or None,
        "gres": resources.gres,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
    }


def _further(resources: Resources) -> dict[str, Any]:
    """Resources that submitit has no parameter for, by sbatch's names."""
    return {
        "exclusive": resources.exclusive or None,
        "reservation": resources.reservation,
        "licenses": resources.licenses,
        "switches": resources.switches,
        "nice": resources.nice,
    }


def _pattern(folder: Path) -> str:
    """A folder of logs as sbatch takes it. Raises UserError."""
    try:
        return pattern_of(str(folder))
    except ValueError as error:
        raise UserError(
            f"the folder for logs cannot be named to Slurm: {error}. Give another --run-dir, or another `logs` in "
            "cluster.yaml."
        ) from None


def active_packs(plan: Plan, patience: float = 0.0) -> dict[str, dict[int, str]]:
    """Stage -> pack -> job, for every pack of this run that Slurm has queued or running.

    Raises UserError if Slurm is silent for `patience` seconds.
    """
    journal = read_submissions(plan.paths.submissions)
    if not journal:
        return {}
    by_hand: dict[str, list[Mapping[str, Any]]] = {}
    by_token = {line["token"]: line["stage"] for line in journal if not line["token"].startswith(BY_HAND)}
    for line in journal:
        if line["token"] not in by_token:
            by_hand.setdefault(line["job"], []).append(line)
    found: dict[str, dict[int, str]] = {}
    for job, index, name in my_elements(patience):
        stage = by_token.get(name.rpartition("-")[2])
        if stage and index is not None:  # by the token alone: the journal's id may be what a wrapper of sbatch said
            found.setdefault(stage, {})[index] = job
        for line in by_hand.get(job, ()):
            packs = line["packs"] if index is None else [index]
            found.setdefault(line["stage"], {}).update(dict.fromkeys(packs, job))
    return found


def read_submissions(path: Path) -> list[Mapping[str, Any]]:
    """The journal of a run's sbatch calls."""
    return list(read_lines(path))


def scrub_environment() -> None:
    """Drop the variables of a surrounding job, which sbatch would read as options."""
    for name in list(os.environ):
        if name.startswith(LEAKS) and name not in KEPT:
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
    asked = run_tool(["scontrol", "ping"])
    words = asked.stdout + asked.stderr
    if "failed to fetch config" in words or "configuration source" in words:
        return "local"
    if asked.returncode or "UP" not in words:
        raise UserError(
            f"there is a Slurm here, but its controller does not answer: {words.strip()}\n"
            "Wait for it, or say --scheduler local to run everything on this machine."
        )
    return "slurm"
