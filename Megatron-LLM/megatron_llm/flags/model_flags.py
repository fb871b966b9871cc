"""Reconciles the model that finetune.py's flags describe with a checkpoint's: neither silently overrules the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_llm.flags.arguments import Arguments, ModelFlags
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


def config_from_flags(flags: ModelFlags, vocab_size: int) -> ModelConfig:
    """The geometry that the flags describe. Raises UserError when a flag is missing or wrong."""
    if missing := [f"--{name}" for name in NEEDED if getattr(flags, name) is None]:
        raise UserError(
            f"{' '.join(missing)} must be given, where no checkpoint says the model's sizes; give them, or --load and "
            "--use_checkpoint_args"
        )
    falcon, heads = flags.model_name == "falcon", flags.num_attention_heads
    assert heads is not None
    derived: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_attention_heads_kv": flags.num_attention_heads_kv or heads,
        "kv_channels": flags.kv_channels or (flags.hidden_size or 0) // heads,
        **_derived(flags),
        "parallel_attn": falcon,
    }
    plain: dict[str, Any] = {name: getattr(flags, name, None) for name in FLAGS}
    return _made(**plain | derived)


def of_checkpoint(found: ModelConfig, args: Arguments, where: Path | None, *, begun: bool) -> ModelConfig:
    """The geometry of a run that starts from a checkpoint: the checkpoint's, which the flags must not contradict.

    With --use_checkpoint_args only flags on the command line are compared, otherwise all of them. --override_model_args
    takes changeable fields from the flags instead, except when the run itself is continued (`begun`). Raises UserError.
    """
    asked = (
        _given(args.model, args.given)
        if args.checkpoint.use_checkpoint_args
        else dataclasses.asdict(config_from_flags(args.model, found.vocab_size))
    )
    differing = {name: value for name, value in asked.items() if value != getattr(found, name)}
    taken = {} if begun or not args.checkpoint.override_model_args else _changeable(differing, args.given)
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


def _derived(flags: ModelFlags) -> dict[str, Any]:
    """The fields whose flags express their value in another form."""
    falcon = flags.model_name == "falcon"
    return {
        "tie_embed_logits": not flags.no_tie_embed_logits,
        "use_rms_norm": not falcon,
        "glu_activation": None if falcon else flags.glu_activation,
    }


def _given(flags: ModelFlags, given: Collection[str]) -> dict[str, Any]:
    """The fields that are set by flags on the command line."""
    derived = _derived(flags)
    return {name: derived.get(name, getattr(flags, flag, None)) for name, flag in FLAGS.items() if flag in given}


def _changeable(differing: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in differing.items() if name in CHANGEABLE and FLAGS[name] in given}


def _remedy(refused: dict[str, Any], args: Arguments, *, begun: bool) -> str:
    """What the user can do about flags that contradict the checkpoint."""
    keep = (
        "leave these flags out"
        if args.checkpoint.use_checkpoint_args
        else "correct the flags or pass --use_checkpoint_args"
    )
    keep = f"{keep} to keep the checkpoint's"
    if _changeable(refused, args.given) != refused:
        return keep
    if begun:
        return f"{keep}, or begin a new run from it with --load, --finetune, --override_model_args and another --save"
    return f"{keep}, or pass --override_model_args to take the flags'"
