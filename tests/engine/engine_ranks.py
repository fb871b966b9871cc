"""Run finetune.py as several real processes that meet over gloo, as a launcher starts them.

They are forked from a server that has imported torch once; each then runs the script itself from its first line.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FINETUNE = Path(__file__).parents[2] / "Megatron-LLM" / "finetune.py"
TIMEOUT = 60.0


def _rank(environment: dict[str, str], listener: socket.socket | None, argv: list[str], output: Path) -> None:
    os.environ.update(environment)
    if listener:
        os.environ["MASTER_LISTEN_FD"] = str(listener.detach())
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # stays open to the end of the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [str(FINETUNE), *argv]
    runpy.run_path(str(FINETUNE), run_name="__main__")


class Ranks:
    """The started processes of one run; output is in `folder`/rank-N.txt."""

    def __init__(self, folder: Path, argv: Sequence[object], size: int, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_llm.train", "torch._dynamo"])
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        for output in self.outputs:
            output.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            common = {
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(listener.getsockname()[1]),
            } | environment
            self.processes: list[Any] = []
            for rank, output in enumerate(self.outputs):
                own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                arguments = (own, listener if rank == 0 else None, [str(part) for part in argv], output)
                process = context.Process(target=_rank, args=arguments)
                process.start()
                self.processes.append(process)

    def pid(self, rank: int) -> int:
        """Process number of a rank."""
        return int(self.processes[rank].pid)

    def text(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        path = self.outputs[rank]
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Return when the rank has printed the text."""
        until = time.monotonic() + TIMEOUT
        while text not in self.text(rank):
            assert self.processes[rank].exitcode is None, self.text(rank)
            assert time.monotonic() < until, self.text(rank)
            time.sleep(0.002)

    def wait(self) -> list[int]:
        """Exit codes of all ranks; kills them when they hang."""
        until = time.monotonic() + TIMEOUT
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} ranks hang: {self.text(0)}"
        return [process.exitcode for process in self.processes]


def run(folder: Path, argv: Sequence[object], size: int = 2, **environment: str) -> tuple[list[int], str]:
    """Run to the end: exit codes and what rank 0 printed."""
    ranks = Ranks(folder, argv, size, environment)
    return ranks.wait(), ranks.text()
