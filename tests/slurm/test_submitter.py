"""A whole chain submitted to a Slurm in memory: order, dependencies, continuation, and jobs that Slurm forgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.run.attempts import Summary
from snakmodel.run.markers import Marker
from snakmodel.run.task_list import TaskList
from snakmodel.slurm.ask import Unanswered
from snakmodel.slurm.jobs import CONTINUATION
from snakmodel.slurm.journal import read_lines
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy

from .fake_slurm import FakeSlurm, option


def scheduler(root: Path, shards: int = 3, **changes: Any) -> SlurmScheduler:
    """The scheduler of a launcher, which can continue unless the test says otherwise."""
    return SlurmScheduler(toy.plan(root, toy.two_stages(root, shards)), **{"resubmit_command": ["launch"], **changes})


def rows(made: SlurmScheduler) -> list[tuple[str, list[int], str]]:
    return [(one.stage, one.packs, one.dependency) for one in made.calls.submitted]


def test_dry_run_chains_the_stages(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Slurm is not asked; three arrays are written, and what is done (pack 1 of the first stage) is not waited for."""
    made = scheduler(tmp_path, dry=True)
    report = made.run()
    assert rows(made) == [
        ("first", [0, 1, 2], ""),
        ("second", [0, 1, 2], "aftercorr:<first>"),
        ("last", [0], "afterok:<second>"),
    ]
    assert (report.left, report.limits, made.resubmit_forgotten()) == (0, None, [])
    made.plan.missing["first"].remove(1)
    again = SlurmScheduler(made.plan, dry=True)
    again.run()
    assert rows(again) == [
        ("first", [0, 2], ""),
        ("second", [0, 2], "aftercorr:<first>"),
        ("second", [1], ""),
        ("last", [0], "afterok:<second>"),
    ]
    assert slurm.calls == []


def test_ten_thousand_shards_are_a_few_calls(tmp_path: Path) -> None:
    """Whatever the number of shards, a stage is one array; array_parallelism is its %N."""
    plan = toy.plan(tmp_path, toy.two_stages(tmp_path, 10_000), {"slurm": {"array_parallelism": 50}})
    report = SlurmScheduler(plan, dry=True).run()
    assert [(one.stage, len(one.packs)) for one in report.submitted] == [
        ("first", 10_000),
        ("second", 10_000),
        ("last", 1),
    ]
    assert option((tmp_path / "sbatch" / "first" / "dry-run-0.sh").read_text(), "array") == "0-9999%50"


def test_a_chain_that_fits(tmp_path: Path, slurm: FakeSlurm) -> None:
    """One array per stage; a second launcher finds all of it queued and submits nothing."""
    report = scheduler(tmp_path).run()
    assert slurm.submitted() == [("first", "0-2", ""), ("second", "0-2", "aftercorr:100"), ("last", "0", "afterok:101")]
    assert (report.left, report.queued_before) == (0, {})
    second = scheduler(tmp_path).run()
    assert second.submitted == []
    assert second.queued_before == {
        "first": dict.fromkeys(range(3), "100"),
        "second": dict.fromkeys(range(3), "101"),
        "last": {0: "102"},
    }


def test_what_is_queued_from_before_is_waited_for(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Packs of the first stage that are still queued are waited for by `afterok`; new ones by `aftercorr`."""
    made = scheduler(tmp_path)
    made.plan.missing.update(first=[0, 2], second=[], last=[])
    made.run()
    scheduler(tmp_path).run()
    assert slurm.submitted()[1:] == [
        ("first", "1", ""),
        ("second", "0,2", "afterok:100"),
        ("second", "1", "aftercorr:101"),
        ("last", "0", "afterok:102,afterok:103"),
    ]


def test_room_for_one_pack(tmp_path: Path, slurm: FakeSlurm) -> None:
    """One pack is submitted, and the continuation job, which waits for its end, submits the other six."""
    slurm.most = 2
    report = scheduler(tmp_path).run()
    assert slurm.submitted() == [("first", "0", ""), (CONTINUATION, "0", "afterany:100")]
    assert report.left == 6
    assert report.limits is not None
    assert " && timeout -s INT 7110 launch --continues " in slurm.texts["101"]


def test_a_limit_that_is_too_small(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A limit that never has room for a pack and a continuation job is an error, and nothing is submitted."""
    slurm.most = 1
    with pytest.raises(UserError, match=r"MaxJobCount = 1, 0 of it in use; 7 packs are left to submit\. This limit is"):
        scheduler(tmp_path).run()
    assert slurm.submitted() == []


def test_a_continuation_job_goes_on(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves alone what was tried in its series, and submits a continuation job of its own for the rest."""
    slurm.most = 4
    made = scheduler(tmp_path, shards=6)
    made.run()
    series = made.calls.series
    assert slurm.submitted() == [("first", "0-2", ""), (CONTINUATION, "0", "afterany:100")]
    for job in ("100", "101"):
        slurm.end(job)
    slurm.most = 8  # the ended jobs still count
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "101")
    report = scheduler(tmp_path, shards=6, continues=series).run()
    assert slurm.submitted()[2:] == [("first", "3-5", ""), (CONTINUATION, "0", "afterany:102")]
    assert report.given_up["first"] == {0, 1, 2}
    assert {line["series"] for line in read_lines(made.plan.paths.submissions)} == {series}


def test_one_continuation_job_is_enough(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A second launcher fills the room that there is, and leaves the rest to the job that is queued already."""
    slurm.most = 4
    scheduler(tmp_path, shards=6).run()
    slurm.most = 6
    report = scheduler(tmp_path, shards=6).run()
    assert slurm.submitted()[2:] == [("first", "3-4", "")]
    assert report.left == 8


def test_waiting_here(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """With --wait-for-room everything is submitted as jobs leave the queue, without a continuation job."""
    slurm.most = 4
    made = scheduler(tmp_path, wait=True)
    made.room.read = _queue_empties(made, slurm)
    assert made.run().left == 0
    assert slurm.submitted() == [
        ("first", "0-2", ""),
        ("second", "0", "aftercorr:100"),
        ("second", "1-2", "aftercorr:100"),
        ("last", "0", "afterok:101,afterok:102"),
    ]
    assert "waiting for room: MaxJobCount = 4, 4 of it in use; 3 packs are left" in capsys.readouterr().out


def _queue_empties(made: SlurmScheduler, slurm: FakeSlurm) -> Callable[[], Any]:
    """Reads the limits; from the third time on, a larger limit stands for a queue that has emptied."""
    times, read_limits = iter(range(100)), made.room.read

    def read() -> Any:
        slurm.most = 4 if next(times) < 2 else 8
        return read_limits()

    return read


def test_a_job_that_slurm_forgets_before_it_is_waited_for(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage is submitted again before the second is chained to it, except for a pack that is done."""
    made = scheduler(tmp_path)

    def forgets_the_first(text: str) -> str:
        slurm.sbatch = slurm.accept
        job = slurm.accept(text)
        slurm.forget(job)
        tasks = TaskList.read(made.plan.paths.task_list("first"))
        _mark_done(tmp_path, tasks, 1)
        return job

    slurm.sbatch = forgets_the_first
    made.run()
    assert slurm.submitted() == [
        ("first", "0-2", ""),
        ("first", "0,2", ""),
        ("second", "0,2", "aftercorr:101"),
        ("second", "1", ""),
        ("last", "0", "afterok:102,afterok:103"),
    ]
    assert "Slurm has forgotten jobs of stage first; submitting its packs 0,2 again" in capsys.readouterr().out


def _mark_done(root: Path, tasks: TaskList, index: int) -> None:
    """Leave the output and the marker of a task."""
    task = tasks.tasks[index]
    for output in task.outputs:
        (root / output).parent.mkdir(exist_ok=True)
        (root / output).write_text("done")
    Marker.of(root, task.key, task.outputs).write(tasks.marker_path("first", index))


def test_no_room_for_what_was_forgotten(tmp_path: Path, slurm: FakeSlurm) -> None:
    """The launcher says which packs are left, and chains no job to what is not there."""
    slurm.most = 5

    def forgets(text: str) -> str:
        slurm.sbatch = slurm.accept
        job = slurm.accept(text)
        slurm.forget(job)
        return job

    slurm.sbatch = forgets
    with pytest.raises(UserError, match=r"^no room for packs 1-2 of stage first; run the same command again$"):
        scheduler(tmp_path).run()
    assert slurm.submitted() == [("first", "0-2", ""), ("first", "0", "")]


def test_a_wrapper_that_prints_a_wrong_id(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job is found by its token, and nothing is submitted twice."""
    made = scheduler(tmp_path)
    slurm.sbatch = lambda text: slurm.accept(text) and "424242"
    made.run()
    assert made.resubmit_forgotten() == []
    assert [option(text, "dependency") for text in slurm.texts.values()] == ["", "aftercorr:100", "afterok:101"]
    assert [one.job for one in made.calls.submitted] == ["100", "101", "102"]
    assert capsys.readouterr().out.count("not 424242 as sbatch seemed to say") == 3


def test_what_is_forgotten_at_the_end_is_submitted_again(tmp_path: Path, slurm: FakeSlurm) -> None:
    """The latest jobs, which a killed controller lost, are submitted again with the same dependencies."""
    made = scheduler(tmp_path)
    made.run()
    slurm.forget("102")
    assert made.resubmit_forgotten() == ["Slurm had forgotten stage last's packs 0"]
    assert slurm.submitted()[3:] == [("last", "0", "afterok:101")]
    assert made.resubmit_forgotten() == []
    assert 0 < max(slurm.slept) <= 7, "the controller has time to write down what it has accepted"


def test_a_job_that_has_ended_is_not_forgotten(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A short job may have left the queue and its memory: its summary says that it has run."""
    made = scheduler(tmp_path)
    made.plan.missing.update(first=[0, 1], second=[], last=[])
    made.run()
    slurm.forget("100")
    Summary("100_0.r0", "done", True).write(tmp_path / "attempts" / "first" / "00000" / "100_0.r0")
    assert made.resubmit_forgotten() == ["Slurm had forgotten stage first's packs 1"]
    assert slurm.submitted()[1:] == [("first", "1", "")]


def test_an_id_that_is_used_again(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A stranger's job with the id of a forgotten one is not taken for it."""
    made = scheduler(tmp_path)
    made.run()
    slurm.jobs["102"] = "run-last-stranger"
    assert made.resubmit_forgotten() == ["Slurm had forgotten stage last's packs 0"]


def test_a_forgotten_continuation_job(tmp_path: Path, slurm: FakeSlurm) -> None:
    """It is submitted again, to wait for the same jobs."""
    slurm.most = 3
    made = scheduler(tmp_path)
    made.run()
    slurm.forget("101")
    assert made.resubmit_forgotten() == ["Slurm had forgotten stage continuation's packs 0"]
    assert slurm.submitted() == [("first", "0-1", ""), *[(CONTINUATION, "0", "afterany:100")] * 2]


def test_a_silent_controller(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A missing answer is never taken for an empty queue."""
    made = scheduler(tmp_path)
    slurm.answers = False
    with pytest.raises(Unanswered):
        made.run()
    assert slurm.submitted() == []
