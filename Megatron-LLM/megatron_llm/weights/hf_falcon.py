"""Converts Hugging Face's Falcon: its config.json, and its tensors, one of which holds queries, keys and values.

The heads in `query_key_value` are grouped as in Megatron, but without the rotary interleaving: each kv group has its
queries, then its key, then its value (Falcon 7B has one group, 40B has eight).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_llm.model.canonical_state import EMBEDDING, HEAD, LazyState, expected_shapes, is_norm, norm_parts
from megatron_llm.model.config import ModelConfig
from megatron_llm.weights.megatron_layout import KEY, QUERY, VALUE, group_heads, pick_heads
from run_contract.errors import UserError

MUST_BE = {"alibi": False, "bias": False, "parallel_attn": True, "activation": "gelu", "quantization_config": None}
PLACES = {"attention.wq.weight": QUERY, "attention.wk.weight": KEY, "attention.wv.weight": VALUE}
INNER = {
    "attention.wo": "self_attention.dense",
    "mlp.w3": "mlp.dense_h_to_4h",
    "mlp.w2": "mlp.dense_4h_to_h",
}


def load_config(raw: Mapping[str, Any], rope: Mapping[str, Any], path: Path) -> ModelConfig:
    """The geometry in a Falcon's config.json. Raises UserError for variants with ALiBi or biases, and KeyError."""
    for key, valid in MUST_BE.items():
        if raw.get(key, valid) != valid:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported; it must be {valid!r}")
    heads, new = raw["num_attention_heads"], raw.get("new_decoder_architecture", False)
    groups = raw["num_kv_heads"] if new else 1 if raw.get("multi_query", True) else heads
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_attention_heads_kv=groups,
        ffn_hidden_size=raw.get("ffn_hidden_size") or 4 * raw["hidden_size"],
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        kv_channels=raw["hidden_size"] // heads,
        layernorm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        tie_embed_logits=raw.get("tie_word_embeddings", True),
        use_rms_norm=False,
        glu_activation=None,
        parallel_attn=True,
        parallel_layernorm=new and raw.get("num_ln_in_parallel_attn") != 1,
        **rope,
    )


def make_config(config: ModelConfig) -> dict[str, Any]:
    """The entries of config.json that are specific to a Falcon."""
    new = config.parallel_layernorm or 1 < config.num_attention_heads_kv < config.num_attention_heads
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_kv_heads": config.num_attention_heads_kv,
        "multi_query": config.num_attention_heads_kv == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if config.parallel_layernorm else 1) if new else None,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "parallel_attn": True,
        "hidden_dropout": 0.0,
    }


def layout(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Hugging Face's name -> the canonical tensors that this tensor holds, in canonical order."""
    norms = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"} if config.parallel_layernorm else {}
    names: dict[str, tuple[str, ...]] = {"transformer.word_embeddings.weight": (EMBEDDING,)}
    for number in range(config.num_layers):
        ours, theirs = f"layers.{number}", f"transformer.h.{number}"
        for name in [name for name in expected_shapes(config) if name.startswith(f"{ours}.")]:
            inner, _, kind = name.removeprefix(f"{ours}.").rpartition(".")
            if is_norm(name):
                names[f"{theirs}.{norms.get(inner, inner)}.{kind}"] = (name,)
            elif inner in INNER:
                names[f"{theirs}.{INNER[inner]}.{kind}"] = (name,)
        names[f"{theirs}.self_attention.query_key_value.weight"] = tuple(f"{ours}.{place}" for place in PLACES)
    names |= {f"transformer.ln_f.{kind}": (f"final_layernorm.{kind}",) for kind in norm_parts(config)}
    return names if config.tie_embed_logits else names | {"lm_head.weight": (HEAD,)}


def from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> LazyState:
    """The canonical tensors, made on access, from tensors under Hugging Face's names.

    Raises UserError unless exactly the model's tensors are there.
    """
    names = layout(config)
    if missing := sorted(names.keys() - tensors.keys()):
        raise UserError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - names.keys()):
        raise UserError(f"{len(extra)} tensors do not belong to this kind of model, the first is {extra[0]}")
    where = {ours: theirs for theirs, several in names.items() for ours in several}

    def make(name: str) -> Tensor:
        place = next((place for end, place in PLACES.items() if name.endswith(end)), None)
        tensor = tensors[where[name]]
        return tensor if place is None else pick_heads(config, tensor, place)

    return LazyState(expected_shapes(config), make)


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> LazyState:
    """The inverse of `from_hf`."""
    names = layout(config)

    def make(name: str) -> Tensor:
        parts = [state[ours] for ours in names[name]]
        return parts[0] if len(parts) == 1 else group_heads(config, *parts)

    return LazyState(names, make)
