"""python -m snakmodel.job.supervisor TASKLIST --task I --folder ATTEMPT_FOLDER

The small parent of one rank: gives the command its rank and rendezvous, runs it, and writes its exit record.

A file task-….hung in the attempt's folder, made by the driver's watchdog, tells the supervisor to print the command's
stacks and to kill it. The supervisor exits with 0 whenever the command ended in an orderly way (0, 75, 76), so that
srun kills the other ranks only after a crash. What to do next is decided by the driver, from the records of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from run_contract.claim import ATTEMPT_VARIABLE, CLAIM_VARIABLE, attempt_name, check_claim
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_AGAIN, EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, InputsMissing, Superseded
from run_contract.output import say
from run_contract.process import die_with_parent
from run_contract.publish import write_json
from snakmodel.job.containers import contain, inner_python
from snakmodel.job.watchdog import cpu_seconds, dump_and_kill, kill_tree
from snakmodel.run.attempt_files import (
    FORWARD_VARIABLE,
    HEARTBEAT_VARIABLE,
    alive_path,
    hung_path,
    read_progress,
    started_path,
)
from snakmodel.run.attempts import ExitRecord, claim_path, log_event
from snakmodel.run.task_list import TaskList

_RENDEZVOUS_SECONDS = 300
_LOOK_SECONDS = 5
_BUSY_SHARE = 0.05


def python_of(tasks: TaskList, argv: list[str]) -> list[str]:
    """The command, with a leading `python` replaced by the run's interpreter, or by that of the container."""
    return [inner_python(tasks), "-u", *argv[1:]] if argv[0] == "python" else argv


def rank_environment(tasks: TaskList) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of this rank, from srun's variables or the local driver's."""
    env = os.environ
    return {
        "RANK": env.get("SLURM_PROCID") or env["RANK"],
        "LOCAL_RANK": env.get("SLURM_LOCALID") or env["LOCAL_RANK"],
        "WORLD_SIZE": str(tasks.ranks),
        "LOCAL_WORLD_SIZE": str(tasks.ranks_per_node),
    }


def open_rendezvous(path: Path, interface: str | None) -> socket.socket:
    """Listen on a free port, as rank 0 does, and publish the address and the port in a file.

    The command inherits the socket, so that no other process can take the port.
    """
    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen(4096)
    listener.set_inheritable(True)
    address = _interface_address(interface) if interface else os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    write_json(path, {"address": address, "port": listener.getsockname()[1]})
    return listener


def _interface_address(interface: str) -> str:
    """The IPv4 address of a network interface."""
    import fcntl
    import struct

    request_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), request_address, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def find_rendezvous(path: Path) -> tuple[str, int]:
    """Wait for the address and port of rank 0, as all other ranks do.

    Raises InputsMissing if they do not appear in time.
    """
    end = time.monotonic() + _RENDEZVOUS_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise InputsMissing(f"rank 0 did not publish its address in {path} within {_RENDEZVOUS_SECONDS} s")
        time.sleep(0.05)
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["address"], found["port"]


class Supervisor:
    """Supervises one rank of one task."""

    def __init__(self, path: Path, index: int, folder: Path) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.signalled: int | None = None
        """The first signal with which this process was signalled."""
        self.hung = False
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.tasks = TaskList.read(path)
        self.index = index
        self.folder = folder

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = self.signalled or number
        if os.environ.get(FORWARD_VARIABLE) and self.child is not None:
            self.child.send_signal(number)

    def run(self) -> int:
        """Run the command to its end, write the exit record, and return this process's exit code.

        Raises Superseded, and logs that as an event, when another attempt has taken the claim.
        """
        try:
            return self._run()
        except Superseded as error:
            details = {"pack": self._pack(), "attempt": attempt_name(), "task": self.index, "reason": str(error)}
            with suppress(OSError):
                log_event(self.tasks.root, self.tasks.stage, "superseded", **details)
            raise

    def _pack(self) -> int:
        """The number of the pack that holds the task."""
        return next(number for number, pack in enumerate(self.tasks.packs) if self.index in pack)

    def _run(self) -> int:
        started = time.monotonic()
        environment = {
            "PYTHONFAULTHANDLER": "1",
            **os.environ,
            **self.tasks.environment,
            **rank_environment(self.tasks),
        }
        environment.pop(FORWARD_VARIABLE, None)
        if self.tasks.interface:
            environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.tasks.interface)
        rank = int(environment["RANK"])
        environment[HEARTBEAT_VARIABLE] = str(alive_path(self.folder.absolute(), self.index, rank))
        self._banner(rank)
        inherited: tuple[int, ...] = ()
        if self.tasks.ranks > 1:
            inherited = self._rendezvous(rank, environment)
        code = self._run_command(environment, inherited, rank)
        record = ExitRecord(
            attempt=os.environ.get(ATTEMPT_VARIABLE, ""),
            rank=rank,
            code=code,
            iteration=read_progress(self.tasks),
            node=os.environ.get("SLURMD_NODENAME", os.uname().nodename),
            seconds=round(time.monotonic() - started, 1),
            signalled=signal.Signals(self.signalled).name if self.signalled else "",
            hung=self.hung,
        )
        write_json(ExitRecord.path(self.folder, self.index, rank), asdict(record))
        return 0 if code in (EXIT_DONE, EXIT_AGAIN, EXIT_STOPPED) else (code if code > 0 else 128 - code)

    def _run_command(self, environment: dict[str, str], inherited: tuple[int, ...], rank: int) -> int:
        """Run the command and return its exit code, or minus the signal that ended it or that came before its start."""
        if self.signalled is not None:
            return -self.signalled
        if CLAIM_VARIABLE not in os.environ and claim_path(self.tasks.root, self.tasks.stage, self._pack()).exists():
            say(
                f"error: rank {rank} was started without {CLAIM_VARIABLE}, although this task is claimed: a later "
                "attempt could not keep it from publishing. srun has to pass the job's environment on to the ranks; "
                "look for what keeps it from that here, such as a wrapper of srun.",
                error=True,
            )
            return EXIT_USER_ERROR
        command = python_of(self.tasks, self.tasks.tasks[self.index].argv)
        command, inherited = contain(self.tasks, command, environment, inherited)
        self.child = subprocess.Popen(
            command, cwd=self.tasks.project, env=environment, pass_fds=inherited, preexec_fn=die_with_parent
        )
        if self.signalled is not None and os.environ.get(FORWARD_VARIABLE):
            self.child.send_signal(self.signalled)
        return self._wait(rank)

    def _rendezvous(self, rank: int, environment: dict[str, str]) -> tuple[int, ...]:
        path = self.folder / f"task-{self.index:05d}.rendezvous.json"
        if rank:
            environment["MASTER_ADDR"], port = find_rendezvous(path)
            environment["MASTER_PORT"] = str(port)
            return ()
        listener = open_rendezvous(path, self.tasks.interface)
        environment["MASTER_ADDR"], port = find_rendezvous(path)
        environment["MASTER_PORT"] = str(port)
        environment["MASTER_LISTEN_FD"] = str(listener.detach())
        return (int(environment["MASTER_LISTEN_FD"]),)

    def _wait(self, rank: int) -> int:
        """Wait for the child; kill it if another attempt takes the claim meanwhile, or if the watchdog asks for it."""
        assert self.child is not None
        used = 0.0
        while True:
            try:
                return self.child.wait(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                used = self._show_life(used)
                if hung_path(self.folder, self.index).exists():
                    self.hung = True
                    dump_and_kill(self.child.pid, rank)
                    return self.child.wait()
            try:
                check_claim()
            except Superseded:
                kill_tree(self.child.pid)
                self.child.wait()
                raise
            except OSError:
                continue

    def _show_life(self, used: float) -> float:
        """Show the watchdog that a single process computes although it is silent; return its processor time so far.

        This is not done for several ranks, since one of them may spin while it waits for a peer that is lost.
        """
        assert self.child is not None
        if self.tasks.ranks > 1 or self.tasks.resumable:
            return used
        now = cpu_seconds(self.child.pid)
        if now - used < _BUSY_SHARE * _LOOK_SECONDS:
            return used
        with suppress(OSError):
            alive_path(self.folder, self.index, 0).touch()
        return now

    def _banner(self, rank: int) -> None:
        if rank == 0:
            started_path(self.folder, self.index).touch()
            cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
            say(
                f"=== {self.tasks.stage} task {self.index} | attempt {os.environ.get(ATTEMPT_VARIABLE, 'by hand')} | "
                f"{self.tasks.ranks} rank(s) | {os.uname().nodename}, cores {cores} | {time.strftime('%F %T')} ==="
            )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m snakmodel.job.supervisor", description=__doc__.splitlines()[2])
    parser.add_argument("tasklist", type=Path, help="the stage's task list")
    parser.add_argument("--task", type=int, required=True, help="number of the task in the list")
    parser.add_argument("--folder", type=Path, required=True, help="the attempt's folder, for the exit record")
    args = parser.parse_args()
    return Supervisor(args.tasklist, args.task, args.folder).run()


if __name__ == "__main__":
    run_main(main)
