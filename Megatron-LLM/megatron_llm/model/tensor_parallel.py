"""Tensor parallelism: the matrices of a layer are cut over the ranks of a group, which exchange activations.

A region of cut matrices begins with `column_parallel_matmuls` and ends with `row_parallel_output`. With sequence
parallelism each rank holds only its part of the sequence outside these regions. Parameters are DTensors on the group's
mesh, so that sharding over data ranks and checkpoints know their position in the whole tensor; computations use their
local parts. Without a group all functions here are the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional


@dataclass(frozen=True)
class TensorParallel:
    """This process as one of the tensor ranks, which share each layer."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence: bool = False
    """Whether sequence parallelism is used."""


ALONE = TensorParallel()
Operation = Callable[[Tensor, TensorParallel], Tensor]


def identity(x: Tensor, _tp: TensorParallel) -> Tensor:
    """Return the same values."""
    return x.view_as(x)


def all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return the sum over the ranks. Collective."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=tp.group)
    return total


def gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """Gather (b, s / size, …) of every rank -> (b, s, …). Collective."""
    own = x.transpose(0, 1).contiguous()
    whole = own.new_empty(own.shape[0] * tp.size, *own.shape[1:])
    dist.all_gather_into_tensor(whole, own, group=tp.group)
    return whole.transpose(0, 1).contiguous()


def reduce_scatter(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum (b, s, …) over the ranks -> this rank's part (b, s / size, …). Collective."""
    whole = x.transpose(0, 1).contiguous()
    own = whole.new_empty(whole.shape[0] // tp.size, *whole.shape[1:])
    dist.reduce_scatter_tensor(own, whole, group=tp.group)
    return own.transpose(0, 1).contiguous()


class _Collective(torch.autograd.Function):
    """An autograd function with one operation in the forward pass and another in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, there: Operation, back: Operation) -> Tensor:
        ctx.tp, ctx.back = tp, back
        return there(x, tp)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradients[0], ctx.tp), None, None, None


def row_parallel_output(x: Tensor, tp: TensorParallel) -> Tensor:
    """End a region: return the sum of the partial results of all ranks. Collective."""
    if tp.size == 1:
        return x
    there, back = (reduce_scatter, gather) if tp.sequence else (all_reduce, identity)
    return cast(Tensor, _Collective.apply(x, tp, there, back))  # type: ignore[no-untyped-call]


def local(parameter: Tensor, *, partial: bool = False) -> Tensor:
    """This rank's part of a parameter.

    With `partial`, the gradients of a copied parameter are summed over the ranks.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial else None)


class ColumnLinear(nn.Linear):
    """A linear layer without bias whose outputs are cut over the ranks; see `column_parallel_matmuls`."""

    split = 0
    """The dimension in which the weight is cut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def used(self) -> Tensor:
        """The rows that this rank computes."""
        return local(self.weight)


class RowLinear(nn.Linear):
    """A linear layer without bias whose inputs are cut over the ranks."""

    split = 1

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (…, inputs / size) -> (…, outputs): this rank's addend of the sum over the ranks."""
        return functional.linear(x, local(self.weight))


class KeyValueLinear(nn.Linear):
    """The projection to keys or values with fewer heads than ranks: each rank holds all heads and computes one."""

    def __init__(self, inputs: int, heads: int, head_size: int, tp: TensorParallel) -> None:
        super().__init__(inputs, heads * head_size, bias=False)
        self.rows = slice(tp.rank * heads // tp.size * head_size, (tp.rank * heads // tp.size + 1) * head_size)

    def used(self) -> Tensor:
        """The rows that this rank computes."""
        return local(self.weight, partial=True)[self.rows]


def key_value_linear(inputs: int, heads: int, head_size: int, tp: TensorParallel) -> ColumnLinear | KeyValueLinear:
    """The projection to keys or values, for any number of heads."""
    if heads < tp.size:
        return KeyValueLinear(inputs, heads, head_size, tp)
    return ColumnLinear(inputs, heads * head_size)


class _Products(torch.autograd.Function):
    """The whole sequence times each weight.

    Only this rank's part of the sequence is kept, and gathered again for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        whole = gather(x, tp)
        return tuple(functional.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        whole = gather(x, ctx.tp).flatten(0, 1)
        inner = functional.linear(gradients[0], weights[0].t())
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            inner += functional.linear(gradient, weight.t())
        own = [gradient.flatten(0, 1).t() @ whole for gradient in gradients]
        return reduce_scatter(inner, ctx.tp), None, *own


def column_parallel_matmuls(x: Tensor, weights: Sequence[Tensor], tp: TensorParallel) -> tuple[Tensor, ...]:
    """Begin a region: multiply x (b, s, inputs), or its part of s, with each rank's own rows (outputs / size,
    inputs)."""
    if tp.sequence:
        return cast("tuple[Tensor, ...]", _Products.apply(x, tp, *weights))  # type: ignore[no-untyped-call]
    if tp.size > 1:
        x = cast(Tensor, _Collective.apply(x, tp, identity, all_reduce))  # type: ignore[no-untyped-call]
    return tuple(functional.linear(x, weight) for weight in weights)


class VocabEmbedding(nn.Embedding):
    """Token embeddings, and the rows of an output layer, cut by vocabulary.

    Each rank has ceil(V / size) rows; the last ranks may have fewer.
    """

    split = 0

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__(vocab_size, hidden_size)
        self.tp = tp

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens (b, s) int64 -> (b, s, hidden), or this rank's part of the sequence."""
        rows = local(self.weight)
        if self.tp.size == 1:
            return functional.embedding(tokens, rows)
        index, foreign = own_rows(tokens, self.num_embeddings, self.tp)
        return row_parallel_output(functional.embedding(index, rows).masked_fill(foreign.unsqueeze(-1), 0.0), self.tp)


def own_rows(tokens: Tensor, vocab_size: int, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Tokens as row numbers in this rank's part of the vocabulary, and a mask of the tokens that belong to other ranks.

    The row number of a token of another rank is 0.
    """
    step = -(-vocab_size // tp.size)
    first = min(tp.rank * step, vocab_size)
    foreign = (tokens < first) | (tokens >= min(first + step, vocab_size))
    return (tokens - first).masked_fill(foreign, 0), foreign


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy per token of logits that are cut by vocabulary; keeps one fp32 array of the logits' shape."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
        index, foreign = own_rows(targets, vocab_size, tp)
        wide = logits.float()
        highest = wide.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp.group)
        wide = wide - highest.unsqueeze(-1)
        picked = wide.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0.0)
        exponentials = wide.exp_()
        picked, total = all_reduce(torch.stack((picked, exponentials.sum(-1))), tp).unbind()
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), index, foreign)
        ctx.dtype = logits.dtype
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, foreign = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1)
        result = probabilities * gradient
        result.scatter_add_(-1, index.unsqueeze(-1), -gradient.masked_fill(foreign.unsqueeze(-1), 0.0))
        return result.to(ctx.dtype), None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor | None,
    vocab_size: int,
    tp: TensorParallel,
    divisor: float | None = None,
) -> Tensor:
    """Mean cross-entropy of all tokens or of the counted ones, fp32; 0 if none is counted.

    logits: (b, s, this rank's part of V); targets: (b, s) int64; counted: (b, s) bool; divisor: divides the sum over
    the counted tokens in place of their number.
    """
    if tp.size > 1:
        losses: Tensor = _CrossEntropy.apply(logits, targets, vocab_size, tp)  # type: ignore[no-untyped-call]
    elif counted is None:
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    else:
        losses = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    if counted is None:
        return losses.mean()
    total: Tensor = (losses.view_as(counted) * counted).sum()
    return total / (counted.sum().clamp(min=1) if divisor is None else divisor)
