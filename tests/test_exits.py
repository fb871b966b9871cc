"""Every way out ends within seconds and with the right code, also where nothing can be printed any more."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snakmodel.dedup.process_pool import pool
from snakmodel.job.watchdog import dump_and_kill, log_size
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.run.attempts import Attempt, ExitRecord
from snakmodel.run.markers import Marker, marker_path
from snakmodel.slurm import own_job
from tests import toy

FULL = Path("/dev/full")
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENDS = """
import os, sys
from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, Superseded, UserError

def fails(error):
    raise error

CASES = {
    "prints": lambda: print("counts"),
    "prints, then again": lambda: sys.stdout.write("x") and 75,
    "mistake": lambda: fails(UserError("m")),
    "inputs missing": lambda: fails(InputsMissing("m")),
    "superseded": lambda: fails(Superseded("m")),
    "traceback": lambda: fails(ValueError("m")),
    "words": lambda: sys.exit("words"),
    "stopped": lambda: sys.exit(75),
    "silent": lambda: 76,
}
for name, main in CASES.items():
    sys.stdout.flush()
    if not (child := os.fork()):
        for descriptor in (1, 2):
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        run_main(main)
    print(f"{name}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
"""


@pytest.fixture
def full() -> Iterator[Any]:
    """A stream to a full disk, which fails when it is flushed."""
    stream = FULL.open("w")
    yield stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stream.close()


def test_exit_codes_where_nothing_can_be_printed() -> None:
    """With stdout and stderr on a full disk every command's exit code is what it is elsewhere, and 74 where the command
    would have ended well but what it had to say is lost."""
    ran = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, env=BUFFERED)
    assert dict(line.split(": ") for line in ran.stdout.splitlines()) == {
        "prints": "74",
        "prints, then again": "75",
        "mistake": "2",
        "inputs missing": "3",
        "superseded": "1",
        "traceback": "1",
        "words": "1",
        "stopped": "75",
        "silent": "76",
    }, ran.stderr


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    """As in `jobs/status.py | head`: exit code 1, nothing on stderr."""
    code = "from run_contract.entry_point import run_main; run_main(lambda: print('x' * 100000))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_a_driver_and_its_ranks_on_a_full_log(tmp_path: Path) -> None:
    """The task runs, its supervisor leaves an exit record, and the driver writes the marker and exits 0."""
    root = tmp_path / "run"
    plan = toy.plan(root, toy.two_stages(root, shards=1))
    path = plan.write_task_list(plan.chain["first"], sys.executable)
    with FULL.open("w") as log:
        ran = subprocess.run(
            [sys.executable, "-m", "snakmodel.job.driver", str(path), "--pack", "0"],
            stdout=log, stderr=log, env={**BUFFERED, "SNAKMODEL_JOB": "t"},
        )  # fmt: skip
    assert ran.returncode == 0
    record = ExitRecord.read(ExitRecord.path(next((root / "attempts" / "first" / "00000").iterdir()), 0, 0))
    assert record is not None
    assert record.code == 0
    assert Marker.read(marker_path(root, "first", 0)) is not None


def test_a_hung_command_is_killed_although_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """The stacks go nowhere; the process ends."""
    process = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(sys, "stderr", full)
    dump_and_kill(process.pid, 0)
    assert process.wait(timeout=60) < 0


def test_a_closed_log_has_no_size() -> None:
    """The watchdog has nothing to watch then, and the driver goes on."""
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    assert log_size(write) is None


def test_a_job_is_requeued_although_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """Slurm is asked until it agrees."""
    answers = [1, 0]

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        code = answers.pop(0) if words[0] == "requeue" else 1
        return subprocess.CompletedProcess(words, code, "", "busy")

    monkeypatch.setattr(own_job, "_scontrol", ask)
    monkeypatch.setattr(own_job.time, "sleep", lambda _: None)
    monkeypatch.setattr(sys, "stdout", full)
    assert own_job.requeue(Attempt("7", 0), "preempted", lambda: None).result == "requeued"
    assert answers == []


SAVES = (
    "import os, pathlib, signal, sys, time\n"
    "def save(*_):\n"
    "    p.with_name('saved').touch(); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.with_name('started').touch(); time.sleep(600)\n"
)
WAITS = (
    "import pathlib, sys, time\n"
    "while not pathlib.Path(sys.argv[1]).parent.with_name('slow').joinpath('started').exists(): time.sleep(0.02)\n"
) + toy.PUBLISH


def test_what_runs_here_saves_when_nothing_can_be_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Any
) -> None:
    """When the line of a finished stage cannot be printed, the embedded scheduler tells the others to save, waits for
    them, and ends in that error; run again it continues."""
    root = tmp_path / "run"
    quick = toy.two_stages(root, shards=1, script=WAITS)[0]
    slow = replace(quick, name="slow", tasks=(toy.task(root, "slow/0.txt", script=SAVES),))
    scheduler = LocalScheduler(toy.plan(root, [quick, slow]))
    scheduler.cores = 2
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        scheduler.run()
    monkeypatch.undo()
    assert (root / "slow" / "saved").exists()
    assert Marker.read(marker_path(root, "first", 0)) is not None
    assert toy.plan(root, [quick, slow]).missing == {"first": [], "slow": [0]}


def test_a_pool_does_not_wait_for_what_still_works() -> None:
    """An error of one task kills the processes of the others, however long they would take."""
    with pytest.raises(TypeError), pool(2) as run:
        run("sleeping", time.sleep, [(600,), ("x",), *[(600,)] * 100])
