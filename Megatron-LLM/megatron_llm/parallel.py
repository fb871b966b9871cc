"""Ranks: environment -> process group -> sharded model; and how ranks agree on flags, values and errors.

Every rank holds a slice of each parameter, gradient and optimizer moment (FSDP2); a layer's whole weights exist only
while it computes. One process without the environment variables is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not marked so
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_llm.files import Superseded, UserError

if TYPE_CHECKING:
    from megatron_llm.model import Llama

T = TypeVar("T")
STORE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """One dimension, `dp`, over all ranks."""

    def say(self, text: str) -> None:
        """Print a line, from rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def agree(self, code: int) -> int:
        """The largest code of all ranks."""
        value = torch.tensor(code, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def mean(self, value: Tensor) -> float:
        """Mean of a number over the ranks, as fp64 so that it does not depend on the order of summation."""
        total = value.detach().double().cpu()
        dist.all_reduce(total)
        return float(total) / self.size

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run on rank 0 and give its result, or its UserError or Superseded, to every rank."""
        answer: list[T | UserError | Superseded | None] = [None]
        if self.rank == 0:
            try:
                answer = [function()]
            except (UserError, Superseded) as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], (UserError, Superseded)):
            raise answer[0]
        return answer[0]  # type: ignore[return-value]  # None only where T is None

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Run on every rank; if any has a UserError, raise the lowest rank's on all of them."""
        error: UserError | None = None
        try:
            result = function()
        except UserError as caught:
            error = caught
        errors: list[UserError | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        if first := next((found for found in errors if found), None):
            raise first
        return result


def rank_in_environment() -> int:
    """This process's rank before anything is set up; 0 by hand."""
    return int(os.environ.get("RANK", "0"))


def world_size_in_environment() -> int:
    """Number of ranks; 1 by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …)."""
    rank, size = rank_in_environment(), world_size_in_environment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo"
    dist.init_process_group(backend, store=_store(rank, size), rank=rank, world_size=size)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(rank, size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("dp",)))


def _store(rank: int, size: int) -> Store:
    """Where ranks meet. Rank 0 takes over the launcher's listening socket, so nobody can take its port."""
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set; start the ranks through the launcher")
        return HashStore()
    descriptor = os.environ.get("MASTER_LISTEN_FD") if rank == 0 else None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        rank == 0,
        timeout=STORE_TIMEOUT,
        master_listen_fd=int(descriptor) if descriptor else None,
    )


def shard(model: Llama, world: World, *, bf16: bool) -> None:
    """Shard a model built on the meta device, in place, and allocate its fp32 slices (without values)."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.layers.values():
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    model.to_empty(device=world.device)


def synchronise_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass reduces gradients over the ranks or only adds them up."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)


def free_gathered_weights(model: nn.Module) -> None:
    """Back to slices after forward passes without a backward one, which leave the root's weights gathered."""
    assert isinstance(model, FSDPModule)
    model.reshard()


@torch.no_grad()
def fill(model: nn.Module, world: World, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Set the slices of a sharded model from whole tensors that only rank 0 holds, one at a time.

    weights: (name, tensor) in the order of the model's parameters on rank 0; not read elsewhere.
    """
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = torch.empty(parameter.shape, device=world.device)
        if world.rank == 0:
            given, tensor = next(weights)
            assert given == name, f"weights come as {given} where the model has {name}"
            whole.copy_(tensor)
        parameter.to_local().copy_(distribute_tensor(whole, world.mesh, parameter.placements).to_local())
