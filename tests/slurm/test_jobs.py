"""Which jobs belong to a run, and how Slurm spells array indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from snakmodel.slurm.jobs import Job, Owner, _records, array_ranges


@pytest.mark.parametrize(
    ("packs", "text"), [([5], "5"), ([0, 1, 2, 7], "0-2,7"), ([3, 2, 9, 8], "2-3,8-9"), (range(10000), "0-9999")]
)
def test_array_ranges(packs: Sequence[int], text: str) -> None:
    """Numbers become Slurm's ranges, in order."""
    assert array_ranges(packs) == text


@pytest.mark.parametrize(
    ("job", "indices"),
    [("10", [None]), ("10_3", [3]), ("10_[0-2,7%4]", [0, 1, 2, 7]), ("10_[5]", [5])],
)
def test_one_record_may_stand_for_many_elements(job: str, indices: list[int | None]) -> None:
    """Elements that never started share a record of accounting."""
    found = _records(job, "CANCELLED by 1000", "None", "None assigned", "run-first-aaa")
    assert [(one.array, one.index, one.state, one.node) for one in found] == [
        ("10", i, "CANCELLED", "") for i in indices
    ]


def test_owner(tmp_path: Path) -> None:
    """A job is known by its token, by its id if it was submitted by hand, or by the folder of its batch file."""
    journal = [
        {"token": "aaa", "stage": "first", "job": "10", "packs": [0, 1]},
        {"token": "hand-1", "stage": "second", "job": "11", "packs": [0, 1]},
        {"token": "hand-1", "stage": "last", "job": "11", "packs": [0]},
    ]
    owner = Owner.of(tmp_path, journal)

    def work(array: str, index: int | None, name: str, command: str = "") -> list[tuple[str, int | None]]:
        return owner.work(Job(array, index, "RUNNING", "", "node1", name, command))

    assert work("99", 1, "run-first-aaa") == [("first", 1)]
    assert work("11", None, "step 2") == [("second", 0), ("second", 1), ("last", 0)]
    assert work("11", 1, "step 2") == [("second", 1), ("last", 1)]
    assert work("12", 3, "run-third-bbb", f"{tmp_path}/sbatch/third/x.sh") == [("third", 3)]
    assert work("10", 0, "run-first-stranger", "/elsewhere/sbatch/first/x.sh") == []
