"""Which account, QOS and limits hold for a job, from what sacctmgr says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snakmodel.config.cluster import Resources
from snakmodel.slurm.accounting import Accounting, AccountingPlace

ROW = dict.fromkeys(["Partition", "MaxSubmitJobs", "MaxJobs", "GrpSubmitJobs", "MaxWall"], "")
OWN = {**ROW, "DefaultAccount": "a", "Account": "a", "DefaultQOS": "", "MaxWall": "2:00:00"}
OTHER = {**OWN, "Account": "b", "DefaultQOS": "long", "MaxWall": ""}
BIG = {**OTHER, "Partition": "big", "MaxWall": "4-00:00:00"}
QOS = {name: {"Name": name, "MaxWall": wall} for name, wall in (("normal", ""), ("long", "7-00:00:00"), ("p", "30:00"))}
FOUND = Accounting("me", [OWN, OTHER, BIG], QOS, {"short": "p"}, "cpu", {})


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({}, AccountingPlace("a", "normal", "cpu", "")),
        ({"account": "b"}, AccountingPlace("b", "long", "cpu", "")),
        ({"qos": "long", "partition": "short,cpu"}, AccountingPlace("a", "long", "short", "p")),
    ],
)
def test_place(asked: dict[str, str], place: AccountingPlace) -> None:
    """What a stage names, else the user's default account, that association's default QOS, the default partition."""
    assert FOUND.place(Resources.model_validate(asked)) == place


@pytest.mark.parametrize(
    ("place", "wall"),
    [
        (AccountingPlace("a", "normal", "cpu", ""), ("2:00:00", "account a")),
        (AccountingPlace("a", "long", "cpu", ""), ("7-00:00:00", "QOS long")),
        (AccountingPlace("a", "long", "short", "p"), ("30:00", "QOS p")),
        (AccountingPlace("b", "normal", "cpu", ""), None),
        (AccountingPlace("b", "normal", "big", ""), ("4-00:00:00", "account b")),
    ],
)
def test_max_wall(place: AccountingPlace, wall: tuple[str, str] | None) -> None:
    """The partition's QOS goes before the job's, a QOS before the association, of which one partition's is its own."""
    assert FOUND.max_wall(place) == wall


def test_nobody_known() -> None:
    """A user without associations has no account, and no limit of one."""
    empty = replace(FOUND, associations=[])
    assert empty.place(Resources()) == AccountingPlace("", "normal", "cpu", "")
    assert empty.max_wall(empty.place(Resources())) is None
