"""Counts how many tokens were the ones that the model found likeliest (--metrics accuracy)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.model.tensor_parallel import TensorParallel


@dataclass
class Hits:
    """The counts of tokens that the model found likeliest, on a rank with the last layers."""

    right: Tensor | float = 0.0
    counted: Tensor | float = 0.0

    def add(self, logits: Tensor, targets: Tensor, counted: Tensor | None, vocab_size: int, tp: TensorParallel) -> None:
        """Count a micro-batch. logits: (b, s, this rank's part of V); targets: (b, s); counted: (b, s) bool or None."""
        hit = likeliest(logits.detach(), vocab_size, tp) == targets
        counted = torch.ones_like(hit) if counted is None else counted
        self.right = self.right + (hit & counted).sum().double()
        self.counted = self.counted + counted.sum().double()


def likeliest(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """The token with the highest logit, (b, s) int64; of equal ones the first. logits: (b, s, this rank's part of
    V)."""
    values, tokens = logits.float().max(-1)
    if tp.size == 1:
        return tokens
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp.group)
    step = -(-vocab_size // tp.size)
    tokens = torch.where(values == highest, tokens + min(tp.rank * step, vocab_size), vocab_size)
    dist.all_reduce(tokens, dist.ReduceOp.MIN, group=tp.group)
    return tokens
