"""One attempt at a pack, made by a real driver process without Slurm: exit codes, markers, events, records."""

from __future__ import annotations

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

from run_contract.errors import EXIT_AGAIN, EXIT_DONE, EXIT_INPUTS_MISSING, EXIT_STOPPED
from snakmodel.chain.stage import Stage
from snakmodel.run.attempts import Attempt, claim_path, take_claim
from snakmodel.run.markers import Marker, marker_path
from tests import toy
from tests.conftest import PATIENCE

WAITS = (
    "import pathlib, signal, sys, time\n"
    "def leave(*_): sys.exit({code})\n"
    "signal.signal(signal.SIGTERM, leave)\n"
    "pathlib.Path(sys.argv[1] + '.started').touch()\n"
    "time.sleep(600)\n"
)
"""Waits until it is signalled, and then exits with a code."""


class Pack:
    """A pack of the toy chain's first stage and the driver that works on it."""

    def __init__(self, folder: Path, script: str = toy.PUBLISH, shards: int = 2, **retries: int) -> None:
        self.root = folder / "run"
        stage = replace(toy.two_stages(self.root, shards, script)[0], resumable=True)
        self.tasks = self.write(stage, shards, **retries)

    def write(self, stage: Stage, shards: int, **retries: int) -> Path:
        """Write the task list of a stage whose tasks are all in one pack."""
        plan = toy.plan(self.root, [stage], {"retries": retries}, pack=shards)
        return plan.write_task_list(plan.chain[stage.name], sys.executable)

    def start(self, restart: int = 0, pack: int = 0) -> subprocess.Popen[str]:
        """Start the driver as the embedded scheduler does."""
        scrubbed = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SNAKMODEL_"))}
        return subprocess.Popen(
            [sys.executable, "-m", "snakmodel.job.driver", str(self.tasks), "--pack", str(pack)], text=True,
            env={**scrubbed, "SNAKMODEL_JOB": "job", "SNAKMODEL_RESTART": str(restart)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, restart: int = 0, pack: int = 0) -> tuple[int, str]:
        """The driver's exit code, and what it printed."""
        driver = self.start(restart, pack)
        output = driver.communicate(timeout=PATIENCE)[0]
        return driver.returncode, output

    def signal_when(self, name: str) -> int:
        """Start the driver, end it by TERM as soon as there is a file, and return its exit code."""
        driver = self.start()
        end = time.monotonic() + PATIENCE
        while not (self.root / name).exists():
            assert time.monotonic() < end, f"{name} did not appear"
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.05)
        driver.send_signal(signal.SIGTERM)
        driver.communicate(timeout=PATIENCE)
        return driver.returncode

    def events(self) -> list[str]:
        """What was logged."""
        return [json.loads(line)["event"] for line in (self.root / "events.jsonl").read_text().splitlines()]

    def attempt(self, restart: int, name: str) -> dict[str, Any]:
        """A file of an attempt."""
        found: dict[str, Any] = json.loads(
            (self.root / "attempts" / "first" / "00000" / f"job.r{restart}" / name).read_text()
        )
        return found

    def marked(self) -> list[int]:
        """The tasks that have a done marker."""
        return [index for index in range(2) if marker_path(self.root, "first", index).exists()]


def test_a_pack_that_is_done(tmp_path: Path) -> None:
    """Both tasks are marked, the claim names the attempt, and a second attempt has nothing to do."""
    pack = Pack(tmp_path)
    code, output = pack.run()
    assert (code, pack.marked(), pack.events()) == (EXIT_DONE, [0, 1], ["start", "done"])
    assert "--- first task 1: done" in output
    marker = Marker.read(marker_path(pack.root, "first", 0))
    assert marker is not None
    assert list(marker.outputs) == ["a/0.txt"]
    assert json.loads(claim_path(pack.root, "first", 0).read_text())["attempt"] == "job.r0"
    assert pack.attempt(0, "summary.json") == {
        "attempt": "job.r0", "outcome": "done", "progressed": True, "kind": "", "nodes": [],
    }  # fmt: skip
    assert pack.attempt(0, "task-00000.rank-0000.json")["code"] == 0
    code, output = pack.run(restart=1)
    assert (code, output.count("is done already")) == (EXIT_DONE, 2)
    assert pack.attempt(1, "summary.json")["progressed"] is False


@pytest.mark.parametrize(
    ("exits", "code", "outcome", "kind", "events"),
    [
        (EXIT_STOPPED, EXIT_STOPPED, "stopped", "", ["start", "stopped"]),
        (EXIT_AGAIN, EXIT_AGAIN, "again", "", ["start", "again"]),
        (2, EXIT_INPUTS_MISSING, "refused", "", ["start", "failed"]),
        (5, EXIT_AGAIN, "crashed", "crash", ["start", "crash", "again"]),
        (74, EXIT_AGAIN, "crashed", "disk-full", ["start", "crash", "again"]),
    ],
)
def test_what_comes_of_a_commands_exit_code(
    tmp_path: Path, exits: int, code: int, outcome: str, kind: str, events: list[str]
) -> None:
    """The first task's end is the pack's: it saved, it was stopped, it has to be corrected, or it crashed."""
    pack = Pack(tmp_path, f"import sys; sys.exit({exits})", shards=1)
    assert (pack.run()[0], pack.marked(), pack.events()) == (code, [], events)
    summary = pack.attempt(0, "summary.json")
    assert (summary["outcome"], summary["kind"]) == (outcome, kind)
    assert pack.attempt(0, "task-00000.rank-0000.json")["code"] == exits


def test_crashes_have_a_limit(tmp_path: Path) -> None:
    """The attempt after the last that is allowed is final."""
    pack = Pack(tmp_path, "import sys; sys.exit(5)", shards=1, crashes=1, without_progress=9)
    assert [pack.run(restart)[0] for restart in range(2)] == [EXIT_AGAIN, 1]
    assert pack.events() == ["start", "crash", "again", "start", "crash", "failed"]


def test_a_crash_does_not_keep_the_other_tasks_from_being_done(tmp_path: Path) -> None:
    """The pack goes on with its next task, and the next attempt does only what is left."""
    script = "import pathlib, sys\nif '0.txt' in sys.argv[1] and not pathlib.Path(sys.argv[1] + '.go').exists():\n"
    pack = Pack(tmp_path, f"{script}    sys.exit(5)\n{toy.PUBLISH}")
    assert (pack.run()[0], pack.marked()) == (EXIT_AGAIN, [1])
    (pack.root / "a" / "0.txt.go").touch()
    code, output = pack.run(restart=1)
    assert (code, pack.marked()) == (EXIT_DONE, [0, 1])
    assert "task 1 is done already" in output


def test_a_command_that_leaves_no_output_has_crashed(tmp_path: Path) -> None:
    """An exit code of 0 is not enough for a marker."""
    pack = Pack(tmp_path, "pass", shards=1)
    code, output = pack.run()
    assert (code, pack.marked()) == (EXIT_AGAIN, [])
    assert "error: first task 0: " in output
    assert "a/0.txt" in output


@pytest.mark.parametrize(("exits", "outcome"), [(EXIT_AGAIN, "again"), (EXIT_STOPPED, "stopped")])
def test_a_signal_reaches_the_command(tmp_path: Path, exits: int, outcome: str) -> None:
    """Without Slurm the driver passes the signal on; the command's answer is the pack's, and no later task starts."""
    (tmp_path / "run" / "a").mkdir(parents=True)
    pack = Pack(tmp_path, WAITS.format(code=exits))
    assert pack.signal_when("a/0.txt.started") == exits
    assert pack.attempt(0, "summary.json")["outcome"] == outcome
    assert pack.attempt(0, "task-00000.rank-0000.json")["signalled"] == "SIGTERM"
    assert not (pack.root / "a" / "1.txt.started").exists()


def test_a_later_start_holds_the_claim(tmp_path: Path) -> None:
    """An attempt that was thought lost ends without touching anything."""
    pack = Pack(tmp_path)
    take_claim(claim_path(pack.root, "first", 0), Attempt("job", 1))
    code, output = pack.run(restart=0)
    assert code != EXIT_DONE
    assert "a later start of job job already runs" in output
    assert (pack.marked(), pack.events()) == ([], ["superseded"])


def test_a_pack_that_the_list_does_not_have(tmp_path: Path) -> None:
    """The message says which packs there are."""
    code, output = Pack(tmp_path).run(pack=7)
    assert code != 0
    assert "has packs 0 to 0, not 7" in output
