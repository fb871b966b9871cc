"""Llama and related models: tokens -> embedding -> layers (attention, MLP, a norm before each) -> norm -> logits.

`state_dict()` is the engine's canonical state. A process may hold only a part of the layers (pipeline parallelism) and
only a part of each matrix (tensor parallelism); names and whole shapes remain those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_llm.model.attention import Attention, attention_mask, rotary_angles
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.recompute import EACH, Recompute, WholeLayers, recomputed
from megatron_llm.model.tensor_parallel import (
    ALONE,
    ColumnLinear,
    RowLinear,
    TensorParallel,
    VocabEmbedding,
    column_parallel_matmuls,
    cross_entropy,
    local,
    row_parallel_output,
)

if TYPE_CHECKING:
    from megatron_llm.model.hits import Hits


@dataclass(frozen=True)
class StageLayers:
    """The part of the model that a module holds."""

    layers: range
    first: bool
    """Whether this part has the embedding and takes tokens."""
    last: bool
    """Whether this part has the final norm and the output layer, and returns logits or the loss.

    If embeddings are tied and the part is not also the first one, its output layer is a copy that
    training.pipeline.TiedEmbedding keeps equal to the embedding.
    """


class RMSNorm(nn.Module):
    """A root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, epsilon: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon, self.tp = epsilon, tp

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return local(self.weight, partial=self.tp.sequence) * normed.to(x.dtype)


class LayerNorm(nn.Module):
    """A layer norm with bias over the last dimension."""

    def __init__(self, size: int, epsilon: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.epsilon, self.tp = epsilon, tp

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> the same shape and dtype."""
        weight, bias = (local(parameter, partial=self.tp.sequence) for parameter in (self.weight, self.bias))
        return functional.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def norm(config: ModelConfig, tp: TensorParallel) -> RMSNorm | LayerNorm:
    """A norm of the model's kind."""
    return (RMSNorm if config.use_rms_norm else LayerNorm)(config.hidden_size, config.layernorm_epsilon, tp)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The SwiGLU activation: silu(gate) * up."""
    return functional.silu(gate) * up


class MLP(nn.Module):
    """The MLP of a layer: w2(silu(w1 x) * w3 x) or, without a gate, w2(gelu(w3 x))."""

    def __init__(self, config: ModelConfig, recompute: Recompute, tp: TensorParallel) -> None:
        super().__init__()
        self.gated, self.selective, self.tp = config.glu_activation is not None, recompute == "selective", tp
        if self.gated:
            self.w1 = ColumnLinear(config.hidden_size, config.ffn_hidden_size)
        self.w3 = ColumnLinear(config.hidden_size, config.ffn_hidden_size)
        self.w2 = RowLinear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden)."""
        if self.gated:
            gate_up = column_parallel_matmuls(x, (self.w1.used(), self.w3.used()), self.tp)
            inner = recomputed(swiglu, *gate_up, when=self.selective)
        else:
            inner = recomputed(
                functional.gelu, *column_parallel_matmuls(x, (self.w3.used(),), self.tp), when=self.selective
            )
        return row_parallel_output(cast(Tensor, self.w2(inner)), self.tp)


class Layer(nn.Module):
    """One transformer layer: two residual branches, each with a norm first, in sequence or (Falcon) in parallel."""

    def __init__(self, config: ModelConfig, recompute: Recompute, tp: TensorParallel) -> None:
        super().__init__()
        self.full, self.selective = recompute == "full", recompute == "selective"
        self.parallel, self.parallel_norm = config.parallel_attn, config.parallel_layernorm
        self.input_layernorm = norm(config, tp)
        self.attention = Attention(config, recompute, tp)
        if self.parallel_norm:
            self.mlp_layernorm = norm(config, tp)
        elif not self.parallel:
            self.post_attention_layernorm = norm(config, tp)
        self.mlp = MLP(config, recompute, tp)

    def compile_branches(self) -> None:
        """Compile the part of a layer inside the recomputation of whole layers and the hooks of sharding.

        One compiled graph serves all layers.
        """
        self._branches = torch.compile(self._branches, dynamic=False)  # type: ignore[method-assign]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """(b, s, hidden) -> (b, s, hidden)."""
        return recomputed(self._branches, x, cos, sin, mask, when=self.full)

    def _branches(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        normed = self._normed(self.input_layernorm, x)
        attended = self.attention(normed, cos, sin, mask)
        if self.parallel:
            if self.parallel_norm:
                normed = self._normed(self.mlp_layernorm, x)
            return cast(Tensor, x + (self.mlp(normed) + attended))
        x = x + attended
        return cast(Tensor, x + self.mlp(self._normed(self.post_attention_layernorm, x)))

    def _normed(self, layernorm: nn.Module, x: Tensor) -> Tensor:
        return recomputed(layernorm, x, when=self.selective)


class Llama(nn.Module):
    """The model or a part of it. The keys of `layers` are the layers' numbers in the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        recompute: Recompute = None,
        part: StageLayers | None = None,
        tp: TensorParallel = ALONE,
        whole: WholeLayers = EACH,
    ) -> None:
        """recompute: what backward passes compute again; whole: for which layers, if recompute is `full`."""
        super().__init__()
        part = part or StageLayers(range(config.num_layers), first=True, last=True)
        self.config, self.part, self.tp = config, part, tp
        self.hits: Hits | None = None
        """The counter during an evaluation that counts right tokens; otherwise None."""
        if part.first:
            self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, tp)
        grouped = recompute == "full" and whole.group > 1
        self.group = whole.group if grouped else 1
        kinds = [
            None if grouped or (recompute == "full" and whole.first is not None and place >= whole.first) else recompute
            for place in range(len(part.layers))
        ]
        self.layers = nn.ModuleDict(
            {str(n): Layer(config, kind, tp) for n, kind in zip(part.layers, kinds, strict=True)}
        )
        if part.last:
            self.final_layernorm = norm(config, tp)
            if not (config.tie_embed_logits and part.first):
                self.lm_head = ColumnLinear(config.hidden_size, config.vocab_size)

    def compile_layers(self) -> None:
        """Have torch.compile compile the kernels of all layers."""
        for layer in self.layers.values():
            cast(Layer, layer).compile_branches()

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        counted: Tensor | None = None,
        divisor: float | None = None,
    ) -> Tensor:
        """Run this part on token ids (b, s) int64, or on the result of the previous part.

        Returns the input of the next part, (b, s, hidden). The last part returns logits (b, s, vocab_size) in the
        parameters' dtype or, given targets (b, s) int64, their mean cross-entropy in fp32. Under tensor parallelism the
        logits are this rank's part of the vocabulary, and under sequence parallelism the parts exchange this rank's
        part of s. For positions, documents and counted, all (b, s), see training.document_masks.Masks; for the divisor
        see tensor_parallel.cross_entropy.
        """
        if self.part.first:
            length, x = x.shape[1], self.embedding(x)
        else:
            length = x.shape[1] * (self.tp.size if self.tp.sequence else 1)
        angles = rotary_angles(self.config, length, x.device, positions)
        cos, sin = (angle.to(x.dtype) for angle in angles)
        mask = attention_mask(self.config.sliding_window_size, length, documents, x.device, x.dtype)
        layers = list(self.layers.values())
        for first in range(0, len(layers), self.group):
            x = recomputed(
                partial(_through, layers[first : first + self.group]), x, cos, sin, mask, when=self.group > 1
            )
        if not self.part.last:
            return x
        head = self.embedding if self.config.tie_embed_logits and self.part.first else self.lm_head
        (logits,) = column_parallel_matmuls(self.final_layernorm(x), (local(head.weight),), self.tp)
        if targets is None:
            return logits
        if self.hits:
            self.hits.add(logits, targets, counted, self.config.vocab_size, self.tp)
        return cross_entropy(logits, targets, counted, self.config.vocab_size, self.tp, divisor)


def _through(layers: Sequence[nn.Module], x: Tensor, *more: Tensor | None) -> Tensor:
    """Run layers one after another."""
    for layer in layers:
        x = layer(x, *more)
    return x


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor's name and shape, in the model's order."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}


def initial_weights(config: ModelConfig, seed: int, std: float) -> Iterator[tuple[str, Tensor]]:
    """Random weights by name, fp32: normal with `std`, smaller for projections into the residual stream; norms are
    ones.

    Biases of norms are zeros. The weights depend only on the geometry and the seed, not on how the model is spread over
    processes.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = std / (2.0 * config.num_layers) ** 0.5
    for name, shape in shapes(config).items():
        if "norm" in name:
            yield name, torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            narrow = name.endswith(("attention.wo.weight", "mlp.w2.weight"))
            yield name, torch.empty(shape).normal_(0.0, residual_std if narrow else std, generator=generator)
