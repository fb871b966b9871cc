"""Loss scaling for fp16, whose smallest numbers are too large for many gradients.

The loss is multiplied before the backward pass and the gradients are divided after it. As in Megatron-LM's
DynamicGradScaler: gradients that overflow make no update; after `hysteresis` of them each halves the scale, and
`loss_scale_window` updates without one double it and forgive the overflows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megatron_llm.flags.arguments import Arguments

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """Where the scale stands; stored in every checkpoint."""

    factor: float
    clean: int = 0
    """Updates since the last overflow or growth."""
    forgiven: int = 0
    """Overflows since the last growth that have counted against the hysteresis."""

    @classmethod
    def of(cls, args: Arguments, saved: LossScale | None) -> LossScale | None:
        """The run's: the checkpoint's, or a new one; the constant --loss_scale; None without --fp16."""
        if not args.fp16:
            return None
        if args.loss_scale is not None:
            return cls(args.loss_scale)
        return saved or cls(args.initial_loss_scale)

    def adjust(self, args: Arguments, *, overflow: bool) -> None:
        """Take note of an iteration, and change the scale for the next one if it is time."""
        if args.loss_scale is not None:
            return
        if overflow:
            self.clean, self.forgiven = 0, self.forgiven + 1
            if self.forgiven >= args.hysteresis:
                self.factor = max(self.factor * BACKOFF, args.min_loss_scale)
            return
        self.clean += 1
        if self.clean == args.loss_scale_window:
            self.clean, self.forgiven, self.factor = 0, 0, self.factor * GROWTH

    def at_floor(self, args: Arguments) -> bool:
        """Whether it cannot become smaller."""
        return args.loss_scale is not None or self.factor <= args.min_loss_scale

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the gradients their true size."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.factor)
