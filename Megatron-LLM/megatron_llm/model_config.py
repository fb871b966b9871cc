"""The geometry of a Llama-style model, shared by the model, the weight formats and the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Linear position interpolation; 1.0 is none."""
    tie_embed_logits: bool = False
    """The output layer shares the embedding's weight."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_attention_heads_kv:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_attention_heads_kv = {self.num_attention_heads_kv}"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels = {self.kv_channels} is odd; rotary embeddings need pairs")
