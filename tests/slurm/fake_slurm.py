"""A Slurm in memory: it accepts what sbatch is given, and answers squeue, sacct, scontrol and scancel."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Sequence
from subprocess import CompletedProcess
from typing import Any

import pytest

from snakmodel.slurm import ask, batch_file
from snakmodel.slurm.jobs import _expand


class FakeSlurm:
    """What the controller and accounting know, and what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 10_000) -> None:
        self.most = most
        """MaxJobCount."""
        self.next_id = 100
        self.jobs: dict[str, str] = {}
        """Id -> name, of all jobs that squeue lists."""
        self.elements: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.accounted: dict[str, str] = {}
        """Id -> name, of jobs that only sacct knows."""
        self.texts: dict[str, str] = {}
        """Id -> batch file."""
        self.calls: list[list[str]] = []
        self.answers = True
        self.slept: list[float] = []
        self.sbatch = self.accept
        """What a call of sbatch does with the text of a batch file."""
        monkeypatch.setattr(ask, "run_tool", self._run_tool)
        monkeypatch.setattr(batch_file._Executor, "send", lambda own, command: self.sbatch(own.text(command)))
        monkeypatch.setattr(time, "sleep", self.slept.append)

    def accept(self, text: str) -> str:
        """Accept a batch file; returns the job's id."""
        job, self.next_id = str(self.next_id), self.next_id + 1
        self.jobs[job] = option(text, "job-name")
        self.elements[job] = _expand(option(text, "array"))
        self.texts[job] = text
        return job

    def forget(self, job: str) -> None:
        """Forget a job, as a controller does that has lost its state."""
        del self.jobs[job], self.elements[job]

    def end(self, *jobs: str) -> None:
        """Let jobs end; squeue still lists them."""
        self.ended |= set(jobs)

    def submitted(self) -> list[tuple[str, str, str]]:
        """Stage, array indices and dependency of all that was ever accepted."""
        return [
            (option(text, "job-name").split("-")[1], option(text, "array").split("%")[0], option(text, "dependency"))
            for text in self.texts.values()
        ]

    def _run_tool(self, argv: Sequence[str], **_: Any) -> CompletedProcess[str]:
        self.calls.append(list(argv))
        if not self.answers:
            return CompletedProcess(argv, 1, "", "Unable to contact slurm controller")
        return CompletedProcess(argv, 0, "\n".join(self._answer(argv)), "")

    def _answer(self, argv: Sequence[str]) -> list[str]:
        words = " ".join(argv)
        if words == "scontrol show config":
            return [f"MaxJobCount = {self.most}", "MaxArraySize = 1001", "MessageTimeout = 10 sec"]
        if argv[0] == "sacct":
            wanted = words.split("--name=")[1].split()[0].split(",")
            return [f"{job}_0|{name}" for job, name in self.accounted.items() if name in wanted]
        if argv[0] == "scancel":
            for job in argv[1:]:
                self.forget(job)
            return []
        state = {job: "COMPLETED" if job in self.ended else "PENDING" for job in self.jobs}
        if "%F|%j" in words:
            return [f"{job}|{name}" for job, name in self.jobs.items()]
        if "%F|%K|%T|%j" in words:
            return [f"{job}|{index}|{state[job]}|{self.jobs[job]}" for job in self.jobs for index in self.elements[job]]
        assert "%u|%a|%q|%P|%T" in words, words
        return [f"{getpass.getuser()}|a|q|p|{state[job]}" for job in self.jobs for _ in self.elements[job]]


def option(text: str, name: str) -> str:
    """The value of an option in a batch file; empty if it is not there."""
    found = re.search(rf"^#SBATCH --{name}=(.*)$", text, re.MULTILINE)
    return found[1] if found else ""
