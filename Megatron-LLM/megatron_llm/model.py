"""The Llama model: tokens -> embedding -> layers (attention, SwiGLU MLP, RMSNorm before each) -> logits.

`state_dict()` is the engine's canonical state; rotary embeddings use Hugging Face's two-halves layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_llm.model_config import ModelConfig

Recompute = Literal["selective", "full"] | None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)


def rotary_angles(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, kv_channels), fp32, of positions 0 … length-1; both halves hold the same angles."""
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.int64, device=device).float() / config.kv_channels
    frequencies = 1.0 / config.rope_theta**exponents / config.rope_scaling_factor
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to (b, heads, s, kv_channels)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q (b, H, s, d), k and v (b, G, s, d) -> (b, H, s, d)."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, when: bool) -> Tensor:
    """Call the function; when asked, keep only its inputs and compute it again in the backward pass."""
    if not when or not torch.is_grad_enabled():
        return function(*inputs)
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.head_size, self.selective = config.kv_channels, recompute == "selective"
        queries, keys = (n * config.kv_channels for n in (config.num_attention_heads, config.num_attention_heads_kv))
        self.wq = nn.Linear(config.hidden_size, queries, bias=False)
        self.wk = nn.Linear(config.hidden_size, keys, bias=False)
        self.wv = nn.Linear(config.hidden_size, keys, bias=False)
        self.wo = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden)."""
        q, k, v = (self._heads(projection(x)) for projection in (self.wq, self.wk, self.wv))
        mixed = recomputed(attend, rotate(q, cos, sin), rotate(k, cos, sin), v, when=self.selective)
        return cast(Tensor, self.wo(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.selective = recompute == "selective"
        self.w1 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden)."""
        return cast(Tensor, self.w2(recomputed(swiglu, self.w1(x), self.w3(x), when=self.selective)))


class Layer(nn.Module):
    """One transformer layer: two residual branches, each normed first."""

    def __init__(self, config: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.full = recompute == "full"
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, recompute)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, recompute)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden)."""
        return recomputed(self._branches, x, cos, sin, when=self.full)

    def _branches(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """The whole model. `layers` is keyed by the layer's number in the model, whichever layers a process holds."""

    def __init__(self, config: ModelConfig, recompute: Recompute = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(n): Layer(config, recompute) for n in range(config.num_layers)})
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        if not config.tie_embed_logits:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (b, s) int64 -> logits (b, s, vocab_size) in the parameters' dtype."""
        x = self.embedding(tokens)
        cos, sin = (angles.to(x.dtype) for angles in rotary_angles(self.config, tokens.shape[1], tokens.device))
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        head = self.embedding if self.config.tie_embed_logits else self.lm_head
        return functional.linear(self.final_layernorm(x), head.weight)


def initial_weights(config: ModelConfig, seed: int, std: float) -> Iterator[tuple[str, Tensor]]:
    """Fresh weights by name, fp32: normal with `std`, less for projections into the residual stream, ones for norms.

    They depend on the geometry and the seed only, not on how the model is spread over processes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    residual_std = std / (2.0 * config.num_layers) ** 0.5
    for name, shape in shapes.items():
        if "norm" in name:
            yield name, torch.ones(shape)
        else:
            narrow = name.endswith(("attention.wo.weight", "mlp.w2.weight"))
            yield name, torch.empty(shape).normal_(0.0, residual_std if narrow else std, generator=generator)
