"""Whatever becomes of sbatch, the controller or the launcher: every pack has one job, and it runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snakmodel.slurm.journal import read_lines

from .conftest import PATIENCE, REPOSITORY, Cluster, _demote, bring_back, drained, settings
from .queue_run import QueueRun

WANTED = sorted([("first", 0), ("first", 1), ("first", 2), ("last", 0), ("second", 0), ("second", 1), ("second", 2)])


def wait_until_done(run: QueueRun, timeout: float = 120) -> None:
    """Wait for the last stage's file and for the queue to agree."""
    end = time.monotonic() + timeout * PATIENCE
    while not run.done() or any(row["State"] != "COMPLETED" for row in run.accepted()):
        assert time.monotonic() < end, run.everything()
        time.sleep(0.3)


def assert_each_once(run: QueueRun) -> None:
    """Seven elements were accepted, each was started once, and the journal knows all three jobs."""
    assert len(run.accepted()) == len(WANTED), run.everything()
    assert run.starts() == WANTED
    assert {one["job"] for one in run.submissions()} == {row["JobID"].split("_")[0] for row in run.accepted()}
    assert run.launch().stdout == ""


def start(run: QueueRun, *flags: str) -> subprocess.Popen[str]:
    """A launcher in the background."""
    return subprocess.Popen(
        run.argv(*flags), cwd=REPOSITORY, env=run.cluster.environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **_demote(run.cluster.user),
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


@contextmanager
def silent_controller(cluster: Cluster) -> Iterator[None]:
    """slurmctld does not answer for the duration of the body."""
    pid = cluster.pid("slurmctld")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(path: Path, launcher: subprocess.Popen[str]) -> None:
    """Wait for a file that a wrapper leaves."""
    end = time.monotonic() + 60 * PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)


def test_sbatch_that_submits_and_then_fails(cluster: Cluster) -> None:
    """Every sbatch fails after Slurm has accepted the job: the jobs are found by their tokens, none is doubled."""
    run = QueueRun.new(cluster, "submits-and-fails", 3)
    run.wrap("sbatch", '/usr/bin/sbatch "$@" >/dev/null; echo "sbatch: error: lost my way" >&2; exit 1')
    done = run.launch()
    assert done.stderr.count("accepted as") == 3
    run.unwrap("sbatch")
    wait_until_done(run)
    assert_each_once(run)


def test_sbatch_that_prints_other_text(cluster: Cluster) -> None:
    """A site's sbatch that says more than the job's id, other numbers too: the id is still the one that Slurm gave."""
    run = QueueRun.new(cluster, "banner", 3)
    words = "echo 'Since Monday your job 424242 used 3 h.'; {0}; echo 'Submitted batch job 17 to the project queue'"
    run.wrap("sbatch", words.format('/usr/bin/sbatch "$@"'))
    done = run.launch("--confirm")
    assert "forgotten" not in done.stdout + done.stderr
    run.unwrap("sbatch")
    wait_until_done(run)
    assert_each_once(run)


def test_sbatch_that_prints_another_number_last(cluster: Cluster) -> None:
    """An id that is none of ours: the jobs are found by their tokens before anything is submitted again."""
    run = QueueRun.new(cluster, "number", 3)
    with drained(cluster):
        run.wrap("sbatch", '/usr/bin/sbatch "$@"; code=$?; echo 424242; exit $code')
        done = run.launch("--confirm")
        assert "not 424242 as sbatch seemed to say" in done.stdout
        assert "forgotten" not in done.stdout + done.stderr
        run.unwrap("sbatch")
        assert len(run.accepted()) == len(WANTED), run.everything()
        assert run.launch().stdout == "", "the second launcher submitted what is queued"
        assert "not queued" not in run.status()
    wait_until_done(run)
    assert len(run.accepted()) == len(WANTED), run.everything()
    assert run.starts() == WANTED


def test_sbatch_that_fails_once_without_submitting(cluster: Cluster) -> None:
    """A failure that leaves no job is tried again after two answers without it, a message timeout apart."""
    run = QueueRun.new(cluster, "fails-once", 3)
    flag = run.folder / "failed-once"
    run.wrap("sbatch", f'[ -e {flag} ] && exec /usr/bin/sbatch "$@"; touch {flag}; echo "Socket timed out" >&2; exit 1')
    started = time.monotonic()
    done = run.launch()
    assert "no job" in done.stderr
    assert time.monotonic() - started > 10
    wait_until_done(run)
    assert_each_once(run)


def test_controller_silent_while_submitting(cluster: Cluster) -> None:
    """slurmctld is stopped under an sbatch, which fails although its job is accepted later: still one job a stage."""
    run = QueueRun.new(cluster, "silent", 3)
    reached = run.folder / "reached"
    run.wrap("sbatch", f'touch {reached}; while [ ! -e {reached}.go ]; do sleep 0.05; done; exec /usr/bin/sbatch "$@"')
    launcher = start(run)
    wait_for(reached, launcher)
    with silent_controller(cluster):
        Path(f"{reached}.go").touch()
        time.sleep(15)  # longer than the message timeout: this very sbatch gives up
        assert launcher.poll() is None
    out = launcher.communicate(timeout=120 * PATIENCE)[0]
    assert launcher.returncode == 0, out
    assert "looking for its job" in out
    wait_until_done(run)
    assert_each_once(run)


def test_launcher_killed_between_acceptance_and_journal(cluster: Cluster) -> None:
    """The job of a killed launcher runs unaided; the next launcher adopts it by its token and submits the rest."""
    run = QueueRun.new(cluster, "killed", 3)
    pid = f"$(sed -E 's/.*\"pid\": ([0-9]+).*/\\1/' {run.root}/lock)"
    run.wrap("sbatch", f'/usr/bin/sbatch "$@"; sleep 600 & echo $! > {run.folder}/left; kill -9 {pid}; wait')
    assert run.launch(check=False).returncode == -signal.SIGKILL
    left = int((run.folder / "left").read_text())
    cluster.run(["kill", str(left)])
    run.unwrap("sbatch")
    assert run.submissions() == []
    end = time.monotonic() + 60 * PATIENCE
    while run.starts() != WANTED[:3] or run.markers("first") < 3:
        assert time.monotonic() < end, run.everything()
        time.sleep(0.3)
    done = run.launch()
    assert "adopted job" in done.stdout
    wait_until_done(run)
    assert_each_once(run)


def test_two_launchers(cluster: Cluster) -> None:
    """While one launcher submits, a second one says who holds the run and submits nothing."""
    run = QueueRun.new(cluster, "two-launchers", 3)
    reached = run.folder / "reached"
    run.wrap("sbatch", f'touch {reached}; while [ ! -e {reached}.go ]; do sleep 0.05; done; exec /usr/bin/sbatch "$@"')
    first = start(run)
    wait_for(reached, first)
    second = run.launch(check=False)
    assert second.returncode == 2
    assert "is in use by process" in second.stderr
    assert f"on {os.uname().nodename}" in second.stderr
    told = run.status()
    assert f"note: a launcher works on this run: process {second.stderr.split('process ')[1].split()[0]} on" in told
    Path(f"{reached}.go").touch()
    assert first.wait(timeout=60 * PATIENCE) == 0
    wait_until_done(run)
    assert_each_once(run)
    assert "every task is done" in run.status()


@pytest.mark.slow
def test_dependency_on_a_forgotten_job(cluster: Cluster) -> None:
    """The first stage's job is cancelled and forgotten before the second is chained to it: it is submitted again."""
    run = QueueRun.new(cluster, "forgotten", 3)
    mark = run.folder / "forgotten"
    run.wrap(
        "sbatch",
        f'out=$(/usr/bin/sbatch "$@"); echo "$out"; [ -e {mark} ] && exit; touch {mark}; job=${{out##* }}\n'
        "/usr/bin/scancel $job; while /usr/bin/squeue -h -t all -o %F | grep -qx $job; do sleep 1; done",
    )
    with settings(cluster, "MinJobAge=2"):
        done = run.launch(timeout=170)
        assert "Slurm has forgotten jobs of stage first" in done.stdout
        stages = [(one["stage"], one["dependency"].split(":")[0]) for one in run.submissions()]
        assert stages == [("first", ""), ("first", ""), ("second", "aftercorr"), ("last", "afterok")]
        end = time.monotonic() + 120 * PATIENCE
        while not run.done():
            assert time.monotonic() < end, run.everything()
            time.sleep(0.3)
    assert run.starts() == WANTED
    assert len(read_lines(run.root / "intents.jsonl")) == 4


@pytest.mark.slow
def test_controller_killed_within_seconds_of_a_submission(repaired: Cluster) -> None:
    """slurmctld, killed outright, forgets what it accepted last: the launcher sees it and submits that again.

    What it had written down before is put back after the kill, since whether it has written more depends on the clock.
    No job begins before the kill: nodes would refuse the ids of jobs that they have run, when these are used again.
    """
    run = QueueRun.new(repaired, "killed-controller", 3)
    count = f"{run.folder}/count"
    run.wrap(
        "sbatch",
        f'/usr/bin/sbatch --begin=now+15 "$@" || exit; echo >> {count}; '
        f"[ $(wc -l < {count}) = 3 ] && touch {count}.3; true",
    )
    state, before = repaired.folder / "state", repaired.folder / "state-before"
    repaired.run(["cp", "-a", state, before], as_root=True, check=False)  # some of its files come and go
    launcher = start(run, "--confirm")
    wait_for(Path(f"{count}.3"), launcher)
    pid = repaired.pid("slurmctld")
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    shutil.rmtree(state)
    before.rename(state)
    bring_back(repaired)
    out = launcher.communicate(timeout=300 * PATIENCE)[0]
    assert launcher.returncode == 0, out
    assert "Slurm had forgotten stage last" in out
    end = time.monotonic() + 180 * PATIENCE
    while not run.done():
        assert time.monotonic() < end, out + run.everything()
        time.sleep(0.3)
    assert set(run.starts()) == set(WANTED), out
    assert run.launch().stdout == ""


@pytest.mark.slow
def test_ids_that_are_used_again(cluster: Cluster) -> None:
    """A job of the same id, but not of ours, is not taken for one of this run's."""
    run = QueueRun.new(cluster, "id-again", 3)
    run.launch()
    wait_until_done(run)
    stranger = cluster.submit("--hold", "--array=0-2", "--wrap=true", cwd=run.folder)
    try:
        journal = run.root / "submissions.jsonl"
        journal.write_text(
            journal.read_text().replace(f'"job": "{run.submissions()[0]["job"]}"', f'"job": "{stranger}"')
        )
        (run.root / "markers" / "first" / "00001.json").unlink()
        run.launch()
        assert [(one["stage"], one["packs"]) for one in run.submissions()[3:]] == [("first", [1])]
    finally:
        cluster.run(["scancel", stranger])
