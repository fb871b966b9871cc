"""How an attempt ends, without a cluster: what is written, asked of Slurm and returned."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import EXIT_AGAIN, EXIT_INPUTS_MISSING, EXIT_STOPPED, UserError
from run_contract.publish import write_json
from snakmodel.job import ending
from snakmodel.job.ending import Ending, Work
from snakmodel.job.pack_attempt import PackAttempt
from snakmodel.monitor.run_files import PackHistory
from snakmodel.run.attempts import Attempt, Kind, Outcome, Summary
from snakmodel.run.task_list import TaskList
from snakmodel.slurm import own_job
from snakmodel.slurm.own_job import End, JobState
from tests import toy


class Job:
    """A job of a toy stage, and a Slurm that answers as the test says and notes what it is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, restart: int = 0) -> None:
        plan = toy.plan(folder / "run", toy.two_stages(folder / "run", shards=1))
        self.root = folder / "run"
        self.tasks = TaskList.read(plan.write_task_list(plan.chain["first"], sys.executable))
        self.here = PackAttempt(self.tasks, 0, Attempt("7_0", restart), on_slurm=True, node="node3")
        self.ending = Ending(self.here, lambda: False)
        self.state = JobState({"JobState": "RUNNING", "EndTime": "2099-01-01T00:00:00", "Restarts": str(restart)})
        self.end = End("requeued")
        self.accounted = ""
        self.asked: list[str] = []
        monkeypatch.setattr(ending, "job_state", lambda _: self.state)
        monkeypatch.setattr(ending, "accounted_end", lambda _: self.accounted)
        monkeypatch.setattr(ending, "requeue", lambda *_: self.asked.append("requeue") or self.end)
        monkeypatch.setattr(ending, "exclude", lambda job, nodes, needed: self.asked.append(f"exclude {nodes}"))

    def begin(self, restart: int, node: str = "node3") -> None:
        """An earlier start of the same job that got as far as writing that it began."""
        write_json(self.here.all_attempts / f"7_0.r{restart}" / "start.json", {"progress": 0, "node": node})

    def conclude(self, found: Outcome, **work: Any) -> int:
        """End this attempt."""
        write_json(self.here.folder / "start.json", {"progress": 0, "node": "node3"})
        return self.ending.conclude(found, Work(**work))

    def events(self) -> list[tuple[str, str]]:
        """(Event, kind) of what was logged."""
        lines = (self.root / "events.jsonl").read_text().splitlines()
        return [(one["event"], one.get("kind", "")) for one in map(json.loads, lines)]

    def summary(self) -> dict[str, Any]:
        """The summary that the attempt left."""
        found: dict[str, Any] = json.loads((self.here.folder / "summary.json").read_text())
        return found


@pytest.mark.parametrize(
    ("found", "code", "event"),
    [("done", 0, "done"), ("stopped", EXIT_STOPPED, "stopped"), ("refused", EXIT_INPUTS_MISSING, "failed")],
)
def test_ends_that_are_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Outcome, code: int, event: str
) -> None:
    """Slurm is not asked for anything, and the exit code says what came of the attempt."""
    job = Job(tmp_path, monkeypatch)
    assert job.conclude(found) == code
    assert job.asked == []
    assert job.events() == [(event, "")]
    assert job.summary()["outcome"] == found


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"Reason": "TimeLimit"}, "timeout"),
        ({"PreemptTime": "2026-11-23T01:19:17"}, "preempted"),
        ({}, "requested"),
    ],
)
def test_a_signalled_attempt_is_requeued_for_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], kind: Kind
) -> None:
    """What the controller says of the job becomes the kind of its end; then it is requeued."""
    job = Job(tmp_path, monkeypatch)
    job.state.fields.update(fields)
    assert job.conclude("again", signalled=True) == EXIT_AGAIN
    assert job.asked == ["requeue"]
    assert job.events() == [("requeue", kind)]
    assert job.summary()["kind"] == kind


def test_what_slurm_refuses_and_what_a_user_cancels_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends with 1 and says why; it is not asked for twice."""
    job = Job(tmp_path, monkeypatch)
    job.end = End("refused", "Requested operation is presently disabled")
    assert job.conclude("again") == 1
    assert [event for event, _ in job.events()] == ["requeue", "failed"]
    job.state.fields["JobState"] = "COMPLETING"
    assert job.conclude("interrupted", signalled=True) == 1
    assert job.asked == ["requeue"]
    assert job.events()[-1] == ("cancelled", "cancelled")


def test_a_node_on_which_a_job_failed_twice_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exclusion comes after the requeue, as Slurm refuses it for a running job."""
    job = Job(tmp_path, monkeypatch, restart=1)
    job.begin(0)
    Summary("7_0.r0", "crashed", False, "crash", ["node3"]).write(job.here.all_attempts / "7_0.r0")
    assert job.conclude("crashed", kind="crash", nodes=["node3"]) == EXIT_AGAIN
    assert job.asked == ["requeue", "exclude ['node3']"]
    assert job.events()[-1][0] == "excluded"


@pytest.mark.parametrize(
    ("accounted", "kind"), [("", "node-failure"), ("NODE_FAIL", "node-failure"), ("PREEMPTED", "preempted"),
                            ("REQUEUED", "no-record")]
)  # fmt: skip
def test_a_start_that_left_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounted: str, kind: Kind
) -> None:
    """Its node counts as lost only where accounting says so, or says nothing; no other node is blamed."""
    job = Job(tmp_path, monkeypatch, restart=1)
    job.accounted = accounted
    job.begin(0)
    job.ending.report_before()
    assert job.events() == [("lost", kind)]
    [past] = job.ending.past()
    assert past.nodes == (["node3"] if kind == "node-failure" else [])


def test_what_accounting_told_too_late_is_said_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that Slurm ended by starting its job again learns why from accounting, or else the next start does."""
    job = Job(tmp_path, monkeypatch)
    job.begin(0)
    job.state.fields["Restarts"] = "1"
    monkeypatch.setattr(own_job, "accounted_end", lambda *_: job.accounted)
    assert job.conclude("interrupted", signalled=True) == EXIT_AGAIN
    assert job.events() == [("requeue", "restarted")]
    after = Job(tmp_path, monkeypatch, restart=1)
    after.ending.report_before()
    assert after.events() == [("requeue", "restarted")], "accounting still does not know"
    job.accounted = "PREEMPTED"
    after.ending.report_before()
    after.ending.report_before()
    assert after.events() == [("requeue", "restarted"), ("explained", "preempted")]
    assert [one.kind for one in after.ending.past()] == ["preempted"]
    history = PackHistory()
    for line in (after.root / "events.jsonl").read_text().splitlines():
        history.add(json.loads(line))
    assert history.again == [("preempted", "node3")]


def test_a_full_disk_keeps_no_job_from_being_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the summary, which publishing refuses as a user's error, nor the events or the log are needed for it."""
    job = Job(tmp_path, monkeypatch)

    def refuse(*_: object, **__: object) -> None:
        raise UserError("no room for summary.json")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Summary, "write", refuse)
    monkeypatch.setattr("snakmodel.job.pack_attempt.log_event", full)
    write_json(job.here.folder / "start.json", {"progress": 0, "node": "node3"})
    with open("/dev/full", "w") as stream:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", stream)
        code = job.ending.conclude("again", Work(signalled=True))
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    assert code == EXIT_AGAIN
    assert job.asked == ["requeue"]
