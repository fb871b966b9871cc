"""AdamW with Megatron's parameter groups, the learning-rate schedule counted in samples, and the global gradient
norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from run_contract.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARES: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: 1.0 - ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
    "exponential": lambda ratio: 2.0 * 0.5**ratio - 1.0,
    "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
}
"""The share of max_lr - min_lr that is left after a share of the decay, as in Megatron-LM's OptimizerParamScheduler."""


@dataclass(frozen=True)
class Schedule:
    """The schedule: linear warm-up from 0 to max_lr, then decay to min_lr; and the growth of the weight decay.

    All lengths are counted in samples.
    """

    max_lr: float
    min_lr: float
    warmup_samples: float
    decay_samples: float
    style: str
    wsd_style: str = ""
    """WSD: shape of the decay at the end, one of SHARES."""
    wsd_samples: float = 0
    """WSD: length of that decay, which ends where the schedule ends."""
    start_weight_decay: float = 0.01
    end_weight_decay: float = 0.01
    weight_decay_style: str = "constant"
    """How the weight decay grows from start to end: constant (not at all), linear or cosine."""
    weight_decay_samples: float = 0
    """Number of samples over which the weight decay grows."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.max_lr:
            raise UserError(
                f"--min_lr {self.min_lr} and --lr {self.max_lr}: --min_lr must be at least 0 and at most --lr"
            )
        if not 0 <= self.warmup_samples < self.decay_samples:
            raise UserError(
                f"the warm-up takes {self.warmup_samples:g} samples and the decay ends at {self.decay_samples:g}; "
                "make --lr_warmup_iters (or --lr_warmup_fraction) smaller than --lr_decay_iters"
            )
        if self.wsd_samples > self.decay_samples:
            raise UserError(
                f"--lr_wsd_decay_iters is {self.wsd_samples:g} samples, but the whole decay has only "
                f"{self.decay_samples:g}; make it at most --lr_decay_iters"
            )

    def at(self, samples: int) -> float:
        """The learning rate of the update after `samples` samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.max_lr * samples / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if samples > self.decay_samples:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(self.warmup_samples, 1)) / math.sqrt(max(samples, 1)))
        if self.style == "WSD":
            past = samples - (self.decay_samples - self.wsd_samples)
            share = 1.0 if past <= 0 else SHARES[self.wsd_style](past / self.wsd_samples)
        else:
            share = SHARES[self.style]((samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples))
        return self.min_lr + share * (self.max_lr - self.min_lr)

    def weight_decay(self, samples: int) -> float:
        """The weight decay of the update after `samples` samples."""
        if self.weight_decay_style == "constant" or samples > self.weight_decay_samples:
            return self.end_weight_decay
        share = 1.0 - SHARES[self.weight_decay_style](samples / self.weight_decay_samples)
        return self.start_weight_decay + share * (self.end_weight_decay - self.start_weight_decay)

    def resumed(self, saved: dict[str, Any], *, use_checkpoint: bool, override: bool) -> Schedule:
        """The schedule with which to go on, given the checkpoint's.

        Raises UserError if they differ and no flag chooses one.
        """
        before = Schedule(**saved)  # older schedules lack the fields of WSD and of a growing weight decay
        if before == self:
            return self
        now = asdict(self)
        found = ", ".join(f"{name} {old} -> {now[name]}" for name, old in asdict(before).items() if old != now[name])
        if override:
            print(
                f"the learning-rate schedule is taken from the flags (--override_opt_param_scheduler): {found}",
                flush=True,
            )
            return self
        if use_checkpoint:
            print(
                "the learning-rate schedule is kept from the checkpoint (--use_checkpoint_opt_param_scheduler), and "
                f"the flags do not change it: {found}",
                flush=True,
            )
            return before
        raise UserError(
            f"the learning-rate schedule differs from the checkpoint's ({found}); pass "
            "--use_checkpoint_opt_param_scheduler to keep the old or --override_opt_param_scheduler to take the new one"
        )


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (decoupled decay, none for 1-D parameters) with its moments allocated, ready to be loaded into."""
    own = list(parameters)
    decayed = [p for p in own if p.ndim > 1]
    plain = [p for p in own if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
    for parameter in own:
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | {
            name: torch.zeros_like(parameter) for name in MOMENTS
        }
    return optimizer


def set_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Set how many updates the moments have seen, for Adam's bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def update(optimizer: torch.optim.AdamW, lr: float, weight_decay: float | None = None) -> None:
    """Make one step with this learning rate and weight decay (by default unchanged), then drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if weight_decay is not None:
        optimizer.param_groups[0]["weight_decay"] = weight_decay  # the group of matrices; the other has none
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gradient_norm(
    parameters: Iterable[nn.Parameter], total: Callable[[Tensor], Tensor], *, count_copies: bool
) -> Tensor:
    """The global L2 norm of all gradients, fp32, equal on every rank; see `_norm`. Collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return _norm(gradients, total, count_copies=count_copies)


def weight_norm(parameters: Iterable[nn.Parameter], total: Callable[[Tensor], Tensor], *, count_copies: bool) -> Tensor:
    """The global L2 norm of all weights, fp32, equal on every rank; see `_norm`. Collective."""
    return _norm([parameter.detach() for parameter in parameters], total, count_copies=count_copies)


def _norm(tensors: list[Tensor], total: Callable[[Tensor], Tensor], *, count_copies: bool) -> Tensor:
    """The global L2 norm of tensors that are spread over ranks.

    total: sums a number over all ranks. If tensor ranks hold copies of a tensor, only one of them may set
    `count_copies`.
    """
    counted = [tensor for tensor in tensors if count_copies or not _is_copied(tensor)]
    norm = nn.utils.get_total_norm([part.to_local() if isinstance(part, DTensor) else part for part in counted])
    return total(norm.double().square()).sqrt().float()


def _is_copied(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(placement.is_replicate() for placement in tensor.placements)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm if the norm exceeds a limit above 0."""
    if limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
