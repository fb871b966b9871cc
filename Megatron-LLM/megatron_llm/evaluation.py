"""Evaluations: the mean loss over global batches of validation samples, and how often the likeliest token is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm import batches
from megatron_llm.arguments import Arguments
from megatron_llm.batches import Share
from megatron_llm.gpt_dataset import Samples
from megatron_llm.model import Llama
from megatron_llm.parallel import World
from megatron_llm.steps import Steps, agreed_mean
from megatron_llm.tensor_parallel import TensorParallel


@dataclass
class Hits:
    """Counts, on a rank with the last layers, the tokens that are the likeliest ones (--metrics accuracy)."""

    right: Tensor | float = 0.0
    counted: Tensor | float = 0.0

    def add(self, logits: Tensor, targets: Tensor, counted: Tensor | None, vocab_size: int, tp: TensorParallel) -> None:
        """Count a micro-batch. logits: (b, s, this rank's part of V); targets: (b, s); counted: (b, s) bool or None."""
        hit = likeliest(logits.detach(), vocab_size, tp) == targets
        counted = torch.ones_like(hit) if counted is None else counted
        self.right = self.right + (hit & counted).sum().double()
        self.counted = self.counted + counted.sum().double()

    def share(self, world: World) -> float:
        """The share of the right ones over all ranks. Collective."""
        own = torch.tensor([float(self.right), float(self.counted)], dtype=torch.float64)
        right, counted = world.total(own).tolist()
        return float(right / max(counted, 1.0))


def likeliest(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """The token of the highest logit, (b, s) int64; of equal ones the first. logits: (b, s, this rank's part of V)."""
    values, tokens = logits.float().max(-1)
    if tp.size == 1:
        return tokens
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp.group)
    step = -(-vocab_size // tp.size)
    tokens = torch.where(values == highest, tokens + min(tp.rank * step, vocab_size), vocab_size)
    dist.all_reduce(tokens, dist.ReduceOp.MIN, group=tp.group)
    return tokens


@dataclass(frozen=True)
class Result:
    """What an evaluation found."""

    loss: float
    accuracy: float | None = None
    """Only with --metrics accuracy."""


@dataclass(frozen=True)
class Evaluation:
    """How this rank evaluates."""

    args: Arguments
    world: World
    steps: Steps
    models: Iterable[Llama]
    """This rank's pipeline stages."""
    valid: Samples

    @torch.no_grad()
    def run(self, first: int, batch_size: int, given_up: Callable[[], bool] = lambda: False) -> Result | None:
        """Evaluate eval_iters batches of so many samples from number `first` on; None when given up. Collective.

        given_up: asked before each batch; all ranks must answer alike.
        """
        rows = self.args.micro_batch_size
        self.steps.micro_batches = batch_size // (rows * self.world.data_size)
        last = first + self.args.eval_iters * batch_size
        micro = batches.load(self.valid, Share(first, last, rows, self.world.data_rank, self.world.data_size), 0)
        total, hits = torch.zeros((), device=self.world.device), Hits()
        with self._counting(hits):
            for _ in range(self.args.eval_iters):
                if given_up():
                    self.steps.free()
                    return None
                total += self.steps.evaluate(micro)
        self.steps.free()
        loss = agreed_mean(self.world, self.steps, total / self.args.eval_iters)
        return Result(loss, hits.share(self.world) if self._accuracy else None)

    @property
    def _accuracy(self) -> bool:
        return "accuracy" in (self.args.metrics or ())

    @contextmanager
    def _counting(self, hits: Hits) -> Iterator[None]:
        for model in self.models:
            model.hits = hits if self._accuracy else None
        try:
            yield
        finally:
            for model in self.models:
                model.hits = None
