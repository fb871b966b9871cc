"""Loss scaling for fp16, whose smallest representable numbers are too large for many gradients.

The loss is multiplied by the scale before the backward pass, and the gradients are divided by it afterwards. The scale
is adjusted as in Megatron-LM's DynamicGradScaler. Gradients that overflow make no update. From the `hysteresis`-th
overflow on, each one halves the scale. `loss_scale_window` updates without an overflow double it and reset the count of
overflows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megatron_llm.flags.arguments import PrecisionFlags

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """The current loss scale; stored in every checkpoint."""

    factor: float
    clean: int = 0
    """Number of updates since the last overflow or growth."""
    forgiven: int = 0
    """Number of overflows since the last growth, which count against the hysteresis."""

    @classmethod
    def of(cls, precision: PrecisionFlags, saved: LossScale | None) -> LossScale | None:
        """The loss scale of a run: the constant --loss_scale, the checkpoint's, or a new one; None without --fp16."""
        if not precision.fp16:
            return None
        if precision.loss_scale is not None:
            return cls(precision.loss_scale)
        return saved or cls(precision.initial_loss_scale)

    def adjust(self, precision: PrecisionFlags, *, overflow: bool) -> None:
        """Record whether an iteration overflowed, and change the scale for the next one if that is due."""
        if precision.loss_scale is not None:
            return
        if overflow:
            self.clean, self.forgiven = 0, self.forgiven + 1
            if self.forgiven >= precision.hysteresis:
                self.factor = max(self.factor * BACKOFF, precision.min_loss_scale)
            return
        self.clean += 1
        if self.clean == precision.loss_scale_window:
            self.clean, self.forgiven, self.factor = 0, 0, self.factor * GROWTH

    def at_floor(self, precision: PrecisionFlags) -> bool:
        """Whether the scale cannot become smaller."""
        return precision.loss_scale is not None or self.factor <= precision.min_loss_scale

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.factor)
