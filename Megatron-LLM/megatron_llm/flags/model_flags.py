"""Reconciles the model that finetune.py's flags describe with a checkpoint's: neither silently overrules the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_llm.flags.arguments import Arguments
from megatron_llm.model.config import ModelConfig
from run_contract.errors import UserError

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
"""Flags that are required to describe a model."""
FLAGS = {field.name: field.name for field in dataclasses.fields(ModelConfig) if field.name != "vocab_size"} | {
    "tie_embed_logits": "no_tie_embed_logits"
}
"""Field of the geometry -> the flag that sets it."""
CHANGEABLE = (
    "max_position_embeddings",
    "layernorm_epsilon",
    "rope_theta",
    "rope_scaling_factor",
    "rope_scaling_type",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_positions",
    "sliding_window_size",
)
"""Fields that do not affect the shape of any weight; --override_model_args takes them from the flags."""


def config_from_flags(args: Arguments, vocab_size: int) -> ModelConfig:
    """The geometry that the flags describe. Raises UserError when a flag is missing or wrong."""
    if missing := [f"--{name}" for name in NEEDED if getattr(args, name) is None]:
        raise UserError(f"missing {' '.join(missing)}; or give --load and --use_checkpoint_args")
    falcon, heads = args.model_name == "falcon", args.num_attention_heads
    assert heads is not None
    derived: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_attention_heads_kv": args.num_attention_heads_kv or heads,
        "kv_channels": args.kv_channels or (args.hidden_size or 0) // heads,
        **_derived(args),
        "parallel_attn": falcon,
    }
    flags: dict[str, Any] = {name: getattr(args, name, None) for name in FLAGS}
    return _made(**flags | derived)


def of_checkpoint(found: ModelConfig, args: Arguments, where: Path | None, *, begun: bool) -> ModelConfig:
    """The geometry of a run that starts from a checkpoint: the checkpoint's, which the flags must not contradict.

    With --use_checkpoint_args only flags on the command line are compared, otherwise all of them. --override_model_args
    takes changeable fields from the flags instead, except when the run itself is continued (`begun`). Raises UserError.
    """
    asked = _given(args) if args.use_checkpoint_args else dataclasses.asdict(config_from_flags(args, found.vocab_size))
    differing = {name: value for name, value in asked.items() if value != getattr(found, name)}
    taken = {} if begun or not args.override_model_args else _changeable(differing, args)
    if refused := {name: value for name, value in differing.items() if name not in taken}:
        values = ", ".join(f"{name} {getattr(found, name)} (flags: {value})" for name, value in refused.items())
        raise UserError(f"{where} has {values}; {_remedy(refused, args, begun=begun)}")
    for name, value in taken.items():
        print(f"{name} {value} (--override_model_args): {where} has {getattr(found, name)}", flush=True)
    return _made(**dataclasses.asdict(found) | taken)


def _made(**values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _derived(args: Arguments) -> dict[str, Any]:
    """The fields whose flags express their value in another form."""
    falcon = args.model_name == "falcon"
    return {
        "tie_embed_logits": not args.no_tie_embed_logits,
        "use_rms_norm": not falcon,
        "glu_activation": None if falcon else args.glu_activation,
    }


def _given(args: Arguments) -> dict[str, Any]:
    """The fields that are set by flags on the command line."""
    derived = _derived(args)
    return {name: derived.get(name, getattr(args, flag, None)) for name, flag in FLAGS.items() if flag in args.given}


def _changeable(differing: dict[str, Any], args: Arguments) -> dict[str, Any]:
    return {name: value for name, value in differing.items() if name in CHANGEABLE and FLAGS[name] in args.given}


def _remedy(refused: dict[str, Any], args: Arguments, *, begun: bool) -> str:
    """What the user can do about flags that contradict the checkpoint."""
    keep = "leave these flags out" if args.use_checkpoint_args else "correct the flags or pass --use_checkpoint_args"
    keep = f"{keep} to keep the checkpoint's"
    if _changeable(refused, args) != refused:
        return keep
    if begun:
        return f"{keep}, or begin a new run from it with --load, --finetune, --override_model_args and another --save"
    return f"{keep}, or pass --override_model_args to take the flags'"
