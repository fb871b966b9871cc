"""Activation recomputation: keep a function's inputs only, and compute it again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"] | None
"""Nothing; norms, rotary embeddings, the attention core and the MLP's activation; or whole layers."""


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, when: bool) -> Tensor:
    """Call the function; when asked, keep only its inputs and compute it again in the backward pass."""
    if not when or not torch.is_grad_enabled():
        return function(*inputs)
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))
