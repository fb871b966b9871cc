"""Exit records, what they mean together, and when a job is started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from run_contract.errors import UserError
from run_contract.publish import write_json
from snakmodel.config.cluster import Cluster
from snakmodel.run.attempts import (
    Attempt,
    ExitRecord,
    Kind,
    Outcome,
    Summary,
    bad_nodes,
    culprits,
    decide,
    history,
    outcome,
    take_claim,
)
from snakmodel.slurm.own_job import JobState


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


def record(code: int, signalled: str = "SIGTERM", hung: bool = False, node: str = "n") -> ExitRecord:
    return ExitRecord("1.r0", 0, code, None, node, 0.0, signalled, hung)


def test_ranks_that_slurm_signalled_to_leave_are_no_crash() -> None:
    """Ended by a signal that reached every rank's parent: interrupted. A peer that failed or was lost: a crash."""
    assert outcome([record(-signal.SIGUSR2, "SIGUSR2"), record(75)], False) == "interrupted"
    assert outcome([record(75), None], False) == "crashed"
    assert outcome([record(75), record(1)], False) == "crashed"
    assert outcome([record(75), record(-signal.SIGTERM, "")], False) == "crashed"
    assert outcome([record(-signal.SIGTERM, hung=True)], False) == "crashed"


def test_culprits_are_the_ranks_that_failed_by_themselves() -> None:
    """Not those that ended because a peer had failed."""
    assert culprits([record(75, node="a"), record(1, "", node="b"), record(-15, node="c")]) == ["b"]
    assert culprits([record(-6, hung=True, node="a"), None]) == ["a"]


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


def by_kind(*pairs: tuple[Kind, bool]) -> tuple[bool, str]:
    """The verdict on attempts that were interrupted for these reasons, and whether each got further."""
    *past, now = [Summary(f"1.r{n}", "interrupted", progressed, kind) for n, (kind, progressed) in enumerate(pairs)]
    verdict = decide(past, now, without_progress=3, crashes=2)
    return verdict.again, verdict.reason


def test_attempts_that_were_signalled_to_stop_too_early() -> None:
    """They use up no budget, but three in a row mean that the limit is too short; a preemption neither counts nor ends
    the row."""
    assert by_kind(("crash", False), ("timeout", False), ("timeout", False), ("crash", False))[0]
    assert by_kind(("timeout", False), ("timeout", True), ("timeout", False), ("timeout", False))[0]
    again, reason = by_kind(("timeout", False), ("preempted", False), ("requested", False), ("timeout", False))
    assert not again
    assert reason.startswith("time limit too short: 3 attempts in a row")
    assert by_kind(*[("preempted", False)] * 50)[0]


def test_a_cancelled_job_is_not_started_again() -> None:
    """Even if it got further."""
    assert by_kind(("cancelled", True)) == (False, "cancelled")


def test_history_is_read_from_the_starts(tmp_path: Path) -> None:
    """What ranks saved after their driver's end counts for them; one without a summary was lost with its node."""
    for restart, progress in ((0, 0), (1, 4), (2, 4)):
        write_json(tmp_path / f"7_0.r{restart}" / "start.json", {"progress": progress, "node": f"node{restart}"})
    Summary("7_0.r0", "interrupted", False, "timeout").write(tmp_path / "7_0.r0")
    Summary("7_0.r2", "crashed", True, "crash", ["node1"]).write(tmp_path / "7_0.r2")
    found = history(tmp_path, Attempt("7_0", 3), progress=4)
    assert [(one.outcome, one.kind, one.progressed) for one in found] == [
        ("interrupted", "timeout", True),
        ("lost", "node-failure", False),
        ("crashed", "crash", False),
    ]
    assert bad_nodes(found) == ["node1"]
    assert bad_nodes(found[:2]) == []


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"JobState": "COMPLETING", "Reason": "TimeLimit", "PreemptTime": "None", "Restarts": "1"}, "timeout"),
        ({"JobState": "COMPLETING", "Reason": "None", "PreemptTime": "None", "Restarts": "1"}, "cancelled"),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-11-23T01:19:17", "Restarts": "2"}, "preempted"),
        ({"JobState": "RUNNING", "EndTime": "2099-01-01T00:00:00", "Restarts": "1"}, "requested"),
        ({"JobState": "RUNNING", "EndTime": "2001-01-01T00:00:00", "Restarts": "1"}, "timeout"),
    ],
)
def test_why_a_job_is_ended(fields: dict[str, str], kind: Kind) -> None:
    """The controller's answers, as seen on 22.05, to a job's second start."""
    assert JobState(fields).kind(Attempt("7_0", 1), 5) == kind


def test_a_time_limit_without_room_for_two_steps_is_refused() -> None:
    """Notice, Slurm's earliness and start-up have to fit; two minutes do with a short notice."""
    with pytest.raises(UserError, match=r"stages\.train\.minutes: 2 is too short.*at least 4 minutes"):
        Cluster.model_validate({"defaults": {"minutes": 2}}).check_time_limit("train")
    Cluster.model_validate({"defaults": {"minutes": 2}, "slurm": {"signal_seconds": 30}}).check_time_limit("train")
    Cluster().check_time_limit("train")


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
