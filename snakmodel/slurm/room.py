"""How many jobs still fit into the queue, and waiting until some of them do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from run_contract.errors import UserError
from snakmodel.slurm.jobs import CONTINUATION
from snakmodel.slurm.limits import Limit, Limits

_POLL_SECONDS = 15


@dataclass
class Room:
    """The room that the limits leave, which shrinks with every submission.

    Without limits, as in a dry run, there is room for everything.
    """

    limits: Limits | None
    taken: dict[str, int] = field(default_factory=dict)
    """Maps the name of a limit to the number of jobs submitted since the limit was read."""

    def tightest(self, stage: str) -> Limit | None:
        """The limit that leaves a stage the least room at the moment, or None if there are no limits."""
        every = [limit for limit in self.limits.queue if limit.counts(stage)] if self.limits else []
        return min(every, key=self._left, default=None)

    def of(self, stage: str) -> int:
        """How many jobs of a stage may be submitted now."""
        limit = self.tightest(stage)
        return sys.maxsize if limit is None else max(0, self._left(limit))

    def array_of(self, stage: str) -> int:
        """How many jobs of a stage may be submitted now as one array."""
        return min(self.of(stage), self.limits.array_tasks) if self.limits else self.of(stage)

    def width(self, stage: str) -> int | None:
        """How many jobs of a stage may run at the same time, or None if that is not limited."""
        return self.limits.width(stage) if self.limits else None

    def take(self, stage: str, count: int) -> None:
        """Record that `count` jobs of a stage were submitted."""
        for limit in self.limits.queue if self.limits else ():
            if limit.counts(stage):
                self.taken[limit.name] = self.taken.get(limit.name, 0) + count

    def holds(self, wanted: Mapping[str, Sequence[int]]) -> bool:
        """Whether all of these packs (stage -> packs) fit."""
        return all(
            sum(len(packs) for stage, packs in wanted.items() if limit.counts(stage)) <= self._left(limit)
            for limit in (self.limits.queue if self.limits else ())
        )

    def _left(self, limit: Limit) -> int:
        return limit.room - self.taken.get(limit.name, 0)


@dataclass
class QueueRoom:
    """Finds room in the queue under the limits that `read` asks Slurm for."""

    read: Callable[[], Limits]
    stays: bool = False
    """Whether this process stays until everything is submitted, so that no continuation job is needed (`--wait`)."""
    continues: bool = False
    """Whether this process is a continuation job, which waits until there is room for at least one pack."""
    can_continue: bool = False
    """Whether a continuation job can be submitted for what does not fit now."""
    limits: Limits | None = None
    """The limits as they were read last; None before the first time, and in a dry run for ever."""

    def update(self) -> Limits:
        """Ask Slurm for the limits and what is used of them."""
        self.limits = self.read()
        return self.limits

    def find(self, todo: Mapping[str, Sequence[int]], *, continuation_is_queued: bool) -> Room:
        """The room in the queue: for at least one pack of the first stage, and for a continuation job if one is needed.

        A process that stays, and a continuation job, wait until there is room. Every other process raises UserError.
        """
        first = next(name for name, packs in todo.items() if packs)
        said = ""
        while True:
            room = Room(self.limits)
            whole = room.holds(todo)
            if not whole and not self.stays and not continuation_is_queued:
                room.take(CONTINUATION, 1)
            limit = room.tightest(first)
            if limit is None or (not self.stays and continuation_is_queued):
                return room
            # When this process waits for room, a few larger arrays are better than many small ones.
            least = min(len(todo[first]), max(1, limit.most // 4)) if self.stays else 1
            if room.of(first) >= least:
                break
            what = f"{limit}; {sum(len(packs) for packs in todo.values())} packs are left to submit"
            if limit.most < least + room.taken.get(limit.name, 0):
                raise UserError(f"{what}. This limit is too small for a chain of jobs: ask for a larger one.")
            if not self.stays and not self.continues:
                raise UserError(f"no room in the queue: {what}. Wait, or add --wait-for-room.")
            if what != said:
                print(f"waiting for room: {what}", flush=True)
                said = what
            time.sleep(_POLL_SECONDS)
            self.update()
        if not whole and not self.stays and not self.can_continue:
            raise UserError(f"this does not fit into the queue: {limit}. Add --wait-for-room.")
        return room
