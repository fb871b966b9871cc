"""A model flag that is given never loses silently to the checkpoint, nor the checkpoint to a flag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llm.flags.model_flags import CHANGEABLE, FLAGS, of_checkpoint
from megatron_llm.flags.parser import parse
from megatron_llm.model.config import ModelConfig
from run_contract.errors import UserError

FLAGS_OF_A_RUN = "--data_path d --save s --load l --micro_batch_size 2 --train_iters 10 --lr 1e-3 --use_checkpoint_args"
REQUIRED = FLAGS_OF_A_RUN.split()
WHERE = Path("there")
DIFFERENT = (
    "num_layers 3; hidden_size 64; num_attention_heads 8; num_attention_heads_kv 4; ffn_hidden_size 99; kv_channels 4; "
    "max_position_embeddings 99; layernorm_epsilon 0.5; rope_theta 1e6; rope_scaling_factor 4; "
    "rope_scaling_type llama3; rope_low_freq_factor 2; rope_high_freq_factor 9; rope_original_max_positions 99; "
    "sliding_window_size 8; no_tie_embed_logits; parallel_layernorm"
)


@pytest.mark.parametrize("flag", DIFFERENT.split("; "))
def test_a_given_flag_that_differs_is_refused_or_taken(tiny_config: ModelConfig, flag: str) -> None:
    """Both values are named; --override_model_args takes what no weight's shape depends on."""
    name, *value = flag.split()
    falcon = ["--model_name", "falcon"] if name == "parallel_layernorm" else []
    found = replace(tiny_config, tie_embed_logits=True, parallel_attn=bool(falcon))
    argv = [*REQUIRED, *falcon, f"--{name}", *value]
    field = {flag: field for field, flag in FLAGS.items()}[name]
    with pytest.raises(UserError, match=rf"there has {field} {getattr(found, field)} \(flags: ") as refused:
        of_checkpoint(found, parse(argv), WHERE, begun=False)
    assert ("--override_model_args" in str(refused.value)) == (field in CHANGEABLE)
    override = parse([*argv, "--override_model_args"])
    if field not in CHANGEABLE:
        with pytest.raises(UserError, match="leave these flags out"):
            of_checkpoint(found, override, WHERE, begun=False)
        return
    taken = of_checkpoint(found, override, WHERE, begun=False)
    assert taken == replace(found, **{field: override.flag(name)})
    with pytest.raises(UserError, match="begin a new run from it with --load, --finetune, --override_model_args"):
        of_checkpoint(found, override, WHERE, begun=True)
    assert of_checkpoint(taken, override, WHERE, begun=True) == taken, "the run that began with it goes on"


def test_every_model_flag_is_tried() -> None:
    """Besides those whose only value decides the family."""
    tried = {flag.split()[0] for flag in DIFFERENT.split("; ")}
    assert set(FLAGS.values()) - tried == {"use_rms_norm", "glu_activation", "parallel_attn"}


def test_flags_that_agree_or_are_not_given(tiny_config: ModelConfig) -> None:
    """Defaults never count with --use_checkpoint_args; without it they do, as before."""
    found = replace(tiny_config, rope_theta=1e6, layernorm_epsilon=1e-6)
    same = ("--rope_theta", "1000000.0", "--use_rms_norm", "--glu_activation", "swiglu", "--no_tie_embed_logits")
    for more in ((), same):
        assert of_checkpoint(found, parse([*REQUIRED, *more]), WHERE, begun=False) == found
    sizes = "--num_layers 4 --hidden_size 32 --num_attention_heads 4 --num_attention_heads_kv 2 --ffn_hidden_size 48"
    plain = [*REQUIRED[:-1], "--seq_length", "32", *sizes.split(), "--max_position_embeddings", "64", *same[-1:]]
    with pytest.raises(UserError, match=r"there has layernorm_epsilon 1e-06 \(flags: 1e-05\), rope_theta 1000000\.0"):
        of_checkpoint(found, parse(plain), WHERE, begun=False)


def test_a_gate_that_the_family_lacks_is_refused() -> None:
    """Falcon has no gate; the flag was passed over before."""
    with pytest.raises(UserError, match="--glu_activation swiglu: --model_name falcon has no gate"):
        parse([*REQUIRED, "--model_name", "falcon", "--glu_activation", "swiglu"])
