"""Activation recomputation: keep only the inputs of a function, and compute it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"] | None
"""What is recomputed: nothing; norms, rotary embeddings, attention core and the MLP's activation; or whole layers."""


@dataclass(frozen=True)
class WholeLayers:
    """The layers of a pipeline stage that `full` recomputation applies to, and how many are recomputed together."""

    first: int | None = None
    """Only this number of first layers is recomputed (--recompute_method block); None: all layers."""
    group: int = 1
    """Number of neighbouring layers of which only the first one's input is kept (--recompute_method uniform)."""

    @classmethod
    def of(cls, method: Literal["uniform", "block"] | None, layers: int) -> WholeLayers:
        """The choice of --recompute_method and --recompute_num_layers."""
        return cls(first=layers) if method == "block" else cls(group=layers) if method == "uniform" else cls()


EACH = WholeLayers()


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, when: bool) -> Tensor:
    """Call a function; if `when`, keep only its inputs, and compute it again in the backward pass."""
    if not when or not torch.is_grad_enabled():
        return function(*inputs)
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))
