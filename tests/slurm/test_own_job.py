"""What a job learns of itself from accounting."""

from __future__ import annotations

import subprocess

import pytest

from snakmodel.run.attempts import Attempt
from snakmodel.slurm import own_job

ROWS = "2026-11-27T06:00:05|REQUEUED\n2026-11-27T05:00:00|PREEMPTED\nUnknown|PENDING\n2026-11-27T07:00:00|RUNNING\n"


@pytest.mark.parametrize(
    ("printed", "code", "restart", "state"),
    [
        (ROWS, 0, 0, "PREEMPTED"),
        (ROWS, 0, 1, "REQUEUED"),
        (ROWS, 0, 2, ""),
        (ROWS, 0, 3, ""),
        ("2026-11-27T05:00:00|CANCELLED by 1000\n", 0, 0, "CANCELLED"),
        ("2026-11-27T05:00:00|\n", 0, 0, ""),
        ("", 1, 0, ""),
        ("", 127, 0, ""),
    ],
)
def test_how_accounting_keeps_each_start(
    monkeypatch: pytest.MonkeyPatch, printed: str, code: int, restart: int, state: str
) -> None:
    """By the order of their beginnings; nothing is made up of what runs, has not begun, or is not known."""
    monkeypatch.setattr(own_job, "_ask", lambda *argv: subprocess.CompletedProcess(argv, code, printed, ""))
    assert own_job.accounted_end(Attempt("7", restart)) == state


def test_accounting_is_asked_again_until_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a row that still says RUNNING nor a slurmdbd that does not answer for a moment is its last word."""
    answers = [(0, "2026-11-27T05:00:00|RUNNING\n", ""), (1, "", "sacct: error: Connection refused")]
    answers += [(0, "2026-11-27T05:00:00|PREEMPTED\n", "")]

    def answer(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, *answers.pop(0))

    monkeypatch.setattr(own_job, "_ask", answer)
    monkeypatch.setattr(own_job.time, "sleep", lambda _: None)
    assert own_job.accounted_kind(Attempt("7", 0), patience=60) == "preempted"
    answers.append((1, "", "sacct: error: Slurm accounting storage is disabled"))
    assert own_job.accounted_kind(Attempt("7", 0), patience=60) == "restarted"
    assert answers == [], "without accounting it is asked once"
