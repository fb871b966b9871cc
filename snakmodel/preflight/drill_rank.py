"""python -m snakmodel.preflight.drill_rank FOLDER

What each rank of a drill does: a training job in small, started by the same driver, container and srun.

In the first attempt, each rank notes its cores, reads the file that the login node wrote, meets the other rank over
TCP, imports the packages, waits for the signal before the time limit and exits with 75; the driver then requeues the
job. In the second attempt, each rank notes that it started, and is done. Every note is a file
FOLDER/ATTEMPT.rank-N.json, which drill.py reads on the login node.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from run_contract.claim import attempt_name
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_AGAIN
from run_contract.publish import publishing, write_json, write_text

PACKAGES = ("numpy", "pyarrow", "sentencepiece", "torch", "datasets", "transformers", "huggingface_hub")
HELLO = "hello.txt"
REPORT = "report.txt"
_NETWORK_SECONDS = 60
_PAYLOAD = 1 << 24
_WAIT_SECONDS = 300


@dataclass
class Note:
    """What one rank saw in one attempt. Times are in seconds since 1970 by the node's clock."""

    attempt: str
    rank: int
    node: str
    started: float
    cores: int
    hello: str = ""
    network: str = ""
    network_problem: str = ""
    imports_seconds: float | None = None
    imports_problem: str = ""
    signal: str = ""
    signalled: float | None = None


class Rank:
    """Does what one rank of a drill has to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rank = int(os.environ["RANK"])
        node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        self.note = Note(attempt_name(), rank, node, time.time(), len(os.sched_getaffinity(0)))
        self.earlier = sorted(folder.glob(f"*.rank-{rank}.json"))
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.note.signal:
            self.note.signal, self.note.signalled = signal.Signals(number).name, time.time()

    def run(self) -> int:
        """Do what the module's docstring says, and return the exit code."""
        hello = self.folder / HELLO
        self.note.hello = hello.read_text(encoding="utf-8") if hello.exists() else ""
        self._write()
        if self.earlier:
            if self.note.rank == 0:
                with publishing(self.folder / REPORT) as (temporary,):
                    temporary.write_text("The drill was requeued and started again.\n")
            return 0
        self._meet()
        self._import()
        self._write()
        end = time.monotonic() + _WAIT_SECONDS
        while not self.note.signal and time.monotonic() < end:
            time.sleep(0.1)
        self._write()
        if self.note.rank == 0:
            write_text(self.folder / "progress", "1\n")
        return EXIT_AGAIN

    def _write(self) -> None:
        write_json(self.folder / f"{self.note.attempt}.rank-{self.note.rank}.json", asdict(self.note))

    def _meet(self) -> None:
        """Rank 0 sends some megabytes to every other rank; all of them note how it went."""
        ranks = int(os.environ["WORLD_SIZE"])
        if ranks == 1:
            return
        try:
            self.note.network = self._serve(ranks - 1) if self.note.rank == 0 else self._fetch()
        except OSError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            self.note.network_problem = f"{self.note.node} and rank 0 at {where}: {error}"

    def _serve(self, peers: int) -> str:
        descriptor = os.environ.get("MASTER_LISTEN_FD")
        if descriptor:
            listener = socket.socket(fileno=int(descriptor))
        else:
            listener = socket.create_server(("", int(os.environ["MASTER_PORT"])))
        listener.settimeout(_NETWORK_SECONDS)
        for _ in range(peers):
            peer, _address = listener.accept()
            with peer:
                peer.settimeout(_NETWORK_SECONDS)
                peer.sendall(bytes(_PAYLOAD))
                peer.recv(1)
        return f"{peers} rank(s) reached rank 0"

    def _fetch(self) -> str:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        end = time.monotonic() + _NETWORK_SECONDS
        while True:
            try:
                peer = socket.create_connection(address, timeout=_NETWORK_SECONDS)
                break
            except ConnectionRefusedError:  # in docker rank 0 binds the port again, after its container has started
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
        with peer:
            started, left = time.monotonic(), _PAYLOAD
            while left:
                part = peer.recv(1 << 20)
                if not part:
                    raise ConnectionError(f"the connection ended {left} bytes early")
                left -= len(part)
            seconds = time.monotonic() - started
            peer.sendall(b"x")
        return f"{address[0]}:{address[1]}, {_PAYLOAD / 1e6 / max(seconds, 1e-6):,.0f} MB/s"

    def _import(self) -> None:
        """Import the packages in a child process.

        The child ignores the signal, and this process goes on watching for it meanwhile.
        """
        code = f"import {', '.join(PACKAGES)}"
        started = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, preexec_fn=_ignore_signals
        )
        while child.poll() is None:
            if self.note.signal:
                child.kill()
                child.communicate()
                self.note.imports_problem = (
                    f"the packages were not imported {time.monotonic() - started:.0f} s after the start"
                )
                return
            time.sleep(0.1)
        self.note.imports_seconds = round(time.monotonic() - started, 1)
        _, said = child.communicate()
        if child.returncode:
            self.note.imports_problem = (said.strip().splitlines() or [f"exit code {child.returncode}"])[-1]


def _ignore_signals() -> None:
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.preflight.drill_rank", description=__doc__.splitlines()[2]
    )
    parser.add_argument("folder", type=Path, help="folder of the drill's notes")
    return Rank(parser.parse_args().folder).run()


if __name__ == "__main__":
    run_main(main)
