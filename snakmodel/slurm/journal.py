"""Makes every submission exactly one job, whatever becomes of sbatch, the controller or the launcher.

Before each sbatch call, intents.jsonl gets a line with a token; after the call, submissions.jsonl gets a line with the
job's id. The token is part of the job's name and comment. Where the second line is missing, Slurm is asked for the
token, first through squeue and then through sacct. When the search fails, the answer is unknown. Only two answers
without the job, with a message timeout between them, mean that there is no job.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from run_contract.errors import UserError
from snakmodel.run.attempts import log_event
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.ask import CLUSTER_VARIABLE, accounted_jobs, ask, my_jobs

SBATCH_FAILURES = (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError)
_TRIES = 3
_REFUSED = "Batch job submission failed:"
_PASSING = ("timed out", "Unable to contact", "Connection refused", "Zero Bytes", "temporarily", "Communication")
"""Words of failures that may pass by themselves, even if Slurm says that the submission failed."""


@dataclass
class Submission:
    """One sbatch call."""

    stage: str
    packs: list[int]
    dependency: str
    token: str
    series: str = ""
    """Token of the command that the user typed; the continuation jobs of a series do not retry what failed in it."""
    job: str = ""
    """The job's id; empty until Slurm has accepted it."""
    accepted: float = 0.0
    """When Slurm accepted it, by this process's monotonic clock."""


def job_name(paths: RunPaths, stage: str, token: str) -> str:
    """The name of a submission's job. Only its token matters, so characters that break lists of names are replaced."""
    name = re.sub(r"[^\w.+@%=-]", "_", paths.name)
    return f"{name}-{stage}-{token}"


class Refused(UserError):
    """Slurm did not accept a submission, and it certainly has no job for it."""


class Journal:
    """The record of a run's sbatch calls, and the way to make such a call."""

    def __init__(self, paths: RunPaths, message_timeout: float = 10.0, patience: float = 600.0) -> None:
        self.paths = paths
        self.message_timeout = message_timeout
        self.patience = patience

    def submit(self, one: Submission, send: Callable[[], str]) -> None:
        """Call sbatch through `send`, which returns the job's id, and put the id into `one`.

        Raises Refused when Slurm does not accept the job, and Unanswered when Slurm does not say whether it has the
        job.
        """
        self._intend(one)
        for left in reversed(range(_TRIES)):
            try:
                one.job = send()
                break
            except SBATCH_FAILURES as error:
                words = str(error).strip()
                final = _REFUSED in words and not any(word in words for word in _PASSING)
                one.job = self._look_for(one, words, twice=not final)
                if one.job:
                    break
                if final or not left:
                    _append(self.paths.intents, {"token": one.token, "absent": True})
                    raise Refused(words) from error
        self.accept(one)

    def _look_for(self, one: Submission, words: str, *, twice: bool) -> str:
        """The id of the job that a failed sbatch call has left, or an empty string if there is none."""
        print(f"sbatch for stage {one.stage} failed; looking for its job: {words}", file=sys.stderr, flush=True)
        found = self._search([one], time.time(), twice=twice).get(one.token, "")
        print(f"stage {one.stage}: {f'accepted as {found}' if found else 'no job'}", file=sys.stderr, flush=True)
        return found

    def settle(self) -> list[Submission]:
        """Adopt the jobs of a launcher that ended between an sbatch call and the journal's line for it; return them."""
        known = {one["token"] for one in read_lines(self.paths.submissions)}
        lines = read_lines(self.paths.intents)
        known |= {line["token"] for line in lines if "absent" in line}
        open_ = {line["token"]: line for line in lines if line["token"] not in known}
        if not open_:
            return []
        waiting = [Submission(**line["submission"]) for line in open_.values()]
        found = self._search(waiting, min(line["at"] for line in open_.values()), twice=True)
        for one in waiting:
            one.job = found.get(one.token, "")
            if one.job:
                print(f"adopted job {one.job} (stage {one.stage}): an earlier launcher submitted it", flush=True)
                self.accept(one)
            else:
                _append(self.paths.intents, {"token": one.token, "absent": True})
        return [one for one in waiting if one.job]

    def _search(self, wanted: Sequence[Submission], since: float, *, twice: bool) -> dict[str, str]:
        """The jobs of these submissions, by token, for those of which Slurm has or had a job."""
        names = {job_name(self.paths, one.stage, one.token): one.token for one in wanted}
        day = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
        found: dict[str, list[str]] = {}
        for is_first in (True, False):
            jobs = my_jobs(self.patience)
            listed = {name.rpartition("-")[2] for name in jobs.values()}
            missing = [name for name, token in names.items() if token not in listed]
            jobs |= accounted_jobs(missing, day, self.patience) if missing else {}
            found = {}
            for job, name in jobs.items():
                token = name.rpartition("-")[2]
                if token in names.values():
                    found.setdefault(token, []).append(job)
            if len(found) == len(names) or not twice:
                break
            if is_first:
                time.sleep(self.message_timeout)
        return {token: self._one_of(jobs) for token, jobs in found.items()}

    def _one_of(self, jobs: Sequence[str]) -> str:
        """The first of the jobs that carry the same token; the others are cancelled."""
        first, *others = sorted(jobs, key=int)
        if others:
            ask(["scancel", *others], self.patience)
        return first

    def _intend(self, one: Submission) -> None:
        """Write down that sbatch is about to be called."""
        _append(self.paths.intents, {"token": one.token, "at": time.time(), "submission": asdict(one)})

    def accept(self, one: Submission) -> None:
        """Write into the journal and the events that Slurm has the job."""
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": one.stage, "job": one.job, "packs": one.packs}
        rest = {"dependency": one.dependency, "token": one.token, "series": one.series}
        cluster = {"cluster": name} if (name := os.environ.get(CLUSTER_VARIABLE)) else {}
        _append(self.paths.submissions, {**stamp, **rest, **cluster})
        log_event(self.paths.root, one.stage, "submit", job=one.job, packs=len(one.packs), dependency=one.dependency)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line that survives a crash of the machine; a line that a killed launcher left unfinished is closed."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            broken = file.read(1) != b"\n"
        else:
            broken = False
        file.write((b"\n" if broken else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last line that a killed launcher left unfinished is skipped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
