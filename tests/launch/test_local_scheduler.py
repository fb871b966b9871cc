"""The embedded scheduler and the driver, with real processes on a small chain."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from run_contract.publish import checksum
from snakmodel.chain.stage import Stage, Task
from snakmodel.launch.local_scheduler import LocalScheduler, _Report, _StartedPack
from snakmodel.run.markers import READ, Marker, marker_path
from tests import toy
from tests.conftest import PATIENCE

SLEEP = 2 * PATIENCE
"""Seconds for which a command sleeps that is not meant to end by itself."""


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def starts(root: Path) -> list[tuple[str, int]]:
    """(stage, pack) of every attempt that was started, in order."""
    return [(one["stage"], one["pack"]) for one in events(root) if one["event"] == "start"]


def test_chain_runs_and_runs_only_what_is_missing(tmp_path: Path) -> None:
    """A first run does everything in order; after one marker is lost, that task alone runs; then nothing does."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    assert (root / "c.txt").read_text() == "0.txt1.txt2.txt"
    assert starts(root)[-1] == ("last", 0)
    assert len(starts(root)) == 7
    marker_path(root, "second", 1).unlink()
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    assert starts(root)[7:] == [("second", 1)]
    assert toy.plan(root, toy.two_stages(root)).missing == {"first": [], "second": [], "last": []}


def test_what_comes_out_the_same_is_not_read_again(tmp_path: Path) -> None:
    """A first task under a new key that writes the same bytes: what reads them gets new markers and is not run.

    Where it writes other bytes, all that reads them runs.
    """
    root = tmp_path / "run"
    stages = toy.two_stages(root)
    assert LocalScheduler(toy.plan(root, stages)).run() == 0
    times = {name: (root / name).stat().st_mtime_ns for name in ("a/0.txt", "a/1.txt", "b/1.txt", "c.txt")}

    def changed(task: Task) -> list[Stage]:
        first = replace(stages[0], tasks=(stages[0].tasks[0], task, stages[0].tasks[2]))
        return [first, *stages[1:]]

    same = changed(replace(stages[0].tasks[1], outside="touched"))
    assert toy.plan(root, same).missing == {"first": [1], "second": [1], "last": [0]}
    assert LocalScheduler(toy.plan(root, same)).run() == 0
    assert toy.plan(root, same).missing == {"first": [], "second": [], "last": []}
    assert [name for name, time in times.items() if (root / name).stat().st_mtime_ns != time] == ["a/1.txt"]
    different = changed(toy.task(root, "a/1.txt", script=toy.PUBLISH.replace("[-5:]", "[-5:].upper()")))
    assert LocalScheduler(toy.plan(root, different)).run() == 0
    assert (root / "c.txt").read_text() == "0.txt1.TXT2.txt"


def test_a_file_from_outside_that_changes_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The marker keeps the digest of a file that a task read; one that changed while it was read leaves no marker."""
    root = tmp_path / "run"
    weights = tmp_path / "weights"
    weights.write_text("x")
    stage = toy.two_stages(root, shards=1)[0]
    stage = replace(stage, tasks=(replace(stage.tasks[0], reads=(str(weights),)),))
    assert LocalScheduler(toy.plan(root, [stage])).run() == 0
    marker = Marker.read(marker_path(root, "first", 0))
    assert marker
    assert marker.counts[READ] == {"weights": checksum(weights)}
    marker_path(root, "first", 0).unlink()
    script = f"open({str(weights)!r}, 'a').write('y')\n{toy.PUBLISH}"
    stage = replace(stage, tasks=(replace(toy.task(root, "a/0.txt", script=script), reads=(str(weights),)),))
    assert LocalScheduler(toy.plan(root, [stage])).run() == 1
    assert "was changed while it was read" in capsys.readouterr().err
    assert not marker_path(root, "first", 0).exists()


def test_packs_share_a_job(tmp_path: Path) -> None:
    """With two shards a job, five shards make three jobs a stage and the same files."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=5), pack=2)).run() == 0
    assert sorted(set(starts(root))) == [
        *[("first", i) for i in range(3)],
        ("last", 0),
        *[("second", i) for i in range(3)],
    ]
    assert (root / "c.txt").read_text() == "".join(f"{i}.txt" for i in range(5))


def test_corrupt_output_is_found_by_its_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same size but other bytes: planning cannot see it, the reader does, refuses, and the next run redoes the file."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    (root / "a" / "1.txt").write_text("9.txt")
    marker_path(root, "second", 1).unlink()
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 1
    assert "a/1.txt does not match the checksum in its marker" in capsys.readouterr().err
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    assert (root / "b" / "1.txt").read_text() == "1.txt"


def test_a_task_that_always_crashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is tried as the budget says, its peers finish, what waits for it does not run, and the log is shown."""
    root = tmp_path / "run"
    script = "import sys\nif '1.txt' in sys.argv[1]: sys.exit('broken shard')\n" + toy.PUBLISH
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, script=script))).run() == 1
    assert starts(root).count(("first", 1)) == 3
    assert Marker.read(marker_path(root, "second", 2)) is not None
    assert not (root / "c.txt").exists()
    assert "broken shard" in capsys.readouterr().err


def test_a_full_disk_is_said_and_tried_again(tmp_path: Path) -> None:
    """It counts as a crash, which is tried as the budget says, and not as a mistake in the inputs or settings."""
    script = (
        "import errno, sys\nfrom run_contract.entry_point import run_main\n"
        "def main(): raise OSError(errno.ENOSPC, 'No space left on device', sys.argv[1])\nrun_main(main)\n"
    )
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1, script=script))).run() == 1
    assert starts(root) == [("first", 0)] * 3
    assert "(the last one: the disk is full)" in events(root)[-1]["reason"]
    assert events(root)[-1]["event"] == "failed"


def test_exit_75_runs_again_while_it_progresses(tmp_path: Path) -> None:
    """A resumable task that saves and leaves is started again beyond any budget, as long as its progress file grows."""
    root = tmp_path / "run"
    script = (
        "import sys, pathlib\n"
        "n = pathlib.Path(sys.argv[1]).with_name('progress'); n.parent.mkdir(exist_ok=True)\n"
        "step = int(n.read_text()) + 1 if n.exists() else 1\n"
        "n.write_text(str(step))\n"
        "if step < 6: sys.exit(75)\n"
    ) + toy.PUBLISH
    stage = toy.two_stages(root, shards=1, script=script)[0]
    stage = replace(stage, resumable=True, progress="a/progress")
    assert LocalScheduler(toy.plan(root, [stage])).run() == 0
    assert len(starts(root)) == 6


def test_exit_75_without_progress_ends(tmp_path: Path) -> None:
    """The same without progress ends after the budget."""
    root = tmp_path / "run"
    assert (
        LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1, script="import sys; sys.exit(75)")[:1])).run() == 1
    )
    assert len(starts(root)) == 3


def test_ranks_meet(tmp_path: Path) -> None:
    """Three ranks get their numbers and a rendezvous whose listening socket rank 0 inherits: a real TCP exchange."""
    root = tmp_path / "run"
    script = (
        "import os, socket, sys, pathlib\n"
        "e = os.environ; r, w = int(e['RANK']), int(e['WORLD_SIZE'])\n"
        "if r == 0:\n"
        "    s = socket.socket(fileno=int(e['MASTER_LISTEN_FD']))\n"
        "    got = sorted(s.accept()[0].makefile().readline().strip() for _ in range(w - 1))\n"
        "    p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.write_text(' '.join(got))\n"
        "else:\n"
        "    s = socket.create_connection((e['MASTER_ADDR'], int(e['MASTER_PORT'])))\n"
        "    s.sendall(f'rank{r} local{e[\"LOCAL_RANK\"]}\\n'.encode())\n"
    )
    stage = toy.two_stages(root, shards=1, script=script)[0]
    stage = replace(stage, resources=stage.resources.model_copy(update={"ranks_per_node": 3}))
    assert LocalScheduler(toy.plan(root, [stage])).run() == 0
    assert (root / "a" / "0.txt").read_text() == "rank1 local1 rank2 local2"


def test_a_crashed_rank_takes_the_others_down(tmp_path: Path) -> None:
    """When one rank dies the other, which would wait for ever, is signalled to end; the whole counts as a crash."""
    root = tmp_path / "run"
    script = f"import os, sys, time\nif os.environ['RANK'] == '1': os._exit(9)\ntime.sleep({SLEEP})\n"
    stage = toy.two_stages(root, shards=1, script=script)[0]
    stage = replace(stage, resources=stage.resources.model_copy(update={"ranks_per_node": 2}))
    plan = toy.plan(root, [stage], {"retries": {"without_progress": 1}})
    started = time.monotonic()
    assert LocalScheduler(plan).run() == 1
    assert time.monotonic() - started < SLEEP
    assert events(root)[-1]["event"] == "failed"


LAUNCHER = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from tests import toy\n"
    "from snakmodel.launch.local_scheduler import LocalScheduler\n"
    "root = pathlib.Path(sys.argv[2])\n"
    "sys.exit(LocalScheduler(toy.plan(root, toy.two_stages(root, script=sys.argv[3]))).run())\n"
)


def launcher(root: Path, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(Path(__file__).parents[2]), str(root), script])


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


SLOW = (
    "import os, sys, time, pathlib\n"
    "p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); (p.parent / 'pid').write_text(str(os.getpid()))\n"
    "pathlib.Path(str(p) + '.started').touch(); time.sleep(600)\n"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    """However the launcher ends, its tasks end with it, nothing is published, and running again completes the chain."""
    root = tmp_path / "run"
    process = launcher(root, SLOW)
    wait_for(root / "a" / "0.txt.started")
    child = int((root / "a" / "pid").read_text())
    process.send_signal(how)
    assert process.wait(timeout=600) != 0
    end = time.monotonic() + PATIENCE
    while alive(child):
        assert time.monotonic() < end, "the task outlived its launcher"
        time.sleep(0.05)
    assert not (root / "markers").exists()
    assert LocalScheduler(toy.plan(root, toy.two_stages(root))).run() == 0
    assert (root / "c.txt").read_text() == "0.txt1.txt2.txt"


def test_superseded_attempt_is_killed(tmp_path: Path) -> None:
    """When the claim file names another attempt, the running one ends its command and writes no marker."""
    root = tmp_path / "run"
    process = launcher(root, SLOW)
    wait_for(root / "a" / "0.txt.started")
    claim = root / "claims" / "first" / "00000.json"
    claim.write_text(json.dumps({"attempt": "another", "job": "another", "restart": 0}))
    log = tmp_path / "logs" / "run" / "first" / "00000.out"
    end = time.monotonic() + PATIENCE
    while "superseded" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=600)
    assert not marker_path(root, "first", 0).exists()


def test_missing_input_is_refused_without_retries(tmp_path: Path) -> None:
    """A task whose input has no marker is refused once with exit code 3 and says what to do."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root))
    path = plan.write_task_list(plan.chain["second"], sys.executable)
    environment = {**os.environ, "SNAKMODEL_JOB": "t"}
    ran = subprocess.run(
        [sys.executable, "-m", "snakmodel.job.driver", str(path), "--pack", "0"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 3
    assert "input from stage first, task 0: it has no readable done marker. Run jobs/submit_all.py again" in ran.stderr


def test_driver_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    """A pack that does not exist and a file that is no task list are each one clear line."""
    root = tmp_path / "run"
    path = toy.plan(root, toy.two_stages(root)).write_task_list(toy.two_stages(root)[0], sys.executable)
    for arguments, words in (([str(path), "--pack", "9"], "packs 0 to 2, not 9"), ([__file__], "not a task list")):
        ran = subprocess.run([sys.executable, "-m", "snakmodel.job.driver", *arguments], capture_output=True, text=True)
        assert ran.returncode != 0
        assert words in ran.stderr
        assert "Traceback" not in ran.stderr


def test_resources_are_respected(tmp_path: Path) -> None:
    """Never more cores are in use than there are; a task that wants more than all of them runs alone."""
    root = tmp_path / "run"
    script = (
        "import sys, time, pathlib\n"
        "d = pathlib.Path(sys.argv[1]).parent; d.mkdir(exist_ok=True)\n"
        "me = pathlib.Path(sys.argv[1] + '.busy'); me.touch(); (d / f'seen{len(list(d.glob(\"*.busy\")))}').touch()\n"
        "time.sleep(0.5); me.unlink()\n"
    ) + toy.PUBLISH
    first: Stage = toy.two_stages(root, shards=4, script=script)[0]
    first = replace(first, resources=first.resources.model_copy(update={"cpus": 2}))
    assert LocalScheduler(toy.plan(root, [first], {"local": {"cpus": 4}})).run() == 0
    assert (root / "a" / "seen2").exists()
    assert not (root / "a" / "seen3").exists()


def test_equal_errors_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards that fail in the same way are one block with their numbers; another error has a block of its own."""
    script = (
        "import sys\nn = int(sys.argv[1].rpartition('/')[2][0])\n"
        "print(f'error: line {n} of {n}.txt is damaged' if n != 3 else 'error: the disk is full', file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=6, script=script)[:1])).run() == 1
    err = capsys.readouterr().err
    assert err.count("The end of ") == 2
    assert "first, packs 0-2,4-5 in the same way: failed (exit code" in err
    assert "first, pack 3: failed (exit code" in err
    assert err.count("is damaged") == 1
    assert err.count("the disk is full") == 1


def test_the_bar_of_a_training_counts_iterations(tmp_path: Path) -> None:
    """On a terminal the bar shows how many of the iterations are done, and is full at the end."""
    root = tmp_path / "run"
    scheduler = LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1)))
    console = Console(force_terminal=True, file=io.StringIO())
    report = _Report(console, Progress(console=console))
    stage = replace(toy.two_stages(root, shards=1)[0], name="train", progress="checkpoints/tracker")
    scheduler.running = [_StartedPack(stage, 0, 1)]
    report.begin("train", 1)
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "metrics.jsonl").write_text('{"iteration": 3, "lm_loss": 1.0}\n')
    scheduler._look_at_training(report)
    assert [(bar.completed, bar.total) for bar in report.bars.tasks] == [(3, 4)]
    report.advance("train", 0)
    assert [(bar.completed, bar.total) for bar in report.bars.tasks] == [(4, 4)]
