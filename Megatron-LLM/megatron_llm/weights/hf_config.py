"""Converts between `ModelConfig` and a Hugging Face config.json, in the spellings of Transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_llm.model.config import ModelConfig
from megatron_llm.weights import hf_falcon
from run_contract.errors import InputsMissing, UserError

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "FalconForCausalLM": "falcon"}
"""Supported architecture -> its model_type."""
MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
"""The values that Transformers assumes for a Mistral where config.json has none."""
WITHOUT_EFFECT = {
    *(
        "_name_or_path",
        "transformers_version",
        "auto_map",
        "pretraining_tp",
        "quantization_config",
        "_attn_implementation",
    ),
    *("return_dict", "output_attentions", "output_hidden_states", "rope_interleaved"),
}
"""Keys of config.json that do not change the model, besides those that are read or refused."""
LLAMA3 = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_positions",
}
"""Key of rope type llama3, besides the factor -> field of ModelConfig."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputsMissing or UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the folder of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download or copy it again")
    return content


def family(folder: Path) -> str:
    """The family of a folder's config.json: `llama`, `mistral` or `falcon`.

    Raises UserError for any other architecture.
    """
    path = folder / "config.json"
    raw = read_json(path)
    architecture = str((raw.get("architectures") or [raw.get("model_type", "unknown")])[0])
    found = FAMILIES.get(architecture, architecture)
    if found not in FAMILIES.values():
        raise UserError(f"{path}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}")
    return found


def _rope(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The rotary fields of ModelConfig, from `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (4).

    Raises UserError when the two spellings contradict each other, or when they ask for something that the engine's
    rotary embeddings do not support.
    """
    spellings = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    scaling: dict[str, Any] = spellings[0] if spellings else {}
    said: dict[str, set[Any]] = {
        "rope_theta": {one["rope_theta"] for one in (*spellings, raw) if "rope_theta" in one},
        "rope_type": {one[name] for one in spellings for name in ("rope_type", "type") if name in one},
        "factor": {one.get("factor", 1.0) for one in spellings},
        "partial_rotary_factor": {one.get("partial_rotary_factor", 1.0) for one in (*spellings, raw)} | {1.0},
    }
    for name, values in said.items():
        if len(values) > 1:
            raise UserError(
                f"{where}: {name} is {' and '.join(map(repr, sorted(values)))}; only one value is supported"
            )
    if nested := [name for name, value in scaling.items() if isinstance(value, dict)]:
        raise UserError(f"{where}: rotary settings of their own for {nested[0]} layers are not supported")
    kind = next(iter(said["rope_type"]), "default")
    fields: dict[str, Any] = {"rope_theta": float(next(iter(said["rope_theta"]), 10000.0))}
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported are default, linear and llama3")
    fields |= {"rope_scaling_type": kind, "rope_scaling_factor": float(scaling["factor"])}
    return fields | ({ours: scaling[theirs] for theirs, ours in LLAMA3.items()} if kind == "llama3" else {})


def load(folder: Path) -> ModelConfig:
    """The geometry in a folder's config.json. Raises InputsMissing, and UserError for an unsupported architecture."""
    kind, path = family(folder), folder / "config.json"
    raw = read_json(path)
    try:
        if kind == "falcon":
            return hf_falcon.load_config(raw, _rope(raw, path), path)
        if kind == "mistral":
            raw = MISTRAL | raw
        for key, valid in MUST_BE.items():
            if raw.get(key, valid) != valid:
                raise UserError(f"{path}: {key} = {raw[key]!r} is not supported; it must be {valid!r}")
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_attention_heads_kv=raw.get("num_key_value_heads") or heads,
            ffn_hidden_size=raw["intermediate_size"],
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            kv_channels=raw.get("head_dim") or raw["hidden_size"] // heads,
            layernorm_epsilon=raw.get("rms_norm_eps", 1e-6),
            sliding_window_size=raw.get("sliding_window") if kind == "mistral" else None,
            tie_embed_logits=raw.get("tie_word_embeddings", False),
            **_rope(raw, path),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}; download or copy it again") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def not_carried(folder: Path) -> list[str]:
    """The entries of config.json that an export of the model does not contain, as `key = value`."""
    raw, config = read_json(folder / "config.json"), load(folder)
    known = {*make(config, torch.float32, None, None), *WITHOUT_EFFECT, *MUST_BE, *hf_falcon.MUST_BE}
    more = [f"{key} = {raw[key]!r}" for key in sorted(raw.keys() - known) if raw[key] is not None]
    several = [f"{key} = {raw[key]!r}" for key in ("bos_token_id", "eos_token_id") if isinstance(raw.get(key), list)]
    windowless = ["MistralForCausalLM without a window is written as LlamaForCausalLM, which computes the same"]
    renamed = family(folder) == "mistral" and config.sliding_window_size is None
    return [*more, *several, *(windowless if renamed else [])]


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """The rotary scaling in Hugging Face's terms."""
    if config.rope_scaling_factor == 1.0:
        return {"rope_type": "default"}
    named = {"rope_type": config.rope_scaling_type, "factor": config.rope_scaling_factor}
    llama3 = config.rope_scaling_type == "llama3"
    return named | ({theirs: getattr(config, ours) for theirs, ours in LLAMA3.items()} if llama3 else {})


def make(config: ModelConfig, dtype: torch.dtype, bos: int | None, eos: int | None) -> dict[str, Any]:
    """The content of config.json, with dtype and rotary settings in the spellings of both Transformers 4 and 5."""
    name, rope = str(dtype).removeprefix("torch."), _scaling(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope | {"type": rope["rope_type"]} if "factor" in rope else None,
        "tie_word_embeddings": config.tie_embed_logits,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": name,
        "torch_dtype": name,
    } | (hf_falcon.make_config(config) if config.parallel_attn else _llama(config))


def _llama(config: ModelConfig) -> dict[str, Any]:
    """The entries of config.json that are specific to a Llama or Mistral."""
    window = config.sliding_window_size
    own = {"attention_bias": False, "mlp_bias": False} if window is None else {"sliding_window": window}
    return {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "model_type": "llama" if window is None else "mistral",
        "intermediate_size": config.ffn_hidden_size,
        "num_key_value_heads": config.num_attention_heads_kv,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_epsilon,
        **own,
    }
