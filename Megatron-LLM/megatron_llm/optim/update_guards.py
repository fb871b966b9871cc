"""The guards of an update: none is made from numbers that are not finite, from an fp16 overflow, or from a spike.

A spike is a loss or gradient norm far above those of the last updates (--skip_spikes); the idea is that of OLMo-core's
SkipStepOptimizer. Unlike there, skipped iterations do not enter the statistics, so that a second spike is still noticed
after the first one. A run whose level has really changed is stopped by a limit on skips in a row. All ranks have the
same numbers, and so they make the same decision.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from megatron_llm.flags.arguments import PrecisionFlags, TrainingFlags
from megatron_llm.optim.loss_scale import LossScale

SKIPS_IN_A_ROW = 10
"""Number of iterations in a row that may be skipped because of spikes, or of overflows at the smallest loss scale.

The next one stops the run.
"""


class Diverged(Exception):
    """Raised when the run must not go on as it is; the last update was not made."""


@dataclass
class SpikeHistory:
    """The guards' memory of a run; stored in every checkpoint."""

    losses: list[float] = field(default_factory=list)
    """Losses of the last updates, at most --spike_window of them."""
    norms: list[float] = field(default_factory=list)
    norm: float = 0.0
    """Gradient norm of the last update, for the log."""
    skips_in_a_row: int = 0
    skips_since_log: int = 0
    """Number of iterations without an update, for any reason, since the last log line."""
    loss_scale: LossScale | None = None


@dataclass(frozen=True)
class JudgedIteration:
    """The iteration that is judged, and its samples."""

    iteration: int
    samples: range

    def __str__(self) -> str:
        return f"samples {self.samples[0]} to {self.samples[-1]}"


def objection(
    training: TrainingFlags,
    precision: PrecisionFlags,
    memory: SpikeHistory,
    loss: float,
    norm: float,
    place: JudgedIteration,
) -> str | None:
    """The reason why this iteration makes no update; None if it may. Raises Diverged when the run must stop."""
    scale = memory.loss_scale
    overflow = scale is not None and math.isfinite(loss) and not math.isfinite(norm)
    if not overflow:
        _check_finite(loss, norm, place)
    reason = _overflow(precision, scale, overflow=overflow) if scale else None
    reason = reason or _spike(training, memory, loss, norm)
    if reason is None:
        memory.skips_in_a_row, memory.norm = 0, norm
        if training.skip_spikes is not None:
            memory.losses = [*memory.losses, loss][-training.spike_window :]
            memory.norms = [*memory.norms, norm][-training.spike_window :]
        return None
    memory.skips_in_a_row += 1
    if memory.skips_in_a_row > SKIPS_IN_A_ROW and not (overflow and scale and not scale.at_floor(precision)):
        raise Diverged(
            f"iteration {place.iteration}: {reason} ({place}); {SKIPS_IN_A_ROW} iterations before it were skipped "
            "already, so this is no passing spike; the last checkpoint is kept: lower --lr, look at these samples, or "
            "go on from an earlier checkpoint"
        )
    return reason


def _check_finite(loss: float, norm: float, place: JudgedIteration) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"iteration {place.iteration}: lm loss is {loss} and the grad norm {norm} ({place}); the update was not "
            "made and the last checkpoint is kept; lower --lr, lengthen the warm-up, or look at these samples"
        )


def _overflow(precision: PrecisionFlags, scale: LossScale, *, overflow: bool) -> str | None:
    before = scale.factor
    scale.adjust(precision, overflow=overflow)
    return f"gradients overflow fp16 at loss scale {before:g}, next is {scale.factor:g}" if overflow else None


def _spike(training: TrainingFlags, memory: SpikeHistory, loss: float, norm: float) -> str | None:
    """A clause on a loss or gradient norm far above its mean; None without one, or before half a window is known."""
    if training.skip_spikes is None or len(memory.losses) < max(2, training.spike_window // 2):
        return None
    for name, value, window in (("lm loss", loss, memory.losses), ("grad norm", norm, memory.norms)):
        mean, deviation = statistics.fmean(window), statistics.stdev(window)
        if value > mean + training.skip_spikes * deviation:
            return (
                f"{name} {value:g} is more than {training.skip_spikes:g} standard deviations of {deviation:g} above "
                f"{mean:g}, the mean of {len(window)} updates (--skip_spikes); lm loss {loss:g}, grad norm {norm:g}"
            )
    return None
