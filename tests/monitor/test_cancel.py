"""Cancelling local runs with real processes, and what is refused."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from snakmodel.launch.local_scheduler import LocalScheduler
from tests import toy
from tests.launch.test_local_scheduler import SLOW, alive, wait_for

PROJECT = Path(__file__).resolve().parents[2]
HOLDING = (
    "import sys, pathlib; from tests import toy; from snakmodel.launch.local_scheduler import LocalScheduler\n"
    "from snakmodel.run.lock import run_lock\n"
    "root = pathlib.Path(sys.argv[1])\n"
    "with run_lock(root): code = LocalScheduler(toy.plan(root, toy.two_stages(root, 1, sys.argv[2]))).run()\n"
    "sys.exit(code)\n"
)


def cancel(*arguments: str | Path, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run jobs/cancel.py, at a terminal that answers if an answer is given."""
    command = [sys.executable, str(PROJECT / "jobs" / "cancel.py"), *map(str, arguments)]
    if answer is None:
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    user, terminal = pty.openpty()
    try:
        os.write(user, f"{answer}\n".encode())
        return subprocess.run(command, capture_output=True, text=True, stdin=terminal, timeout=600)
    finally:
        os.close(user)
        os.close(terminal)


def test_a_local_run_is_signalled_to_stop(tmp_path: Path) -> None:
    """Without a terminal or after `n` nothing happens; after `y` launcher and task end, and the chain can go on."""
    root = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(root), SLOW], cwd=PROJECT)
    try:
        wait_for(root / "a" / "0.txt.started")
        child = int((root / "a" / "pid").read_text())
        refused = cancel(root)
        assert refused.returncode == 2
        assert "Add --yes" in refused.stderr
        assert cancel(root, answer="n").returncode == 2
        assert "only be stopped as a whole" in cancel(root, "--stage", "first", "--yes").stdout
        assert process.poll() is None
        done = cancel(root, answer="y")
        assert done.returncode == 0, done.stderr
        assert f"process {process.pid} was signalled to stop" in done.stdout
        assert process.wait(timeout=600) != 0
        assert not alive(child)
    finally:
        process.kill()
        process.wait()
    assert '"event": "cancel"' in (root / "events.jsonl").read_text()
    assert "Nothing to cancel" in cancel(root).stdout
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, 1))).run() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere/run"], "there is no folder"), (["RUN", "--stage", "fist"], "Did you mean first?")],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    """A run or stage that does not exist is one clear line."""
    root = tmp_path / "run"
    LocalScheduler(toy.plan(root, toy.two_stages(root, 1))).run()
    done = cancel(*(str(root) if one == "RUN" else one for one in arguments))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_launcher_elsewhere_is_not_touched(tmp_path: Path) -> None:
    """A lock of another host, or of a process that is gone, leads to no signal."""
    root = tmp_path / "run"
    LocalScheduler(toy.plan(root, toy.two_stages(root, 1))).run()
    (root / "lock").write_text('{"host": "elsewhere", "pid": 1, "process_start": "1", "since": "now"}')
    done = cancel(root, "--yes")
    assert "stop it there" in done.stdout
    assert "Nothing to cancel" in done.stdout
    (root / "lock").write_text(f'{{"host": "{os.uname().nodename}", "pid": {os.getpid()}, "process_start": "1"}}')
    assert cancel(root, "--yes").stdout.startswith("Nothing to cancel")
