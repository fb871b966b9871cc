"""The parent of one rank, as a real process: what the command gets from it, and what its exit record says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import InputsMissing
from snakmodel.job import supervisor
from snakmodel.job.supervisor import find_rendezvous, open_rendezvous, python_of
from snakmodel.run.attempt_files import hung_path, started_path
from snakmodel.run.attempts import Attempt, claim_path, take_claim
from snakmodel.run.task_list import TaskList
from tests import toy
from tests.conftest import PATIENCE

WRITE = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
"""Writes the environment of the command."""
WAITS = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"


class Rank:
    """A task of the toy chain's first stage, and the supervisors of its ranks."""

    def __init__(self, folder: Path, script: str, ranks: int = 1, **fields: Any) -> None:
        self.root = folder / "run"
        plan = toy.plan(self.root, toy.two_stages(self.root, shards=1, script=script)[:1])
        self.path = plan.write_task_list(plan.chain["first"], sys.executable)
        replace(TaskList.read(self.path), ranks_per_node=ranks, **fields).write(self.path)
        self.output = self.root / "a" / "0.txt"
        self.output.parent.mkdir()
        self.folder = self.root / "attempts" / "first" / "00000" / "job.r0"
        self.folder.mkdir(parents=True)

    def start(self, rank: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Start a supervisor as the driver does on this machine."""
        scrubbed = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SNAKMODEL_"))}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SNAKMODEL_FORWARD": "1", "SNAKMODEL_ATTEMPT": "job.r0"}
        command = [sys.executable, "-m", "snakmodel.job.supervisor", str(self.path), "--task", "0"]
        return subprocess.Popen(
            [*command, "--folder", str(self.folder)],
            env={**scrubbed, **own, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_for_command(self, process: subprocess.Popen[str]) -> None:
        """Wait until the command runs."""
        end = time.monotonic() + PATIENCE
        while not self.output.exists():
            assert time.monotonic() < end, "the command did not start"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

    def record(self, rank: int = 0) -> dict[str, Any]:
        """The exit record of a rank."""
        found: dict[str, Any] = json.loads((self.folder / f"task-00000.rank-{rank:04d}.json").read_text())
        return found


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, output


@pytest.mark.parametrize(("exits", "code"), [(0, 0), (75, 0), (76, 0), (5, 5), (74, 74)])
def test_orderly_ends_are_zero(tmp_path: Path, exits: int, code: int) -> None:
    """srun kills the other ranks only after a crash; the record holds the command's own code."""
    rank = Rank(tmp_path, f"import sys; sys.exit({exits})")
    found, output = end(rank.start())
    assert found == code
    record = rank.record()
    assert (record["code"], record["rank"], record["attempt"]) == (exits, 0, "job.r0")
    assert (record["signalled"], record["hung"], record["iteration"]) == ("", False, None)
    assert started_path(rank.folder, 0).exists()
    assert output.startswith("=== first task 0 | attempt job.r0 | 1 rank(s) | ")


def test_what_the_command_gets(tmp_path: Path) -> None:
    """Its rank, the stage's environment and its heartbeat file, but not the supervisor's own variables."""
    rank = Rank(tmp_path, WRITE, environment={"EXTRA": "1"}, interface="lo")
    assert end(rank.start())[0] == 0
    found = json.loads(rank.output.read_text())
    wanted = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "EXTRA": "1",
        "PYTHONFAULTHANDLER": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
        "SNAKMODEL_HEARTBEAT": str(rank.folder / "task-00000.rank-0000.alive"),
    }  # fmt: skip
    assert {name: found.get(name) for name in wanted} == wanted
    assert "SNAKMODEL_FORWARD" not in found
    assert "MASTER_ADDR" not in found


def test_ranks_find_each_other(tmp_path: Path) -> None:
    """Both ranks get the same address, and rank 0 also the socket that listens on it."""
    script = (
        "import json, os, socket, sys\n"
        "address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
        "if os.environ['RANK'] == '0':\n"
        "    peer = socket.socket(fileno=int(os.environ['MASTER_LISTEN_FD'])).accept()[0]\n"
        "    open(sys.argv[1], 'wb').write(peer.recv(100))\n"
        "else:\n"
        "    socket.create_connection(address).sendall(b'rank ' + os.environ['RANK'].encode())\n"
    )
    rank = Rank(tmp_path, script, ranks=2)
    both = [rank.start(number) for number in (1, 0)]
    assert [end(process)[0] for process in both] == [0, 0]
    assert rank.output.read_text() == "rank 1"
    assert [rank.record(number)["rank"] for number in (0, 1)] == [0, 1]


def test_a_signal_is_passed_on_and_recorded(tmp_path: Path) -> None:
    """The first signal counts; a command that it ends has minus its number as a code."""
    rank = Rank(tmp_path, WAITS)
    process = rank.start()
    rank.wait_for_command(process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 128 + signal.SIGTERM
    record = rank.record()
    assert (record["code"], record["signalled"]) == (-signal.SIGTERM, "SIGTERM")


def test_slurm_signals_the_command_itself(tmp_path: Path) -> None:
    """Without the driver's word the signal is recorded and not passed on."""
    rank = Rank(tmp_path, f"{WAITS.split('time.sleep')[0]} time.sleep(3)")
    process = rank.start(SNAKMODEL_FORWARD="")
    rank.wait_for_command(process)
    process.send_signal(signal.SIGUSR2)
    assert end(process)[0] == 0
    assert (rank.record()["code"], rank.record()["signalled"]) == (0, "SIGUSR2")


def test_a_hung_command_shows_its_stacks_and_is_killed(tmp_path: Path) -> None:
    """The driver's watchdog leaves a file, and the supervisor acts on it."""
    rank = Rank(tmp_path, WAITS)
    process = rank.start()
    rank.wait_for_command(process)
    hung_path(rank.folder, 0).touch()
    code, output = end(process)
    assert code > 0
    assert "rank 0 hangs; stacks of its threads" in output
    assert "most recent call first" in output
    assert (rank.record()["hung"], rank.record()["code"] < 0) == (True, True)


def test_a_replaced_attempt_is_ended(tmp_path: Path) -> None:
    """When a later start takes the claim, the command is killed and no record is left."""
    rank = Rank(tmp_path, WAITS)
    claim = claim_path(rank.root, "first", 0)
    take_claim(claim, Attempt("job", 0))
    process = rank.start(SNAKMODEL_CLAIM=str(claim))
    rank.wait_for_command(process)
    take_claim(claim, Attempt("job", 1))
    code, output = end(process)
    assert code != 0
    assert "attempt job.r0 was replaced by job.r1" in output
    event = json.loads((rank.root / "events.jsonl").read_text())
    assert (event["event"], event["pack"], event["attempt"]) == ("superseded", 0, "job.r0")
    assert not (rank.folder / "task-00000.rank-0000.json").exists()


def test_a_claimed_task_needs_the_jobs_environment(tmp_path: Path) -> None:
    """Without it a later attempt could not keep this one from publishing, so the command is not started."""
    rank = Rank(tmp_path, WRITE)
    take_claim(claim_path(rank.root, "first", 0), Attempt("job", 0))
    code, output = end(rank.start())
    assert code == 2
    assert "was started without SNAKMODEL_CLAIM" in output
    assert not rank.output.exists()


def test_python_of(tmp_path: Path) -> None:
    """A leading `python` stands for the run's interpreter; other commands stay."""
    tasks = replace(TaskList.read(Rank(tmp_path, WRITE).path), python="/venv/bin/python")
    assert python_of(tasks, ["python", "-m", "x"]) == ["/venv/bin/python", "-u", "-m", "x"]
    assert python_of(tasks, ["bash", "x.sh"]) == ["bash", "x.sh"]


def test_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 publishes an address that is taken; the others wait for it, and give up in the end."""
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR", raising=False)
    path = tmp_path / "rendezvous.json"
    found: list[tuple[str, int]] = []
    waits = threading.Thread(target=lambda: found.append(find_rendezvous(path)))
    waits.start()
    with open_rendezvous(path, "lo") as listener:
        waits.join(timeout=PATIENCE)
        assert found == [("127.0.0.1", listener.getsockname()[1])]
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("0.0.0.0", found[0][1]))
    monkeypatch.setattr(supervisor, "_RENDEZVOUS_SECONDS", 0)
    with pytest.raises(InputsMissing, match=r"rank 0 did not publish its address in .* within 0 s"):
        find_rendezvous(tmp_path / "other.json")
