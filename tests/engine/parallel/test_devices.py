"""Which GPU a rank computes on, and what is said where ranks and GPUs do not match; GPUs are pretended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel import world as parallel
from megatron_llm.parallel.world import Seat, World, seats_problem
from run_contract.errors import UserError
from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks
from tests.engine.tiny_run import flags


def pretend(patch: Any, devices: int, chosen: list[int]) -> None:
    """This process sees so many GPUs, and notes which one it is told to use."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: devices)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    patch.setattr(torch.cuda, "set_device", chosen.append)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("local_rank", "devices", "expected"), [(1, 1, 0), (0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3)])
def test_a_rank_takes_its_gpu_or_the_only_one(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, devices: int, expected: int
) -> None:
    """Where Slurm shows each task only its own GPU, that is number 0 whatever LOCAL_RANK says."""
    chosen: list[int] = []
    pretend(monkeypatch, devices, chosen)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert parallel._choose_device(1, cuda=True) == torch.device("cuda", expected)
    assert chosen == [expected]


def test_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """A LOCAL_RANK beyond the GPUs is an error before any is taken; without GPUs there is nothing to choose."""
    chosen: list[int] = []
    pretend(monkeypatch, 2, chosen)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        UserError, match=r"rank 0 on .* \(LOCAL_RANK 2\) sees only 2 GPUs, numbers 0 to 1; start at most"
    ):
        parallel._choose_device(1, cuda=True)
    assert chosen == []
    assert parallel._choose_device(1, cuda=False) == world.device == torch.device("cpu")


def test_who_sits_where() -> None:
    """Every rank needs a GPU of its own, by node and identity, or none may have any."""
    own = [Seat("a", 0, 1, "x"), Seat("a", 1, 1, "y"), Seat("b", 0, 1, "x"), Seat("b", 1, 1, "y")]
    shared = [Seat("a", local, 2, f"GPU-{local}") for local in range(2)]
    bare = [Seat("a", 0, 0, ""), Seat("a", 1, 0, "")]
    assert [seats_problem(seats) for seats in (own, shared, bare)] == [None] * 3
    cases = {
        "rank 3 on b (LOCAL_RANK 1) would compute on the GPU of rank 2 (x), of 1 seen; start at most as many": [
            *own[:3],
            replace(own[3], identity="x"),
        ],
        "rank 1 on a (LOCAL_RANK 1) sees no GPU, but rank 0 on a does; start": [own[0], bare[1]],
        "rank 2 on a (LOCAL_RANK 2) sees only 2 GPUs, numbers 0 to 1; start": [*shared, Seat("a", 2, 2, "")],
    }
    for message, seats in cases.items():
        assert str(seats_problem(seats)).startswith(message)


def finetune_on_one_gpu(argv: Sequence[str]) -> None:
    """The script on ranks that all see one and the same GPU, without its library of collectives."""
    patch, start = pytest.MonkeyPatch(), dist.init_process_group
    pretend(patch, 1, [])
    patch.setattr(dist, "init_process_group", lambda _, **more: start(f"cpu:{parallel.GLOO}", **more))
    engine_ranks._finetune(argv)


def test_two_ranks_and_one_gpu(tmp_path: Path, tiny_data: Path) -> None:
    """All ranks end with the one line of rank 0."""
    ranks = Ranks(tmp_path, flags(tiny_data, tmp_path / "save"), 2, {}, main=finetune_on_one_gpu)
    assert ranks.wait() == [2, 2], ranks.text()
    (line,) = ranks.text().splitlines()
    assert line.startswith(f"error: rank 1 on {os.uname().nodename} (LOCAL_RANK 1) would compute on the GPU of rank 0")
    assert ranks.text(1) == ""
