"""The ranks: environment -> process group -> mesh of pipeline x data x tensor ranks; and how ranks reach agreement.

Without the environment variables, one process is a world of size one. Tensor ranks have neighbouring numbers: on GPUs
they belong on one node, whose links are the fastest.
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
from megatron_llm.process.errors import REPORTED_ERRORS, OutputLost, SaveFailed
from run_contract.errors import Superseded, UserError

T = TypeVar("T")
K = TypeVar("K")
Reported = UserError | Superseded | SaveFailed | OutputLost
"""The errors that ranks report to each other: process.errors.REPORTED_ERRORS."""
GLOO = "gloo_in_order"
"""Name of the CPU backend; see `_gloo`."""
STORE_TIMEOUT = timedelta(minutes=10)
START_MINUTES = 60.0
"""Time limit for waiting for other ranks before training begins: rank 0 may verify or convert a large checkpoint."""
STEP_MINUTES = 10.0
"""The same once training has begun, unless --distributed_timeout_minutes gives a different limit."""


@dataclass(frozen=True)
class World:
    """This process as one of all ranks.

    All methods are collective, except `tensor_parallel`, `say` and `limit_waiting`.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """A mesh of all ranks with the three dimensions `pp`, `dp` and `tp`."""

    @property
    def data_rank(self) -> int:
        """This rank's number among the data ranks, which compute different samples."""
        return self.mesh.get_local_rank("dp")

    @property
    def data_size(self) -> int:
        """Number of data ranks, which compute different samples."""
        return self.mesh["dp"].size()

    def tensor_parallel(self, *, sequence: bool) -> TensorParallel:
        """This rank's place among the tensor ranks, which share each layer."""
        mesh = self.mesh["tp"]
        if mesh.size() == 1:
            return ALONE
        return TensorParallel(mesh.get_local_rank(), mesh.size(), mesh.get_group(), sequence)

    def say(self, text: str) -> None:
        """Print a line, from rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def limit_waiting(self, minutes: float) -> None:
        """Set how long a rank waits for other ranks in a collective from now on, before it fails.

        This does not cover sends between pipeline stages: for those, gloo keeps the limit that was passed to `start`.
        """
        for group in (dist.group.WORLD, *self.mesh.get_all_groups()):
            _set_pg_timeout(timedelta(minutes=minutes), group)

    def max_over_ranks(self, *codes: int) -> list[int]:
        """The largest value over all ranks of each code."""
        values = torch.tensor(codes, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(value) for value in values]

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest value over all ranks of each number."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in fp64 so that it hardly depends on the order of summation."""
        total = value.detach().double().cpu()
        dist.all_reduce(total)
        return total

    def mean(self, value: Tensor) -> float:
        """The mean over the data ranks of a number that the tensor ranks of one pipeline stage have; others have 0."""
        return float(self.total(value)) / (self.data_size * self.mesh["tp"].size())

    def data_total(self, number: int) -> int:
        """The sum over the data ranks of a number that is equal on all ranks with the same samples."""
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.mesh.get_group("dp"))
        return int(total)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 and return its result on every rank.

        An error of a type in REPORTED_ERRORS is raised on every rank.
        """
        answer: list[T | Reported | None] = [None]
        if self.rank == 0:
            try:
                answer = [function()]
            except REPORTED_ERRORS as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], REPORTED_ERRORS):
            raise answer[0]
        return answer[0]  # type: ignore[return-value]  # it is None only if T is None

    def split_from_rank0(self, function: Callable[[], tuple[T, K]]) -> tuple[T, K | None]:
        """Run a function on rank 0: every rank gets its first result; the second one stays there (elsewhere: None).

        An error of a type in REPORTED_ERRORS is raised on every rank.
        """
        kept: K | None = None

        def shared() -> T:
            nonlocal kept
            answer, kept = function()
            return answer

        return self.on_rank0(shared), kept

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Run a function on every rank.

        The first error of a type in REPORTED_ERRORS, in the order of ranks, is raised on all of them.
        """
        error: Reported | None = None
        try:
            result = function()
        except REPORTED_ERRORS as caught:
            error = caught
        errors: list[Reported | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        if first := next((found for found in errors if found), None):
            raise first
        return result


def rank_in_environment() -> int:
    """This process's rank, before the process group exists; 0 when started by hand."""
    return int(os.environ.get("RANK", "0"))


def world_size_in_environment() -> int:
    """Number of ranks; 1 when started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(tensor: int = 1, pipeline: int = 1, minutes: float = STEP_MINUTES) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …). Collective.

    Its size must be a multiple of the tensor-parallel size times the pipeline-parallel size; the quotient is the number
    of data ranks. minutes: the limit that training will pass to `limit_waiting`. Raises UserError on all ranks unless
    either each rank has a GPU of its own or no rank has any.
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
    """The node and the GPUs with which a rank is to compute."""

    node: str
    local_rank: int
    devices: int
    """Number of GPUs that the rank can see."""
    identity: str
    """UUID of its GPU, equal on all ranks of the node that would use it; empty without a GPU."""


def _choose_device(size: int, *, cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU where there is none. Collective.

    Raises UserError on all ranks; see `seats_problem`.
    """
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if cuda else 0
    index = local_rank if devices > 1 else 0  # one visible GPU is this rank's: Slurm may hide all others
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
    """The reason why ranks, numbered as in `seats`, cannot compute where they are, or None.

    Either every rank must have a GPU of its own, or no rank may have any.
    """
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
    """A gloo backend with a single thread per group, which runs the group's operations one after another.

    By default torch gives a group two threads. Both write the name of the operation just done to the same string
    without a lock. Where operations with long names (reduce_scatter_tensor) and short ones alternate, this frees memory
    in use, and a rank crashes about once in some thousand steps.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub has another name
    options._devices, options._threads = [_device()], 1
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


@functools.cache
def _device() -> ProcessGroupGloo.Device:
    """The gloo device that all groups share: each has a thread that wakes 100 times per second and disturbs the
    kernels."""
    return ProcessGroupGloo.create_default_device()


def layout_mesh(
    device: torch.device, size: int, tensor: int, pipeline: int, minutes: float = STEP_MINUTES
) -> DeviceMesh:
    """The mesh of all ranks as pipeline x data x tensor ranks. Collective.

    init_device_mesh is not used, because its groups would have torch's own time limits.
    """
    ranks, groups = torch.arange(size).view(pipeline, -1, tensor), []
    for axis in range(3):
        lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
        own, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(minutes=minutes))  # type: ignore[no-untyped-call]
        groups.append(own)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("pp", "dp", "tp"))


def _store(rank: int, size: int) -> Store:
    """The store through which ranks find each other.

    Rank 0 takes over the launcher's listening socket, so that no other process can take its port. Under torchrun,
    torchrun runs a store of its own at that address, and every rank is a client.
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
