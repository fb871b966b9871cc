"""The geometry of a Llama, Mistral or Falcon, shared by the model, the weight formats and the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shapes and its forward pass."""

    vocab_size: int
    """True vocabulary, unpadded."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_attention_heads_kv: int
    """Key/value heads (GQA when fewer than the query heads)."""
    ffn_hidden_size: int
    max_position_embeddings: int
    kv_channels: int
    """Size of one head."""
    layernorm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    """Position interpolation; 1.0 is none."""
    rope_scaling_type: Literal["linear", "llama3"] = "linear"
    """All frequencies divided by the factor, or, as in Llama 3.1, only the low ones, smoothly."""
    rope_low_freq_factor: float = 1.0
    """llama3: wave lengths above original positions / this are scaled."""
    rope_high_freq_factor: float = 4.0
    """llama3: wave lengths below original positions / this are not."""
    rope_original_max_positions: int = 8192
    """llama3: positions before the scaling."""
    sliding_window_size: int | None = None
    """Mistral: how many positions a position sees, itself included; all before it when absent."""
    tie_embed_logits: bool = False
    """The output layer shares the embedding's weight."""
    use_rms_norm: bool = True
    """RMSNorm, else LayerNorm with bias (Falcon)."""
    glu_activation: Literal["swiglu"] | None = "swiglu"
    """Gate of the MLP; without one its activation is GELU (Falcon)."""
    parallel_attn: bool = False
    """Falcon: attention and MLP both start from the layer's input."""
    parallel_layernorm: bool = False
    """Falcon 40B: with a norm for each of these two."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_attention_heads_kv:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_attention_heads_kv = {self.num_attention_heads_kv}"
            )
        if self.parallel_layernorm and not self.parallel_attn:
            raise ValueError("parallel_layernorm needs parallel_attn")
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels = {self.kv_channels} is odd; rotary embeddings need pairs")
