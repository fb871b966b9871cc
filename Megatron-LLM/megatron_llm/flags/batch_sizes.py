"""The number of samples per update: --global_batch_size, or fewer in the beginning with --rampup_batch_size.

The size of an update depends only on the samples consumed before it, as in Megatron's ramp-up, so a run that was
resumed has the same updates as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from run_contract.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a run's updates in samples."""

    full: int
    start: int
    increment: int
    ramp: int
    """Number of samples over which the size grows from `start` to `full`; 0 if it does not grow."""

    @classmethod
    def of(cls, full: int, rampup: Sequence[int] | None) -> BatchSizes:
        """The sizes of --global_batch_size and --rampup_batch_size. Raises UserError when they do not fit together."""
        if rampup is None:
            return cls(full, full, full, 0)
        said = f"--rampup_batch_size {' '.join(map(str, rampup))}"
        if len(rampup) != 3 or min(rampup) < 1:
            raise UserError(
                f"{said}: give three numbers above 0: the first size, the increment, and the number of samples over "
                "which the batch size grows"
            )
        start, increment, ramp = rampup
        if start >= full or (full - start) % increment:
            raise UserError(
                f"{said}: --global_batch_size {full} must be {start} plus a whole number of increments of {increment}"
            )
        return cls(full, start, increment, ramp)

    def at(self, consumed: int) -> int:
        """The size of the update after `consumed` samples."""
        if not self.ramp or consumed > self.ramp:
            return self.full
        increments = (self.full - self.start) // self.increment
        return self.start + int(consumed / (self.ramp / increments)) * self.increment  # rounded as in Megatron

    def all(self) -> list[int]:
        """All sizes that occur, in ascending order."""
        return [*range(self.start, self.full, self.increment), self.full]

    def consumed(self, consumed: int, updates: int) -> int:
        """The number of samples consumed after `updates` more updates."""
        while updates and self.ramp and consumed <= self.ramp:
            consumed, updates = consumed + self.at(consumed), updates - 1
        return consumed + updates * self.full

    def iterations(self, samples: int) -> int:
        """The number of whole updates in a run of `samples` samples, as Megatron counts them. Raises UserError."""
        updates = consumed = 0
        while self.ramp and consumed <= self.ramp:
            consumed, updates = consumed + self.at(consumed), updates + 1
        if consumed > samples:
            raise UserError(
                f"--train_samples {samples}: the growth of the batch size alone takes {consumed} samples "
                "(--rampup_batch_size); train on more samples, or let the batch size grow over fewer"
            )
        return updates + (samples - consumed) // self.full

    def last(self, consumed: int) -> int:
        """The size of the update that raises the number of consumed samples to `consumed`."""
        before = 0
        while self.ramp and before <= self.ramp:
            size = self.at(before)
            if before + size >= consumed:
                return size
            before += size
        return self.full
