"""Evaluation: the mean loss over global batches of validation samples, and how often the likeliest token is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_llm.data.gpt_dataset import Samples
from megatron_llm.flags.arguments import EvaluationFlags
from megatron_llm.metrics.validation import Result
from megatron_llm.model.hits import Hits
from megatron_llm.model.llama import Llama
from megatron_llm.parallel.world import World
from megatron_llm.training import batches
from megatron_llm.training.batches import Share
from megatron_llm.training.steps import Steps, agreed_mean


@dataclass(frozen=True)
class Evaluation:
    """This rank's part of an evaluation."""

    flags: EvaluationFlags
    rows: int
    """Number of samples in a micro-batch."""
    world: World
    steps: Steps
    models: Iterable[Llama]
    """The pipeline stages of this rank."""
    valid: Samples

    @torch.no_grad()
    def run(self, first: int, batch_size: int, given_up: Callable[[], bool] = lambda: False) -> Result | None:
        """Evaluate --eval_iters batches of `batch_size` samples, beginning with sample number `first`. Collective.

        given_up: asked before each batch; must give the same answer on all ranks. Returns None if it said yes.
        """
        self.steps.micro_batches = batch_size // (self.rows * self.world.data_size)
        last = first + self.flags.eval_iters * batch_size
        micro = batches.load(self.valid, Share(first, last, self.rows, self.world.data_rank, self.world.data_size), 0)
        total, hits = torch.zeros((), device=self.world.device), Hits()
        with self._counting(hits):
            for _ in range(self.flags.eval_iters):
                if given_up():
                    self.steps.free()
                    return None
                total += self.steps.evaluate(micro)
        self.steps.free()
        loss = agreed_mean(self.world, self.steps, total / self.flags.eval_iters)
        return Result(loss, _share(hits, self.world) if self._accuracy else None)

    @property
    def _accuracy(self) -> bool:
        return "accuracy" in (self.flags.metrics or ())

    @contextmanager
    def _counting(self, hits: Hits) -> Iterator[None]:
        for model in self.models:
            model.hits = hits if self._accuracy else None
        try:
            yield
        finally:
            for model in self.models:
                model.hits = None


def _share(hits: Hits, world: World) -> float:
    """The share of counted tokens that were predicted correctly, over all ranks. Collective."""
    own = torch.tensor([float(hits.right), float(hits.counted)], dtype=torch.float64)
    right, counted = world.total(own).tolist()
    return float(right / max(counted, 1.0))
