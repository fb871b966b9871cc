"""How much fits into the queue, and what is done when it is not enough."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from run_contract.errors import UserError
from snakmodel.slurm import room
from snakmodel.slurm.jobs import CONTINUATION
from snakmodel.slurm.limits import Limit, Limits
from snakmodel.slurm.room import QueueRoom, Room

TODO = {"first": list(range(60)), "second": list(range(60)), "last": [0]}


def limits(most: int, used: int = 0, *more: Limit, array_tasks: int = 1001) -> Limits:
    return Limits(1001, array_tasks, (Limit("MaxSubmit", most, used), *more), (), 10.0)


def queue(now: Limits | None, **kind: bool) -> QueueRoom:
    def unexpected() -> Limits:
        raise AssertionError("the limits were read again")

    return QueueRoom(unexpected, limits=now, **kind)


def find(where: QueueRoom, continuation_is_queued: bool = False) -> Room:
    return where.find(TODO, continuation_is_queued=continuation_is_queued)


def test_room_shrinks_with_every_submission() -> None:
    """A limit counts the jobs of its own stages only, and an array is bounded by max_array_tasks too."""
    own = Limit("MaxSubmit of QOS long", 10, 2, frozenset(["first"]))
    found = Room(limits(100, 30, own, array_tasks=5))
    assert (found.of("first"), found.of("second")) == (8, 70)
    assert (found.array_of("first"), found.array_of("second")) == (5, 5)
    assert str(found.tightest("first")) == "MaxSubmit of QOS long = 10, 2 of it in use"
    found.take("first", 6)
    assert (found.of("first"), found.array_of("first"), found.of("second")) == (2, 2, 64)
    assert found.holds({"first": [0, 1], "second": [1] * 62})
    assert not found.holds({"first": [0, 1, 2]})
    assert not found.holds({"first": [0, 1], "second": [1] * 63})


def test_without_limits_there_is_room_for_everything() -> None:
    """A dry run asks nobody, and submits all."""
    found = find(queue(None))
    assert (found.of("first"), found.array_of("first"), found.width("first")) == (sys.maxsize, sys.maxsize, None)


def test_all_fits() -> None:
    """Nothing is kept free for a continuation job that is not needed."""
    assert find(queue(limits(121))).of("first") == 121


def test_a_place_is_kept_for_the_continuation_job() -> None:
    """Unless such a job is queued already, or this process stays to submit the rest."""
    assert find(queue(limits(20), can_continue=True)).of("first") == 19
    assert find(queue(limits(20), can_continue=True), True).of("first") == 20
    assert find(queue(limits(20), stays=True)).of("first") == 20


def test_room_for_one_pack_is_enough() -> None:
    """One pack and the continuation job fit into two places; with a place less nothing is submitted."""
    assert find(queue(limits(20, 18), can_continue=True)).of("first") == 1
    with pytest.raises(UserError, match=r"^no room in the queue: MaxSubmit = 20, 19 of it in use; 121 packs are left"):
        find(queue(limits(20, 19), can_continue=True))


def test_what_does_not_fit_needs_a_way_to_continue() -> None:
    """Without a command that submits the rest, a part of the chain is not submitted either."""
    with pytest.raises(UserError, match=r"does not fit into the queue: MaxSubmit = 20, 0 .* Add --wait-for-room"):
        find(queue(limits(20)))


@pytest.mark.parametrize("kind", [{}, {"stays": True}, {"continues": True}])
def test_a_limit_that_is_too_small(kind: dict[str, bool]) -> None:
    """Nobody waits for room that can never be there."""
    most = 0 if kind.get("stays") else 1
    with pytest.raises(UserError, match="too small for a chain of jobs: ask for a larger one"):
        find(queue(limits(most), can_continue=True, **kind))


def waiting(monkeypatch: pytest.MonkeyPatch, *later: Limits, **kind: bool) -> tuple[QueueRoom, Callable[[], int]]:
    """A queue whose limits change each time they are read, and the number of times that was waited."""
    slept: list[float] = []
    monkeypatch.setattr(room.time, "sleep", slept.append)
    left = iter(later)
    where = QueueRoom(lambda: next(left), can_continue=True, **kind)
    where.update()
    return where, lambda: len(slept)


def test_a_continuation_job_waits_for_one_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it waits for, once as long as that stays the same."""
    full = limits(20, 20)
    where, waits = waiting(monkeypatch, full, full, limits(20, 19), limits(20, 18), continues=True)
    found = find(where)
    assert (found.of("first"), found.taken, waits()) == (1, {"MaxSubmit": 1}, 3)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for room: MaxSubmit = 20, 20 of it in use; 121 packs are left to submit",
        "waiting for room: MaxSubmit = 20, 19 of it in use; 121 packs are left to submit",
    ]


def test_a_launcher_that_stays_waits_for_a_quarter_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few larger arrays are better than many small ones; less is enough where less is left."""
    where, waits = waiting(monkeypatch, limits(20, 16), limits(20, 15), stays=True)
    assert (find(where).of("first"), waits()) == (5, 1)
    where, waits = waiting(monkeypatch, limits(20, 18), stays=True)
    assert (where.find({"last": [0]}, continuation_is_queued=False).of("last"), waits()) == (2, 0)


def test_continuation_counts_against_its_own_limits_only() -> None:
    """Where the continuation job falls under a different limit, it takes nothing from the stage's."""
    own = Limit("MaxSubmit of QOS long", 10, 0, frozenset(["first"]))
    both = Limit("MaxSubmit of QOS short", 3, 0, frozenset(["second", CONTINUATION]))
    found = find(queue(limits(10_000, 0, own, both), can_continue=True))
    assert (found.of("first"), found.of("second")) == (10, 2)
