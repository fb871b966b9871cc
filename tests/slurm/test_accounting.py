"""Which account, QOS and limits hold for a job, from what sacctmgr says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snakmodel.config.cluster import Resources
from snakmodel.slurm.accounting import Accounting, Place

ROW = dict.fromkeys(["Partition", "MaxSubmitJobs", "MaxJobs", "GrpSubmitJobs", "MaxWall"], "")
OWN = {**ROW, "DefaultAccount": "a", "Account": "a", "DefaultQOS": "", "MaxWall": "2:00:00"}
OTHER = {**OWN, "Account": "b", "DefaultQOS": "long", "MaxWall": ""}
BIG = {**OTHER, "Partition": "big", "MaxWall": "4-00:00:00"}
QOS = {name: {"Name": name, "MaxWall": wall} for name, wall in (("normal", ""), ("long", "7-00:00:00"), ("p", "30:00"))}
FOUND = Accounting("me", [OWN, OTHER, BIG], QOS, {"short": "p"}, "cpu", {})


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({}, Place("a", "normal", "cpu", "")),
        ({"account": "b"}, Place("b", "long", "cpu", "")),
        ({"qos": "long", "partition": "short,cpu"}, Place("a", "long", "short", "p")),
    ],
)
def test_place(asked: dict[str, str], place: Place) -> None:
    """What a stage names, else the user's default account, that association's default QOS, the default partition."""
    assert FOUND.place(Resources.model_validate(asked)) == place


@pytest.mark.parametrize(
    ("place", "wall"),
    [
        (Place("a", "normal", "cpu", ""), ("2:00:00", "account a")),
        (Place("a", "long", "cpu", ""), ("7-00:00:00", "QOS long")),
        (Place("a", "long", "short", "p"), ("30:00", "QOS p")),
        (Place("b", "normal", "cpu", ""), None),
        (Place("b", "normal", "big", ""), ("4-00:00:00", "account b")),
    ],
)
def test_max_wall(place: Place, wall: tuple[str, str] | None) -> None:
    """The partition's QOS goes before the job's, a QOS before the association, of which one partition's is its own."""
    assert FOUND.max_wall(place) == wall


def test_nobody_known() -> None:
    """A user without associations has no account, and no limit of one."""
    empty = replace(FOUND, associations=[])
    assert empty.place(Resources()) == Place("", "normal", "cpu", "")
    assert empty.max_wall(empty.place(Resources())) is None
