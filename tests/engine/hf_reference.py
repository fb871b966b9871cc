"""Hugging Face's models as the reference for ours: the same geometry, and their tensors under our names."""

from __future__ import annotations

from typing import Any

import torch

from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import shapes

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "final_layernorm": "model.norm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "layers.": "model.layers.",
}
FALCON_NAMES = {
    "embedding": "transformer.word_embeddings",
    "final_layernorm": "transformer.ln_f",
    "attention.wo": "self_attention.dense",
    "mlp.w3": "mlp.dense_h_to_4h",
    "mlp.w2": "mlp.dense_4h_to_h",
    "mlp_layernorm": "ln_mlp",
    "layers.": "transformer.h.",
}


def _common(config: ModelConfig) -> dict[str, Any]:
    """What transformers' configurations call alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embed_logits,
        "initializer_range": 0.2,  # large enough for every part to matter in the logits
    }


def hf_model(config: ModelConfig) -> Any:
    """transformers' model of the same geometry, with random weights."""
    return (_llama_or_mistral if config.use_rms_norm else _falcon)(config)


def _llama_or_mistral(config: ModelConfig) -> Any:
    """transformers' Llama, or Mistral where there is a window."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1.0:
        rope |= {"rope_type": config.rope_scaling_type, "factor": config.rope_scaling_factor}
    if config.rope_scaling_type == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = config.rope_low_freq_factor, config.rope_high_freq_factor
        rope["original_max_position_embeddings"] = config.rope_original_max_positions
    settings = _common(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "num_key_value_heads": config.num_attention_heads_kv,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": rope,
    }
    if config.sliding_window_size:
        return MistralForCausalLM(MistralConfig(**settings, sliding_window=config.sliding_window_size))
    return LlamaForCausalLM(LlamaConfig(**settings))


def _falcon(config: ModelConfig) -> Any:
    """transformers' Falcon: the 40B's decoder with two norms, else the 7B's with one key/value head."""
    from transformers import FalconConfig, FalconForCausalLM

    new = config.parallel_layernorm
    model = FalconForCausalLM(
        FalconConfig(
            **_common(config),
            new_decoder_architecture=new,
            multi_query=not new,
            num_kv_heads=config.num_attention_heads_kv if new else None,
            ffn_hidden_size=config.ffn_hidden_size,
            layer_norm_epsilon=config.layernorm_epsilon,
            parallel_attn=True,
            alibi=False,
            bias=False,
        )
    )
    for name, parameter in model.named_parameters():
        if "ln" in name or "layernorm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model


def theirs(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's weights or gradients under our names."""
    if config.use_rms_norm:
        return {name: tensors[_renamed(name, LLAMA_NAMES)] for name in shapes(config)}
    names = FALCON_NAMES | ({"input_layernorm": "ln_attn"} if config.parallel_layernorm else {})
    found = {}
    for name in shapes(config):
        if ".attention.w" in name and "wo" not in name:
            fused = tensors[f"transformer.h.{name.split('.')[1]}.self_attention.query_key_value.weight"]
            groups = fused.view(config.num_attention_heads_kv, -1, config.kv_channels, config.hidden_size)
            part = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}[name[-8]]
            found[name] = part.reshape(-1, config.hidden_size)
        else:
            found[name] = tensors[_renamed(name, names)]
    return found


def _renamed(name: str, names: dict[str, str]) -> str:
    """Every part of the name replaced."""
    for ours, other in names.items():
        name = name.replace(ours, other)
    return name
