"""Exit records, what they mean together, and when a job is started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from snakmodel.attempts import Attempt, ExitRecord, Outcome, Summary, decide, outcome, take_claim


def records(*codes: int | None) -> list[ExitRecord | None]:
    return [None if code is None else ExitRecord("1.r0", rank, code, None, "n", 0.0) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "signalled", "expected"),
    [
        ((0, 0), False, "done"),
        ((75, 75), False, "again"),
        ((76, 75), False, "stopped"),
        ((0, 75), False, "crashed"),
        ((75, 1), False, "crashed"),
        ((75, 1), True, "crashed"),
        ((0, None), False, "crashed"),
        ((-signal.SIGKILL,), False, "crashed"),
        ((-signal.SIGTERM, None), True, "interrupted"),
        ((-signal.SIGTERM,), False, "crashed"),
        ((75, 75), True, "again"),
        ((3,), False, "refused"),
        ((2, -signal.SIGTERM), False, "refused"),
    ],
)
def test_outcome(codes: tuple[int | None, ...], signalled: bool, expected: Outcome) -> None:
    """All ranks' codes together decide; a crash is not hidden by peers that saved."""
    assert outcome(records(*codes), signalled) == expected


def summaries(*pairs: tuple[Outcome, bool]) -> list[Summary]:
    return [Summary(f"1.r{number}", found, progressed) for number, (found, progressed) in enumerate(pairs)]


def again(*pairs: tuple[Outcome, bool]) -> bool:
    *past, now = summaries(*pairs)
    return decide(past, now, without_progress=3, crashes=2).again


def test_progress_is_free() -> None:
    """A job that gets further is started again however often."""
    assert again(*[("again", True)] * 500)


def test_budget_without_progress() -> None:
    """Three attempts in a row without progress end it; one with progress starts the count anew."""
    assert again(("again", False), ("interrupted", False))
    assert not again(("again", False), ("interrupted", False), ("crashed", False))
    assert again(("again", False), ("again", False), ("again", True), ("again", False), ("crashed", False))


def test_crash_limit_although_progressing() -> None:
    """Crashes are limited even when each attempt got further."""
    assert again(("crashed", True), ("again", True), ("crashed", True))
    assert not again(("crashed", True), ("again", True), ("crashed", True), ("crashed", True))


@pytest.mark.parametrize("final", ["done", "stopped", "refused"])
def test_no_retry(final: Outcome) -> None:
    """Done, stopped on request and refused are never started again."""
    assert not again((final, True))


def test_claim_is_not_taken_back_by_an_older_start(tmp_path: Path) -> None:
    """A later start of a job replaces an earlier one, never the other way round."""
    claim = tmp_path / "claim.json"
    assert take_claim(claim, Attempt("7_0", 0))
    assert take_claim(claim, Attempt("7_0", 1))
    assert not take_claim(claim, Attempt("7_0", 0))
    assert json.loads(claim.read_text())["attempt"] == "7_0.r1"
    assert take_claim(claim, Attempt("8_0", 0))
