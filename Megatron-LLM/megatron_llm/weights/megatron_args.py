"""Converts between `ModelConfig` and the `args` namespace of a Megatron checkpoint file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Literal

import torch

from megatron_llm.model.config import ModelConfig
from megatron_llm.weights import megatron_layout
from run_contract.errors import UserError

OURS = ("rope_scaling_type", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_positions")
"""Fields that upstream does not have, and ignores."""
MUST_BE: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rotary", 1),
    "use_bias": (False,),
    "use_post_ln": (False,),
    "apply_residual_connection_post_layernorm": (False,),
}
"""Upstream's arguments that change what a model computes -> the values that are supported here.

1 is `rotary` in upstream's enum.
"""


def to_config(args: argparse.Namespace, *, rows: int, tied: bool) -> ModelConfig:
    """The geometry in a file's `args`. Raises UserError for a model that is neither a Llama, a Mistral nor a Falcon.

    Upstream's converter omits some fields, above all for Falcon. They are taken from `rows`, the number of stored rows
    of the vocabulary, from `tied`, whether the model has no output layer of its own, and from upstream's defaults.
    """
    parallel, gate = bool(getattr(args, "parallel_attn", False)), getattr(args, "glu_activation", None)
    if gate != (None if parallel else "swiglu"):
        raise UserError(f"glu_activation = {gate} with parallel_attn = {parallel}: this model is not supported")
    for name, valid in MUST_BE.items():
        found = getattr(args, name, None)
        if getattr(found, "value", found) not in (None, *valid):
            raise UserError(f"{name} = {getattr(found, 'value', found)!r} is not supported; it must be {valid[0]!r}")
    if getattr(args, "use_rms_norm", not parallel) == parallel:
        raise UserError(f"use_rms_norm = {parallel} with parallel_attn = {parallel}: this model is not supported")
    true, padded = getattr(args, "true_vocab_size", None), getattr(args, "padded_vocab_size", None)
    if not true and padded and padded < rows:
        raise UserError(
            f"args say padded_vocab_size {padded}, but {rows} rows are stored, and nothing says which of them are "
            "tokens; convert the model again"
        )
    try:
        heads = args.num_attention_heads
        return ModelConfig(
            vocab_size=true or padded or rows,
            hidden_size=args.hidden_size,
            num_layers=getattr(args, "num_layers", None) or args.encoder_num_layers,
            num_attention_heads=heads,
            num_attention_heads_kv=getattr(args, "num_attention_heads_kv", None) or heads,
            ffn_hidden_size=getattr(args, "ffn_hidden_size", None) or 4 * args.hidden_size,
            max_position_embeddings=args.max_position_embeddings,
            kv_channels=getattr(args, "kv_channels", None) or args.hidden_size // heads,
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
            rope_theta=getattr(args, "rope_theta", 10000.0),
            rope_scaling_factor=getattr(args, "rope_scaling_factor", 1.0),
            tie_embed_logits=getattr(args, "tie_embed_logits", tied),
            sliding_window_size=getattr(args, "sliding_window_size", None),
            use_rms_norm=not parallel,
            glu_activation=None if parallel else "swiglu",
            parallel_attn=parallel,
            parallel_layernorm=bool(getattr(args, "parallel_layernorm", False)),
            **{name: getattr(args, name) for name in OURS if hasattr(args, name)},
        )
    except (AttributeError, ValueError) as error:
        raise UserError(f"args do not describe a model: {error}") from error


def make_args(
    config: ModelConfig,
    *,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    iteration: int | Literal["release"],
    extra: Mapping[str, Any],
) -> argparse.Namespace:
    """The `args` that upstream's readers and this engine need; `extra` (sequence length, consumed samples, …) wins."""
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels": config.kv_channels,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_heads_kv": config.num_attention_heads_kv,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "padded_vocab_size": megatron_layout.padded_vocab_size(config.vocab_size, tp),
        "true_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": megatron_layout.VOCAB_MULTIPLE,
        "tokenizer_type": "SentencePieceTokenizer",
        "glu_activation": config.glu_activation,
        "use_rms_norm": config.use_rms_norm,
        "tie_embed_logits": config.tie_embed_logits,
        "parallel_attn": config.parallel_attn,
        "parallel_layernorm": config.parallel_layernorm,
        "layernorm_epsilon": config.layernorm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.rope_scaling_factor,
        "position_embedding_type": "rotary",
        "params_dtype": dtype,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "iteration": iteration,
        "bias_gelu_fusion": False,
        "bias_droput_fusion": False,
        "use_flash_attn": True,
        "hidden_dropout": 0.0,
        "sliding_window_size": config.sliding_window_size,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    values |= {name: getattr(config, name) for name in OURS}
    return argparse.Namespace(**(values | dict(extra)))
