"""How many samples each update takes: --global_batch_size, or fewer in the beginning with --rampup_batch_size.

The size of an update depends only on the samples consumed before it, as in Megatron's ramp-up, so a run that goes on
has the same updates as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from run_contract.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a run's updates, in samples."""

    full: int
    start: int
    increment: int
    ramp: int
    """Samples over which the size grows from `start` to `full`; 0 when it does not."""

    @classmethod
    def of(cls, full: int, rampup: Sequence[int] | None) -> BatchSizes:
        """From --global_batch_size and --rampup_batch_size. Raises UserError when they do not fit together."""
        if rampup is None:
            return cls(full, full, full, 0)
        said = f"--rampup_batch_size {' '.join(map(str, rampup))}"
        if len(rampup) != 3 or min(rampup) < 1:
            raise UserError(
                f"{said}: give three numbers above 0: the first size, the increment, and the samples it takes"
            )
        start, increment, ramp = rampup
        if start >= full or (full - start) % increment:
            raise UserError(
                f"{said}: --global_batch_size {full} must be {start} plus a whole number of increments of {increment}"
            )
        return cls(full, start, increment, ramp)

    def at(self, consumed: int) -> int:
        """The size of the update that comes after so many consumed samples."""
        if not self.ramp or consumed > self.ramp:
            return self.full
        increments = (self.full - self.start) // self.increment
        return self.start + int(consumed / (self.ramp / increments)) * self.increment  # rounded as in Megatron

    def all(self) -> list[int]:
        """Every size that occurs, the smallest first."""
        return [*range(self.start, self.full, self.increment), self.full]

    def consumed(self, consumed: int, updates: int) -> int:
        """The samples consumed after so many more updates."""
        while updates and self.ramp and consumed <= self.ramp:
            consumed, updates = consumed + self.at(consumed), updates - 1
        return consumed + updates * self.full

    def iterations(self, samples: int) -> int:
        """How many whole updates a run of so many samples has, as Megatron counts them."""
        updates = consumed = 0
        while self.ramp and consumed <= self.ramp:
            consumed, updates = consumed + self.at(consumed), updates + 1
        if consumed > samples:
            raise UserError(
                f"--train_samples {samples}: the growth of the batch size alone takes {consumed} samples "
                "(--rampup_batch_size); train on more, or let it grow faster"
            )
        return updates + (samples - consumed) // self.full

    def last(self, consumed: int) -> int:
        """The size of the update after which so many samples are consumed."""
        before = 0
        while self.ramp and before <= self.ramp:
            size = self.at(before)
            if before + size >= consumed:
                return size
            before += size
        return self.full
