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
    ],
)
def test_how_accounting_keeps_each_start(
    monkeypatch: pytest.MonkeyPatch, printed: str, code: int, restart: int, state: str
) -> None:
    """By the order of their beginnings; nothing is made up of what runs, has not begun, or is not known."""
    monkeypatch.setattr(own_job, "_ask", lambda *argv: subprocess.CompletedProcess(argv, code, printed, ""))
    assert own_job.accounted_end(Attempt("7", restart)) == state
