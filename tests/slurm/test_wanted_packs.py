"""What is submitted, and what a continuation job gives up."""

from __future__ import annotations

from pathlib import Path

from snakmodel.slurm.journal import Journal, Submission
from snakmodel.slurm.wanted_packs import tried_packs, wanted_packs
from tests import toy


def test_queued_packs_are_not_submitted_again(tmp_path: Path) -> None:
    """Packs that are done are not missing, and packs that are queued or running are left alone."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path))
    plan.missing["first"].remove(2)
    wanted, given_up = wanted_packs(plan, {"first": {0: "17"}, "last": {0: "18"}}, set())
    assert wanted == {"first": [1], "second": [0, 1, 2], "last": []}
    assert given_up == {"first": set(), "second": set(), "last": set()}


def test_what_failed_in_this_series_is_given_up(tmp_path: Path) -> None:
    """A pack that was tried, is missing and not queued has failed; what waits for it is given up too."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path))
    tried = {("first", 0), ("first", 1)}
    wanted, given_up = wanted_packs(plan, {"first": {0: "17"}}, tried)
    assert wanted == {"first": [2], "second": [0, 2], "last": []}
    assert given_up == {"first": {1}, "second": {1}, "last": {0}}


def test_only_its_own_series_counts(tmp_path: Path) -> None:
    """The command of a user tries everything again, and a continuation job what its series has not tried."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path))
    journal = Journal(plan.paths)
    journal.accept(Submission("first", [0, 2], "", "aaa", "earlier", "17"))
    journal.accept(Submission("first", [1], "", "bbb", "now", "18"))
    journal.accept(Submission("second", [1], "", "ccc", "now", "19"))
    assert tried_packs(plan, "now") == {("first", 1), ("second", 1)}
    assert tried_packs(plan, "unknown") == set()
    assert tried_packs(plan, None) == set()
