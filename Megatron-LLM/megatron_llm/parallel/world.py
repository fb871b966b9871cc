"""Ranks: environment -> process group -> mesh of pipeline x data x tensor ranks; and how ranks agree.

One process without the environment variables is a world of one. Tensor ranks are neighbours: on GPUs they belong on one
node, whose links are the fastest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Backend, HashStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_llm.model.tensor_parallel import ALONE, TensorParallel
from megatron_llm.process.errors import TOLD, OutputLost, SaveFailed
from run_contract.errors import Superseded, UserError

T = TypeVar("T")
Told = UserError | Superseded | SaveFailed | OutputLost
"""The errors that ranks tell each other: files.TOLD."""
GLOO = "gloo_in_order"
"""Name of the backend for the CPU; see `_gloo`."""
STORE_TIMEOUT = timedelta(minutes=10)
START_MINUTES = 60.0
"""Until training begins ranks wait so long for each other: rank 0 may verify or convert a large checkpoint."""
STEP_MINUTES = 10.0
"""Afterwards, unless --distributed_timeout_minutes says otherwise."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Three dimensions, `pp`, `dp` and `tp`, over all ranks."""

    @property
    def data_rank(self) -> int:
        """This rank's number among those that compute different samples."""
        return self.mesh.get_local_rank("dp")

    @property
    def data_size(self) -> int:
        """How many ranks compute different samples."""
        return self.mesh["dp"].size()

    def tensor_parallel(self, *, sequence: bool) -> TensorParallel:
        """This rank among those that share each layer."""
        mesh = self.mesh["tp"]
        if mesh.size() == 1:
            return ALONE
        return TensorParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group(), sequence)

    def say(self, text: str) -> None:
        """Print a line, from rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def limit_waiting(self, minutes: float) -> None:
        """From now on a rank that waits longer than this for the others in a collective fails.

        Sending from pipeline stage to stage is not covered: there gloo goes by what `start` was given.
        """
        for group in (dist.group.WORLD, *self.mesh.get_all_groups()):
            _set_pg_timeout(timedelta(minutes=minutes), group)

    def agree(self, *codes: int) -> list[int]:
        """The largest of all ranks, for each code."""
        values = torch.tensor(codes, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(value) for value in values]

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks, of each number."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor]

    def total(self, value: Tensor) -> Tensor:
        """Sum of a number over the ranks, as fp64 so that it does not depend on the order of summation."""
        total = value.detach().double().cpu()
        dist.all_reduce(total)
        return total

    def mean(self, value: Tensor) -> float:
        """Mean over the data ranks of a number that the tensor ranks of one pipeline stage hold, the others 0."""
        return float(self.total(value)) / (self.data_size * self.mesh["tp"].size())

    def data_total(self, number: int) -> int:
        """Sum over the data ranks of a number that the ranks which share their samples hold alike."""
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.mesh.get_group("dp"))
        return int(total)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run on rank 0 and give its result, or its error that ranks tell each other, to every rank."""
        answer: list[T | Told | None] = [None]
        if self.rank == 0:
            try:
                answer = [function()]
            except TOLD as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], TOLD):
            raise answer[0]
        return answer[0]  # type: ignore[return-value]  # None only where T is None

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Run on every rank; if any has an error that ranks tell each other, raise the lowest rank's on all of them."""
        error: Told | None = None
        try:
            result = function()
        except TOLD as caught:
            error = caught
        errors: list[Told | None] = [None] * self.size
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


def start(tensor: int = 1, pipeline: int = 1, minutes: float = STEP_MINUTES) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …).

    Its size must be a multiple of the tensor parallel times the pipeline parallel size; the rest is data parallel.
    minutes: what training is to `limit_waiting` to. Raises UserError on all ranks unless each has a device of its own.
    """
    rank, size = rank_in_environment(), world_size_in_environment()
    cuda = torch.cuda.is_available()
    if GLOO not in Backend.backend_list:
        Backend.register_backend(GLOO, _gloo, devices=["cpu"])
    backend = f"cpu:{GLOO},cuda:nccl" if cuda else f"cpu:{GLOO}"
    timeout = timedelta(minutes=minutes)
    dist.init_process_group(backend, store=_store(rank, size), rank=rank, world_size=size, timeout=timeout)
    device = _choose_device(size, cuda=cuda)
    world = World(rank, size, device, layout_mesh(device, size, tensor, pipeline, minutes))
    world.limit_waiting(START_MINUTES)
    return world


@dataclass(frozen=True)
class Seat:
    """Where a rank is to compute."""

    node: str
    local_rank: int
    devices: int
    """How many GPUs the rank may use."""
    identity: str
    """Of its GPU, the same for every rank of the node that uses it; empty without one."""


def _choose_device(size: int, *, cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU where there is none. Collective. Raises UserError on all ranks, see seats_problem."""
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if cuda else 0
    index = local_rank if devices > 1 else 0  # a single one is this rank's own: Slurm may show each task only its GPU
    identity = str(torch.cuda.get_device_properties(index).uuid) if index < devices else ""
    seats: list[Seat] = [Seat("", 0, 0, "")] * size
    dist.all_gather_object(seats, Seat(os.uname().nodename, local_rank, devices, identity))
    if problem := seats_problem(seats):
        raise UserError(problem)
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def seats_problem(seats: Sequence[Seat]) -> str | None:
    """Why ranks, by their number, cannot compute where they are, or None: either all have a GPU of their own or none
    has any."""
    remedy = (
        "start at most as many ranks on each node as it has GPUs, with LOCAL_RANK from 0 up, or give each task a GPU "
        "of its own"
    )
    first: dict[tuple[str, str], int] = {}
    with_devices = next((rank for rank, seat in enumerate(seats) if seat.devices), None)
    for rank, seat in enumerate(seats):
        here = f"rank {rank} on {seat.node} (LOCAL_RANK {seat.local_rank})"
        if with_devices is not None and not seat.devices:
            return f"{here} sees no GPU, but rank {with_devices} on {seats[with_devices].node} does; {remedy}"
        if seat.devices and not seat.identity:
            return f"{here} sees only {seat.devices} GPUs, numbers 0 to {seat.devices - 1}; {remedy}"
        if seat.identity and (other := first.setdefault((seat.node, seat.identity), rank)) != rank:
            return (
                f"{here} would compute on the GPU of rank {other} ({seat.identity}), of {seat.devices} seen; {remedy}"
            )
    return None


def _gloo(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """Gloo with one thread for a group's operations, one after another.

    torch gives a group two, which note the name of the operation just done in the same string without a lock. Where
    operations with long names (reduce_scatter_tensor) and short ones alternate, that frees memory in use: ranks crash
    once in some thousand steps.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub has another name
    options._devices, options._threads = [_device()], 1
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


@functools.cache
def _device() -> ProcessGroupGloo.Device:
    """The one device of all groups: each has a thread that wakes a hundred times a second, and disturbs the kernels."""
    return ProcessGroupGloo.create_default_device()


def layout_mesh(
    device: torch.device, size: int, tensor: int, pipeline: int, minutes: float = STEP_MINUTES
) -> DeviceMesh:
    """All ranks as pipeline x data x tensor ranks. Collective.

    Not by init_device_mesh, whose groups have torch's own time limits.
    """
    ranks, groups = torch.arange(size).view(pipeline, -1, tensor), []
    for axis in range(3):
        lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
        own, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(minutes=minutes))  # type: ignore[no-untyped-call]
        groups.append(own)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("pp", "dp", "tp"))


def _store(rank: int, size: int) -> Store:
    """Where ranks meet. Rank 0 takes over the launcher's listening socket, so nobody can take its port.

    torchrun has a store of its own at that address, in which every rank is a client.
    """
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set; start the ranks through the launcher")
        return HashStore()
    descriptor = os.environ.get("MASTER_LISTEN_FD") if rank == 0 else None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=STORE_TIMEOUT,
        master_listen_fd=int(descriptor) if descriptor else None,
    )
