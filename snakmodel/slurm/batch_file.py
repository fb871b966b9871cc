"""Batch files, written by submitit: job arrays with stable indices, and logs that are appended to.

The command in a batch file is the project's own driver with a task list. So no pickles are involved, and a job needs
nothing that happens after sbatch. The array index is always the pack's number, whichever packs are submitted.
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
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Resources
from snakmodel.config.sbatch_options import options, pattern_of
from snakmodel.config.sections import PROJECT
from snakmodel.slurm.ask import BY_HAND, KEPT, LEAKS, my_elements, run_tool
from snakmodel.slurm.jobs import array_ranges
from snakmodel.slurm.journal import job_name, read_lines

_PARSABLE = re.compile(r"(\d+)(;\S+)?")
"""What sbatch --parsable prints: the job's id and, where there are several clusters, the cluster's name."""
_STALLED_SECONDS = 180
"""Seconds after which sbatch is ended; a controller with too many jobs is enough to make sbatch sleep for 122 s."""


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's writer of batch files, adapted to a command of our own."""

    wants_signal = False

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """The text of the batch file, without --signal for commands that have nothing to save."""
        lines = super()._make_submission_file_text(command, uid).split("\n")
        return "\n".join(line for line in lines if self.wants_signal or not line.startswith("#SBATCH --signal="))

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        """The sbatch command, inside `timeout`, so that it cannot hang for ever."""
        return ["timeout", "--kill-after=5", str(_STALLED_SECONDS), "sbatch", "--parsable", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """The id in the last line that is one as --parsable prints it; a site's sbatch may print more around it."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        ids = [match[1] for line in text.splitlines() if (match := _PARSABLE.fullmatch(line.strip()))]
        if not ids:
            raise FailedSubmissionError(f"sbatch printed no job id, but: {text.strip()!r}")
        return ids[-1]

    def text(self, command: str) -> str:
        """The text of the batch file that runs a command."""
        return self._make_submission_file_text(command, "")

    def send(self, command: str) -> str:
        """Submit a command and return the job's id.

        submitit's own `_submit_command` is not used, because it takes %j, %t, %A and %a in a folder's name for
        patterns.
        """
        path = self.folder / f"{uuid.uuid4().hex}.sh"
        path.write_bytes(os.fsencode(self.text(command)))
        output = CommandFunction(self._make_submission_command(path), verbose=False)()
        return self._get_job_id_from_submission_command(output)

    @classmethod
    def affinity(cls) -> int:
        """Tell submitit that Slurm is there, so that --dry-run can write batch files on a machine without Slurm."""
        return 2


def make_executor(
    plan: RunPlan,
    stage: Stage,
    folder: Path,
    packs: Sequence[int],
    dependency: str,
    token: str,
    running: int | None = None,
) -> _Executor:
    """A submitit executor that holds everything the batch file of these packs says.

    `running` is how many of them may run at the same time by MaxJobs of the account or the QOS, where that is limited.
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
    """The resources under submitit's parameter names."""
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
    """The resources for which submitit has no parameter, under the names of sbatch's options."""
    return {
        "exclusive": resources.exclusive or None,
        "reservation": resources.reservation,
        "licenses": resources.licenses,
        "switches": resources.switches,
        "nice": resources.nice,
    }


def _pattern(folder: Path) -> str:
    """The folder of logs in the spelling that sbatch expects. Raises UserError if sbatch cannot express it."""
    try:
        return pattern_of(str(folder))
    except ValueError as error:
        raise UserError(
            f"the folder for logs cannot be named to Slurm: {error}. Give another --run-dir, or another `logs` in "
            "cluster.yaml."
        ) from None


def active_packs(plan: RunPlan, patience: float = 0.0) -> dict[str, dict[int, str]]:
    """The job of every pack of this run that is queued or running in Slurm, by stage and pack.

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
        if stage and index is not None:  # only the token counts: the journal's id may come from a wrapper of sbatch
            found.setdefault(stage, {})[index] = job
        for line in by_hand.get(job, ()):
            packs = line["packs"] if index is None else [index]
            found.setdefault(line["stage"], {}).update(dict.fromkeys(packs, job))
    return found


def read_submissions(path: Path) -> list[Mapping[str, Any]]:
    """The journal of a run's sbatch calls."""
    return list(read_lines(path))


def scrub_environment() -> None:
    """Remove the variables of a surrounding job and of the user's own defaults, which sbatch would read as options."""
    for name in list(os.environ):
        if name.startswith(LEAKS) and name not in KEPT:
            del os.environ[name]


def choose(scheduler: str) -> str:
    """Resolve `auto` to a scheduler: `local` only where there is no sbatch or no Slurm configuration.

    Raises UserError if SLURM_CONF names a file that does not exist, or if the controller does not answer.
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
