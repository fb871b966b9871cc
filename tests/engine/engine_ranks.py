"""Run finetune.py, or another script, as several real processes that meet over gloo, as a launcher starts them.

They are forked from a server that has imported torch once; each then runs the script itself from its first line.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

FINETUNE = Path(__file__).parents[2] / "Megatron-LLM" / "finetune.py"
TIMEOUT = 600.0
"""Seconds after which a rank hangs: far more than any needs on the busiest machine."""


def _finetune(argv: Sequence[str]) -> None:
    """The script from its first line; ends the process."""
    _script([str(FINETUNE), *argv])


def _script(argv: Sequence[str]) -> None:
    """A script, the first word, from its first line."""
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")


def held_finetune(argv: Sequence[str]) -> None:
    """The script, which waits where the file HELD says, `PHASE RANK`, until that file is gone; it prints `at PHASE`.

    Phases: `step`, `evaluate`, and `write`, which is in the thread that writes a checkpoint.
    """
    from megatron_llm.checkpoint import folder as checkpoint
    from megatron_llm.training.trainer import Trainer

    held, rank = Path(os.environ["HELD"]), os.environ["RANK"]

    def is_held(name: str) -> bool:
        try:
            return held.read_text() == f"{name} {rank}"
        except FileNotFoundError:
            return False

    def hold(owner: Any, name: str) -> None:
        act = getattr(owner, name)

        def waiting(*inputs: Any) -> Any:
            if is_held(name):
                print(f"at {name}", flush=True)
                while held.exists():
                    time.sleep(0.002)
            return act(*inputs)

        setattr(owner, name, waiting)

    hold(Trainer, "step")
    hold(Trainer, "evaluate")
    hold(checkpoint, "write")
    _finetune(argv)


def _several(argvs: Sequence[Sequence[str]]) -> None:
    """Several runs one after another in one world, each at its own layout; prints their exit codes.

    Before each checkpoint it is asserted that what tensor ranks hold copies of is the same to the bit, and before each
    global batch that the two ends of a pipeline have the same tied embedding.
    """
    import torch

    from megatron_llm.checkpoint.saver import Saver
    from megatron_llm.flags import parser as flags_parser
    from megatron_llm.parallel import world as parallel
    from megatron_llm.process import signals
    from megatron_llm.training import assemble, pipeline

    def checked(saver: Saver, parameters: Any, *more: Any) -> None:
        _assert_copies_equal(parameters)
        begin(saver, parameters, *more)

    def share(tied: pipeline.TiedEmbedding) -> None:
        copy(tied)
        _assert_ends_equal(tied)

    copy, pipeline.TiedEmbedding.share = pipeline.TiedEmbedding.share, share
    begin, Saver.begin = Saver.begin, checked  # type: ignore[method-assign]
    torch.set_num_threads(1)
    world = parallel.start()
    for argv in argvs:
        args = flags_parser.parse(argv)
        sizes = args.parallel.tensor_model_parallel_size, args.parallel.pipeline_model_parallel_size
        mesh = parallel.layout_mesh(world.device, world.size, *sizes)
        world.say(f"exit {assemble.run(args, replace(world, mesh=mesh), signals.StopRequest())}")
    sys.stdout.flush()
    os._exit(0)


def _assert_copies_equal(parameters: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            continue  # whole, on one rank only
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                own = parameter.to_local().detach()
                copies = [torch.empty_like(own) for _ in range(mesh.size(axis))]
                dist.all_gather(copies, own, group=mesh.get_group(axis))
                assert all(torch.equal(own, copy) for copy in copies), f"copies of {name} differ"


def _assert_ends_equal(tied: Any) -> None:
    import torch.distributed as dist

    from megatron_llm.training import pipeline

    own = [pipeline._slice(weight).tolist() for weight in (tied.embedding, tied.copy) if weight is not None]
    ranks: list[list[Any]] = [[] for _ in range(tied.group.size())]
    dist.all_gather_object(ranks, own, group=tied.group)
    held = [values for rank in ranks for values in rank]
    assert not held or (len(held) == 2 and held[0] == held[1]), "the copy of the embedding differs"


def _rank(
    environment: dict[str, str],
    listener: socket.socket | None,
    main: Callable[[Any], None],
    argv: Any,
    output: Path,
) -> None:
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)  # as a new interpreter does
    if listener:
        os.environ["MASTER_LISTEN_FD"] = str(listener.detach())
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # stays open to the end of the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    main(argv)


class Ranks:
    """The started processes of one run; output is in `folder`/rank-N.txt."""

    def __init__(
        self,
        folder: Path,
        argv: Sequence[object],
        size: int,
        environment: dict[str, str],
        main: Callable[[Any], None] = _finetune,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_llm.training.assemble", "torch._dynamo"])
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
                arguments = (own, listener if rank == 0 else None, main, _strings(argv), output)
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

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """Exit codes of all ranks; kills them when they hang."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} ranks hang: {self.text(0)}"
        return [process.exitcode for process in self.processes]


def _strings(argv: Any) -> Any:
    return [_strings(part) if isinstance(part, list) else str(part) for part in argv]


def run_script(script: Path, folder: Path, argv: Sequence[object], size: int) -> tuple[list[int], list[str]]:
    """Run another script to the end: exit codes and what each rank printed."""
    ranks = Ranks(folder, [script, *argv], size, {}, main=_script)
    return ranks.wait(), [ranks.text(rank) for rank in range(size)]


def run_several(folder: Path, argvs: Sequence[list[object]], size: int) -> str:
    """Run several command lines in one world of ranks: what rank 0 printed. Each must end with code 0 or 75."""
    ranks = Ranks(folder, argvs, size, {}, main=_several)
    codes = ranks.wait(TIMEOUT * len(argvs))
    assert codes == [0] * size, "\n".join(ranks.text(rank) for rank in range(size))
    return ranks.text()


def run(folder: Path, argv: Sequence[object], size: int = 2, **environment: str) -> tuple[list[int], str]:
    """Run to the end: exit codes and what rank 0 printed."""
    ranks = Ranks(folder, argv, size, environment)
    return ranks.wait(), ranks.text()


def fails(folder: Path, argv: Sequence[object], code: int, message: str) -> None:
    """Run on two ranks: both must end with this code, rank 0 after one line with the message, the other silently."""
    ranks = Ranks(folder, argv, 2, {})
    assert ranks.wait() == [code, code], ranks.text()
    errors = [line for line in ranks.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in ranks.text()
    assert ranks.text(1) == ""
