"""The geometry of a Llama, Mistral or Falcon, shared by the model, the weight formats and the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """All settings that determine a model's shapes and its forward pass."""

    vocab_size: int
    """Size of the true vocabulary, without padding."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_attention_heads_kv: int
    """Number of key/value heads; with fewer of them than query heads this is grouped-query attention (GQA)."""
    ffn_hidden_size: int
    max_position_embeddings: int
    kv_channels: int
    """Size of one head."""
    layernorm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    """Factor of position interpolation; 1.0 means none."""
    rope_scaling_type: Literal["linear", "llama3"] = "linear"
    """`linear`: all frequencies are divided by the factor; `llama3`: only the low ones, with a smooth transition."""
    rope_low_freq_factor: float = 1.0
    """llama3: wave lengths above rope_original_max_positions / rope_low_freq_factor are scaled."""
    rope_high_freq_factor: float = 4.0
    """llama3: wave lengths below rope_original_max_positions / rope_high_freq_factor are not scaled."""
    rope_original_max_positions: int = 8192
    """llama3: number of positions before the scaling."""
    sliding_window_size: int | None = None
    """Mistral: how many positions a position sees, itself included; None: all positions before it."""
    tie_embed_logits: bool = False
    """Whether the output layer shares the embedding's weight."""
    use_rms_norm: bool = True
    """Whether norms are RMSNorm; otherwise they are LayerNorm with bias (Falcon)."""
    glu_activation: Literal["swiglu"] | None = "swiglu"
    """Gate of the MLP; an MLP without a gate has GELU as its activation (Falcon)."""
    parallel_attn: bool = False
    """Falcon: whether attention and MLP both start from the layer's input."""
    parallel_layernorm: bool = False
    """Falcon 40B: whether these two branches have a norm each."""

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
