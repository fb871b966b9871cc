"""Shards a part of the model: matrices are cut over tensor ranks, and everything is sliced over data ranks (FSDP2).

Every rank holds a slice of each parameter, gradient and optimizer moment; the weights of a layer are gathered over the
data ranks only while it computes. The slices are DTensors, so that their place in the whole tensor is known. A single
data rank that computes in fp32 has nothing to gather or convert: it uses its parameters as they are, and those that are
not cut are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_llm.model.llama import Llama
from megatron_llm.parallel.world import World


def shard(model: Llama, world: World, *, bf16: bool, fp16: bool = False) -> None:
    """Shard a model built on the meta device, in place, and allocate its fp32 slices (without values).

    bf16, fp16: the precision of the computation, fp32 if neither is set. Gradients are reduced in fp32.
    """
    whole = world.data_size == 1 and not (bf16 or fp16)
    if model.tp.size > 1:
        _cut_over_tensor_ranks(model, world)
    if not whole:
        policy = MixedPrecisionPolicy()
        if bf16 or fp16:
            policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else torch.float16, torch.float32)
        for module in (*model.layers.values(), model):
            fully_shard(module, mesh=world.mesh["dp"], mp_policy=policy, shard_placement_fn=_other_dimension)
    model.to_empty(device=world.device)
    if whole and model.tp.size > 1:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_sum_parts)  # type: ignore[no-untyped-call]


def _sum_parts(parameter: Tensor) -> None:
    """Sum the tensor ranks' parts of the gradient of a copied parameter, as fully_shard does where it is used."""
    if isinstance(parameter.grad, DTensor) and isinstance(parameter, DTensor):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def _cut_over_tensor_ranks(model: nn.Module, world: World) -> None:
    """Make every parameter a DTensor on the tensor mesh: cut where its module says so, else a copy on every rank."""
    mesh = world.mesh["tp"]
    for module in model.modules():
        split = getattr(module, "split", None)
        placement = Replicate() if split is None else Shard(split)
        for name, parameter in module.named_parameters(recurse=False):
            whole = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(whole))


def _other_dimension(parameter: nn.Parameter) -> Shard | None:
    """Slice over data ranks by columns what tensor ranks cut by rows, so that each rank's slice is one rectangle."""
    return Shard(1) if isinstance(parameter, DTensor) and parameter.placements == (Shard(0),) else None


def synchronise_gradients(model: nn.Module, *, now: bool) -> None:
    """Set whether the next backward pass reduces gradients over the ranks or only accumulates them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the root module's gathered weights, which forward passes without a backward pass leave behind."""
    if isinstance(model, FSDPModule):
        model.reshard()


def parameters_by_name(parts: Iterable[Llama]) -> dict[str, nn.Parameter]:
    """The slices that this rank holds, by their names in the whole model; the copy of a tied embedding is left out."""
    return {
        name: parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if part.part.first or not (part.config.tie_embed_logits and name == "lm_head.weight")
    }


@torch.no_grad()
def fill(
    parameters: Mapping[str, nn.Parameter],
    shapes: Mapping[str, torch.Size],
    world: World,
    weights: Iterator[tuple[str, Tensor]],
) -> None:
    """Fill the slices of all ranks from whole tensors that only rank 0 has, one tensor at a time. Collective.

    shapes: those of the whole model; weights: (name, tensor) in the same order, read on rank 0 only.
    """
    for name, shape in shapes.items():
        whole = torch.empty(shape, device=world.device)
        if world.rank == 0:
            given, tensor = next(weights)
            assert given == name, f"weights come as {given} where the model has {name}"
            whole.copy_(tensor)
        dist.broadcast(whole, src=0)
        if name in parameters:
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                own = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(own.to_local())
            else:
                parameter.copy_(whole)
