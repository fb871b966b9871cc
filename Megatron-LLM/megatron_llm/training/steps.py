"""One global batch through this rank's part of the model: the mean loss, and for training the gradients.

Intake: the rank's micro-batches, checked, with their masks. Direct: micro-batch by micro-batch through the whole model.
Pipelined: the micro-batches pass through the stages of the pipeline ranks (1F1B, or interleaved where a rank holds
several stages); only the last stage knows the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_llm.model.llama import Llama
from megatron_llm.parallel.sharding import free_gathered_weights, synchronise_gradients
from megatron_llm.parallel.world import World
from megatron_llm.training.document_masks import NONE, Masks
from run_contract.errors import UserError

Inputs = tuple[Tensor, Tensor, dict[str, Any]]
"""Tokens and targets, each (b, seq_length), on the device; what else the model takes."""


class Steps(Protocol):
    """How a rank computes a global batch."""

    loss_scale: float
    """By what gradients are too large; see loss_scale.py."""
    micro_batches: int
    """Of the next global batch, on this rank."""

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """Take this rank's micro-batches (b, seq_length + 1) of one global batch; leave their gradients in the
        parameters. Gives the mean loss, fp32; 0 on a rank without the last layers, NaN where `check` has an error."""
        ...

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """The mean loss without gradients."""
        ...

    def check(self) -> None:
        """Raise UserError for what was wrong with the batches that this rank has taken so far."""
        ...

    def free(self) -> None:
        """Give back the memory that forward passes without a backward one leave occupied."""
        ...


def agreed_mean(world: World, steps: Steps, loss: Tensor) -> float:
    """A loss's mean over the data ranks; if any rank met a mistake in its batches, raise that on all. Collective."""
    mean = world.mean(loss)
    if math.isnan(mean):
        world.on_every_rank(steps.check)
    return mean


class Intake:
    """Takes this rank's micro-batches of a global batch from the data.

    A token that the embedding does not have is only noted, and replaced by another: a rank that ended at once would
    leave the others waiting. The loss becomes NaN, which reaches all ranks, and they ask each other what was wrong.
    """

    def __init__(self, vocab_size: int, world: World, masks: Masks = NONE) -> None:
        self.vocab_size, self.world, self.masks = vocab_size, world, masks
        self.mistake: UserError | None = None

    def one_by_one(self, batches: Iterator[Tensor], count: int) -> Iterator[Inputs]:
        """So many micro-batches, each when its turn comes, unless what counts in all of them must be known first."""
        own: Iterable[Tensor] = islice(batches, count)
        divisor = None
        if self.masks.over_global_batch:
            own = list(own)
            divisor = self._divisor(torch.cat(own), count)
        for batch in own:
            yield self._inputs(batch, divisor)

    def together(self, batches: Iterator[Tensor], count: int) -> Inputs:
        """So many micro-batches, one below the other."""
        own = torch.cat(list(islice(batches, count)))
        return self._inputs(own, self._divisor(own, count))

    def check(self) -> None:
        """See Steps."""
        if self.mistake:
            raise self.mistake

    def judged(self, loss: Tensor) -> Tensor:
        """The loss, or NaN where `check` has an error."""
        return loss * math.nan if self.mistake else loss

    def _divisor(self, batch: Tensor, count: int) -> float | None:
        """By what each micro-batch's sum is divided so that the mean over micro-batches and data ranks is the sum over
        the global batch by the number of its counted tokens. None: by the micro-batch's own number. Collective."""
        if not self.masks.over_global_batch:
            return None
        number = self.world.data_total(self.masks.number(batch[:, :-1]))
        return max(number, 1) / (count * self.world.data_size)

    def _inputs(self, batch: Tensor, divisor: float | None) -> Inputs:
        lowest, highest = (int(bound) for bound in batch.aminmax())
        if not 0 <= lowest <= highest < self.vocab_size:
            self.mistake = self.mistake or UserError(
                f"the data has token {lowest if lowest < 0 else highest} and the model's embedding only "
                f"{self.vocab_size} rows; tokenise with the model's own tokenizer and --no_new_tokens"
            )
            batch = batch.clamp(0, self.vocab_size - 1)
        batch = batch.to(self.world.device)
        tokens, targets = batch[:, :-1], batch[:, 1:]
        named: dict[str, Any] = {**self.masks.inputs(tokens)}
        return tokens, targets, named if divisor is None else named | {"divisor": divisor}


class Direct:
    """Without a pipeline."""

    def __init__(self, model: Llama, micro_batches: int, world: World, masks: Masks = NONE) -> None:
        self.model, self.micro_batches, self.device = model, micro_batches, world.device
        self.intake = Intake(model.config.vocab_size, world, masks)
        self.loss_scale = 1.0

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """See Steps. Gradients are reduced over the ranks once, with the last micro-batch."""
        total = torch.zeros((), device=self.device)
        for number, inputs in enumerate(self.intake.one_by_one(batches, self.micro_batches)):
            synchronise_gradients(self.model, now=number == self.micro_batches - 1)
            loss = self._loss(inputs)
            (loss / self.micro_batches * self.loss_scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self.intake.judged(total / self.micro_batches)

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """See Steps."""
        losses = [self._loss(inputs) for inputs in self.intake.one_by_one(batches, self.micro_batches)]
        return self.intake.judged(torch.stack(losses).mean())

    def check(self) -> None:
        """See Steps."""
        self.intake.check()

    def free(self) -> None:
        """See Steps."""
        free_gathered_weights(self.model)

    def _loss(self, inputs: Inputs) -> Tensor:
        tokens, targets, named = inputs
        loss: Tensor = self.model(tokens, targets, **named)
        return loss
