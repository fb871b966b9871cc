"""Every submission is exactly one job: what the journal does when sbatch, Slurm or the launcher fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from submitit.core.utils import FailedSubmissionError

from snakmodel.run.paths import RunPaths
from snakmodel.slurm.ask import Unanswered
from snakmodel.slurm.journal import Journal, Refused, Submission, job_name, read_lines

from .fake_slurm import FakeSlurm


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """The journal of a run whose Slurm is asked once only."""
    (tmp_path / "run").mkdir()
    return Journal(RunPaths(tmp_path / "run"), patience=0.0)


ONE = ("first", [0, 1], "afterok:7", "aaa", "series")


def accept(slurm: FakeSlurm, job: str = "17", name: str = "run-first-aaa") -> str:
    """Slurm gets the job, whatever sbatch says of it."""
    slurm.jobs[job], slurm.elements[job] = name, [0, 1]
    return job


def failing(slurm: FakeSlurm, words: str, *, times: int, accepts: bool = False) -> Callable[[], str]:
    """An sbatch that fails so many times, and which may still submit its job."""
    left = iter(range(times))

    def send() -> str:
        if next(left, None) is None:
            return accept(slurm)
        if accepts:
            accept(slurm)
        raise FailedSubmissionError(words)

    return send


def lines(path: Path) -> list[str]:
    return [one.get("job") or ("absent" if one.get("absent") else "intent") for one in read_lines(path)]


def test_an_accepted_job(journal: Journal, slurm: FakeSlurm) -> None:
    """The intent is on disk before sbatch is called, and the job's id after it."""
    one = Submission(*ONE)

    def send() -> str:
        [intent] = read_lines(journal.paths.intents)
        assert (intent["token"], intent["submission"]["packs"]) == ("aaa", [0, 1])
        assert not journal.paths.submissions.exists()
        return "17"

    journal.submit(one, send)
    assert one.job == "17"
    [line] = read_lines(journal.paths.submissions)
    assert {name: line[name] for name in ("stage", "job", "packs", "dependency", "token", "series")} == {
        "stage": "first", "job": "17", "packs": [0, 1], "dependency": "afterok:7", "token": "aaa", "series": "series",
    }  # fmt: skip
    [event] = read_lines(journal.paths.root / "events.jsonl")
    assert (event["event"], event["job"], event["packs"]) == ("submit", "17", 2)
    assert slurm.calls == []


def test_sbatch_that_fails_after_submitting(journal: Journal, slurm: FakeSlurm) -> None:
    """The job is found by its token, and sbatch is not called again."""
    one = Submission(*ONE)
    journal.submit(one, failing(slurm, "sbatch: error: lost my way", times=3, accepts=True))
    assert (one.job, list(slurm.jobs)) == ("17", ["17"])


def test_a_job_that_only_accounting_knows(journal: Journal, slurm: FakeSlurm) -> None:
    """It has ended and left the controller's memory already."""
    slurm.accounted["17"] = "run-first-aaa"
    one = Submission(*ONE)
    journal.submit(one, failing(slurm, "Socket timed out", times=1))
    assert (one.job, slurm.jobs) == ("17", {})


def test_sbatch_that_fails_without_submitting(journal: Journal, slurm: FakeSlurm) -> None:
    """It is called again after two answers without the job, with a message timeout between them."""
    one = Submission(*ONE)
    journal.submit(one, failing(slurm, "Socket timed out", times=2))
    assert (one.job, slurm.slept) == ("17", [10.0, 10.0])
    assert [call[0] for call in slurm.calls] == ["squeue", "sacct"] * 4
    assert lines(journal.paths.intents) == ["intent"]


def test_three_failures_are_a_refusal(journal: Journal, slurm: FakeSlurm) -> None:
    """The journal notes that there is no job, so that no later launcher looks for it."""
    with pytest.raises(Refused, match="Socket timed out"):
        journal.submit(Submission(*ONE), failing(slurm, "Socket timed out", times=9))
    assert lines(journal.paths.intents) == ["intent", "absent"]
    assert not journal.paths.submissions.exists()


@pytest.mark.parametrize(
    ("words", "tries"),
    [
        ("Batch job submission failed: Invalid account", 1),
        ("Batch job submission failed: Unable to contact slurm controller", 3),
        ("Batch job submission failed: Socket timed out on send/recv operation", 3),
    ],
)
def test_slurm_says_no(journal: Journal, slurm: FakeSlurm, words: str, tries: int) -> None:
    """A clear refusal is believed at once; one that a silent controller may have caused is not."""
    called: list[str] = []

    def send() -> str:
        called.append(words)
        raise FailedSubmissionError(words)

    with pytest.raises(Refused, match="Batch job submission failed"):
        journal.submit(Submission(*ONE), send)
    assert len(called) == tries


def test_no_answer_is_not_an_absence(journal: Journal, slurm: FakeSlurm) -> None:
    """The intent stays open; the next launcher finds the job once Slurm answers, and adopts it."""
    slurm.answers = False
    with pytest.raises(Unanswered):
        journal.submit(Submission(*ONE), failing(slurm, "Socket timed out", times=9, accepts=True))
    assert lines(journal.paths.intents) == ["intent"]
    slurm.answers = True
    [one] = Journal(journal.paths, patience=0.0).settle()
    assert (one.stage, one.job, one.series) == ("first", "17", "series")
    assert lines(journal.paths.submissions) == ["17"]
    assert journal.settle() == []


def test_settling_an_intent_without_a_job(journal: Journal, slurm: FakeSlurm) -> None:
    """A launcher that was killed before sbatch left no job; that is noted after two answers, and asked once only."""
    journal._intend(Submission(*ONE))
    assert journal.settle() == []
    assert (lines(journal.paths.intents), slurm.slept) == (["intent", "absent"], [10.0])
    asked = len(slurm.calls)
    assert (journal.settle(), len(slurm.calls)) == ([], asked)


def test_a_doubled_job_is_cancelled(journal: Journal, slurm: FakeSlurm) -> None:
    """Of several jobs with one token, as a wrapper that retries may submit them, the first stays."""
    accept(slurm, "101")
    accept(slurm, "99")
    journal._intend(Submission(*ONE))
    [one] = journal.settle()
    assert (one.job, list(slurm.jobs)) == ("99", ["99"])


def test_journal_survives_half_a_line(journal: Journal) -> None:
    """A line that a killed launcher left unfinished is skipped, and the next one is whole."""
    journal.accept(Submission("first", [0, 1], "", "token1", job="17"))
    with journal.paths.submissions.open("a") as file:
        file.write('{"stage": "sec')
    journal.accept(Submission("second", [0], "afterok:17", "token2", job="18"))
    assert [(one["stage"], one["job"], one["packs"]) for one in read_lines(journal.paths.submissions)] == [
        ("first", "17", [0, 1]),
        ("second", "18", [0]),
    ]
    assert read_lines(journal.paths.root / "none.jsonl") == []


def test_the_cluster_is_noted(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several clusters share one accounting, the line says to which the job went."""
    monkeypatch.setenv("SLURM_CLUSTERS", "west")
    journal.accept(Submission(*ONE, job="17"))
    assert json.loads(journal.paths.submissions.read_text())["cluster"] == "west"


def test_job_names(tmp_path: Path) -> None:
    """Characters that break Slurm's lists of names are replaced; stage and token stay."""
    assert job_name(RunPaths(tmp_path / "my run, v1.2"), "train", "aaa") == "my_run__v1.2-train-aaa"
