"""Which jobs a pack waits for, and which jobs Slurm still knows, without a Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from snakmodel.chain.stage import Chain, Input, Stage
from snakmodel.slurm.job_table import JobTable, LookUp, WrongId
from snakmodel.slurm.journal import Submission
from tests import toy


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """`second` waits for `first` pack by pack, and `last` for the whole of `second`."""
    return Chain.of(tmp_path, toy.two_stages(tmp_path, 4))


def submission(stage: str, packs: list[int], token: str, job: str) -> Submission:
    return Submission(stage, packs, "", token, job=job)


def test_nothing_to_wait_for(chain: Chain) -> None:
    """Packs whose inputs are done, or that read nothing, need no dependency."""
    table = JobTable()
    assert table.group_by_dependency(chain["first"], [0, 2]) == {"": [0, 2]}
    assert table.group_by_dependency(chain["second"], [1, 3]) == {"": [1, 3]}
    assert table.group_by_dependency(chain["last"], [0]) == {"": [0]}


def test_dependencies(chain: Chain) -> None:
    """`aftercorr` on what is submitted now, `afterok` on what was queued before and on whole stages, else nothing."""
    table = JobTable({"first": {1: "7"}, "second": {2: "8"}})
    table.enter(submission("first", [0, 3], "token", "9"))
    assert table.group_by_dependency(chain["second"], [0, 1, 2, 3]) == {
        "aftercorr:9": [0, 3],
        "afterok:7": [1],
        "": [2],
    }
    table.enter(submission("second", [0, 3], "other", "10"))
    assert table.group_by_dependency(chain["last"], [0]) == {"afterok:10,afterok:8": [0]}


def test_a_stage_that_waits_in_both_ways(chain: Chain, tmp_path: Path) -> None:
    """All dependencies of a pack are named, the whole stages first."""
    reads = [toy.task(tmp_path, f"d/{i}.txt", inputs=[Input("last"), Input("second", i)]) for i in range(4)]
    both = Stage("both", tuple(reads), chain["last"].resources)
    table = JobTable({"last": {0: "5"}, "second": {1: "6"}})
    found = Chain.of(tmp_path, [*toy.two_stages(tmp_path, 4), both])["both"]
    assert table.group_by_dependency(found, [0, 1]) == {"afterok:5": [0], "afterok:5,afterok:6": [1]}


def test_everything_submitted_is_waited_for(chain: Chain) -> None:
    """A continuation job waits for the end of each job that is still in the table."""
    table = JobTable({"first": {3: "7"}})
    every = [
        submission("first", [0, 1], "a", "9"),
        submission("first", [2], "b", "10"),
        submission("last", [0], "c", "11"),
    ]
    for one in every:
        table.enter(one)
    assert table.after_any(every) == "afterany:9,afterany:10,afterany:11"
    table.remove("first", [2])
    assert table.after_any(every) == "afterany:9,afterany:11"
    assert table.after_any([]) == ""


def test_looking_up_jobs(chain: Chain) -> None:
    """Known jobs stay; a job that carries a different token is a stranger, and ours counts as forgotten."""
    table = JobTable()
    for one in (submission("first", [0, 1], "aaa", "9"), submission("first", [3], "bbb", "10")):
        table.enter(one)
    assert table.look_up("first", {"9": "run-first-aaa", "10": "run-first-bbb"}) == LookUp([], [])
    assert table.look_up("first", {"9": "run-first-aaa", "10": "run-first-stranger"}) == LookUp([], [3])
    assert table.look_up("first", {}, ["9"]) == LookUp([], [0, 1])
    assert table.look_up("second", {}) == LookUp([], [])
    assert table.of("first") == {0: "9", 1: "9", 3: "10"}, "looking up removes nothing"


def test_a_wrong_id_is_corrected_by_the_token(chain: Chain) -> None:
    """The right id takes the place of the one that sbatch printed, and dependencies name it."""
    table = JobTable()
    table.enter(submission("first", [0, 1, 2], "aaa", "424242"))
    known = {"17": "run-first-aaa", "18": "run-first-zzz"}
    assert table.look_up("first", known) == LookUp([WrongId("first", "aaa", "424242", "17")], [])
    assert table.of("first") == {0: "17", 1: "17", 2: "17"}
    assert table.group_by_dependency(chain["second"], [0, 1]) == {"aftercorr:17": [0, 1]}
    assert table.look_up("first", known) == LookUp([], [])


def test_a_job_whose_token_is_unknown_is_known_by_its_id() -> None:
    """That is the case for a job that was found in the queue by its token, while the journal holds a wrong id."""
    table = JobTable({"first": {0: "17"}}, {("first", "424242"): "aaa"})
    assert table.look_up("first", {"17": "run-first-aaa"}) == LookUp([], [])
    assert table.look_up("first", {}) == LookUp([], [0])
