"""Grouped-query self-attention with rotary positions, in Hugging Face's two-halves layout."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.model.config import ModelConfig
from megatron_llm.model.recompute import Recompute, recomputed
from megatron_llm.model.tensor_parallel import (
    ColumnLinear,
    RowLinear,
    TensorParallel,
    column_parallel_matmuls,
    key_value_linear,
    row_parallel_output,
)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Rotary frequencies in radians per position, (kv_channels / 2,) fp32; `llama3` scaling as in Meta's Llama 3.1."""
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.int64, device=device).float() / config.kv_channels
    frequencies = 1.0 / config.rope_theta**exponents
    scaled = frequencies / config.rope_scaling_factor
    if config.rope_scaling_type == "linear":
        return scaled
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_positions * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * scaled + kept * frequencies


def rotary_angles(
    config: ModelConfig, length: int, device: torch.device, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, fp32; both halves of the last dimension hold the same angles.

    (length, kv_channels) for the positions 0 … length-1, or (b, 1, length, kv_channels) for given positions (b,
    length).
    """
    places = torch.arange(length, device=device) if positions is None else positions.unsqueeze(1)
    angles = places.float().unsqueeze(-1) * rotary_frequencies(config, device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def attention_mask(
    window: int | None, length: int, documents: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The mask that is added to attention scores: -inf where a position may not see another one, else 0.

    Its shape is (length, length). With the documents' numbers (b, length), by which a position sees only its own
    document, it is (b, 1, length, length). None if every position sees all positions before it.
    """
    if documents is None and (window is None or window >= length):
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    if documents is not None:
        seen = seen & (documents.unsqueeze(1) == documents.unsqueeze(2)).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to (b, heads, s, kv_channels)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with rotary positions, causal or with a mask: q (b, H, s, d), k and v (b, G, s, d) -> (b, H, s, d)."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if (
        mask is not None and not q.is_cpu
    ):  # with a mask, GPUs have grouped heads only in the kernel that keeps all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """Self-attention; each tensor rank computes its own query heads and the key/value heads that these use."""

    def __init__(self, config: ModelConfig, recompute: Recompute, tp: TensorParallel) -> None:
        super().__init__()
        self.head_size, self.selective, self.tp = config.kv_channels, recompute == "selective", tp
        hidden, queries, groups = config.hidden_size, config.num_attention_heads, config.num_attention_heads_kv
        self.wq = ColumnLinear(hidden, queries * self.head_size)
        self.wk = key_value_linear(hidden, groups, self.head_size, tp)
        self.wv = key_value_linear(hidden, groups, self.head_size, tp)
        self.wo = RowLinear(queries * self.head_size, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden); with sequence parallelism this rank's part of s."""
        weights = self.wq.used(), self.wk.used(), self.wv.used()
        q, k, v = (self._heads(projected) for projected in column_parallel_matmuls(x, weights, self.tp))
        mixed = recomputed(attend, q, k, v, cos, sin, mask, when=self.selective)
        return row_parallel_output(cast(Tensor, self.wo(mixed.transpose(1, 2).flatten(2))), self.tp)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)
