"""One global batch through this rank's part of the model: the mean loss, and for training the gradients.

Direct: micro-batch by micro-batch through the whole model. Pipelined: the micro-batches pass through the stages of the
pipeline ranks (1F1B, or interleaved where a rank holds several stages); only the last stage knows the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_llm.files import FoundByOneRank
from megatron_llm.masks import NONE, Masks
from megatron_llm.model import Llama
from megatron_llm.sharding import free_gathered_weights, synchronise_gradients


class Steps(Protocol):
    """How a rank computes a global batch."""

    loss_scale: float
    """By what gradients are too large; see loss_scale.py."""
    micro_batches: int
    """Of the next global batch, on this rank."""

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """Take this rank's micro-batches (b, seq_length + 1) of one global batch; leave their gradients in the
        parameters. Gives the mean loss, fp32; 0 on a rank without the last layers."""
        ...

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """The mean loss without gradients."""
        ...

    def free(self) -> None:
        """Give back the memory that forward passes without a backward one leave occupied."""
        ...


def checked(batch: Tensor, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each (b, seq_length), on the device. Raises UserError for a token that no embedding has."""
    if (highest := int(batch.max())) >= vocab_size:
        raise FoundByOneRank(
            f"the data has token {highest} and the model's embedding only {vocab_size} rows; tokenise with the model's "
            "own tokenizer and --no_new_tokens"
        )
    batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]


class Direct:
    """Without a pipeline."""

    def __init__(self, model: Llama, micro_batches: int, device: torch.device, masks: Masks = NONE) -> None:
        self.model, self.micro_batches, self.device, self.masks = model, micro_batches, device, masks
        self.loss_scale = 1.0

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """See Steps. Gradients are reduced over the ranks once, with the last micro-batch."""
        total = torch.zeros((), device=self.device)
        for number in range(self.micro_batches):
            synchronise_gradients(self.model, now=number == self.micro_batches - 1)
            loss = self._loss(next(batches))
            (loss / self.micro_batches * self.loss_scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total / self.micro_batches

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """See Steps."""
        losses = [self._loss(next(batches)) for _ in range(self.micro_batches)]
        return torch.stack(losses).mean()

    def free(self) -> None:
        """See Steps."""
        free_gathered_weights(self.model)

    def _loss(self, batch: Tensor) -> Tensor:
        tokens, targets = checked(batch, self.model.config.vocab_size, self.device)
        loss: Tensor = self.model(tokens, targets, **self.masks.inputs(tokens))
        return loss
