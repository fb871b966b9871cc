"""Activation recomputation: keep a function's inputs only, and compute it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"] | None
"""Nothing; norms, rotary embeddings, the attention core and the MLP's activation; or whole layers."""


@dataclass(frozen=True)
class WholeLayers:
    """Which layers of a pipeline stage `full` recomputation is for, and how many are computed again together."""

    first: int | None = None
    """Only the first so many (--recompute_method block); None: all."""
    group: int = 1
    """Neighbours of which only the first one's input is kept (--recompute_method uniform)."""

    @classmethod
    def of(cls, method: Literal["uniform", "block"] | None, layers: int) -> WholeLayers:
        """From --recompute_method and --recompute_num_layers."""
        return cls(first=layers) if method == "block" else cls(group=layers) if method == "uniform" else cls()


EACH = WholeLayers()


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, when: bool) -> Tensor:
    """Call the function; when asked, keep only its inputs and compute it again in the backward pass."""
    if not when or not torch.is_grad_enabled():
        return function(*inputs)
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))
