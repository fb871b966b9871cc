"""Computes one global batch on this rank's part of the model: the mean loss and, for training, the gradients.

`Intake` takes the rank's micro-batches from the data, checks them and adds the masks. `Direct` passes one micro-batch
after another through the whole model. `pipeline.Pipelined` passes the micro-batches through the stages of the pipeline
ranks (1F1B, or interleaved where a rank holds several stages); there only the last stage knows the loss.
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
"""Tokens and targets, each (b, seq_length), on the device, and the model's other inputs by name."""


class Steps(Protocol):
    """The interface by which a rank computes a global batch."""

    loss_scale: float
    """Factor by which the gradients are too large; see optim/loss_scale.py."""
    micro_batches: int
    """Number of micro-batches that this rank computes for the next global batch."""

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """Compute this rank's micro-batches (b, seq_length + 1) of a global batch; leaves the gradients in the
        parameters.

        Returns the mean loss, fp32. It is 0 on a rank without the last layers, and NaN if `check` would raise an error.
        """
        ...

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """Return the mean loss of one global batch without computing gradients."""
        ...

    def check(self) -> None:
        """Raise UserError if anything was wrong with the batches that this rank has taken so far."""
        ...

    def free(self) -> None:
        """Free the memory that forward passes without a backward pass leave occupied."""
        ...


def agreed_mean(world: World, steps: Steps, loss: Tensor) -> float:
    """The mean of a loss over the data ranks; if a batch of any rank was wrong, its error is raised on all.

    Collective.
    """
    mean = world.mean(loss)
    if math.isnan(mean):
        world.on_every_rank(steps.check)
    return mean


class Intake:
    """Takes this rank's micro-batches of a global batch from the data.

    A token that the embedding does not have is only recorded, and replaced by a valid one: if this rank ended at once,
    the other ranks would wait for it. Instead the loss becomes NaN, which reaches all ranks, and they then exchange
    their errors.
    """

    def __init__(self, vocab_size: int, world: World, masks: Masks = NONE) -> None:
        self.vocab_size, self.world, self.masks = vocab_size, world, masks
        self.mistake: UserError | None = None

    def one_by_one(self, batches: Iterator[Tensor], count: int) -> Iterator[Inputs]:
        """Yield `count` micro-batches, each read when it is needed; if the loss needs the number of counted tokens of
        all of them, they are all read first."""
        own: Iterable[Tensor] = islice(batches, count)
        divisor = None
        if self.masks.over_global_batch:
            own = list(own)
            divisor = self._divisor(torch.cat(own), count)
        for batch in own:
            yield self._inputs(batch, divisor)

    def together(self, batches: Iterator[Tensor], count: int) -> Inputs:
        """Return `count` micro-batches concatenated along the batch dimension."""
        own = torch.cat(list(islice(batches, count)))
        return self._inputs(own, self._divisor(own, count))

    def check(self) -> None:
        """See Steps."""
        if self.mistake:
            raise self.mistake

    def judged(self, loss: Tensor) -> Tensor:
        """The loss, or NaN if `check` would raise an error."""
        return loss * math.nan if self.mistake else loss

    def _divisor(self, batch: Tensor, count: int) -> float | None:
        """The number by which each micro-batch's summed loss is divided, or None: the micro-batch's own counted tokens.

        Collective. It makes the mean over micro-batches and data ranks equal to the sum over the global batch divided
        by the number of its counted tokens.
        """
        if not self.masks.over_global_batch:
            return None
        number = self.world.data_total(self.masks.number(batch[:, :-1]))
        return max(number, 1) / (count * self.world.data_size)

    def _inputs(self, batch: Tensor, divisor: float | None) -> Inputs:
        lowest, highest = (int(bound) for bound in batch.aminmax())
        if not 0 <= lowest <= highest < self.vocab_size:
            self.mistake = self.mistake or UserError(
                f"the data has token {lowest if lowest < 0 else highest}, but the model's embedding has only "
                f"{self.vocab_size} rows; tokenise with the model's own tokenizer and --no_new_tokens"
            )
            batch = batch.clamp(0, self.vocab_size - 1)
        batch = batch.to(self.world.device)
        tokens, targets = batch[:, :-1], batch[:, 1:]
        named: dict[str, Any] = {**self.masks.inputs(tokens)}
        return tokens, targets, named if divisor is None else named | {"divisor": divisor}


class Direct:
    """The steps of a rank that holds the whole depth of the model, without a pipeline."""

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
