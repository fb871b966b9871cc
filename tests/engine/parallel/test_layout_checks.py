"""Parallel sizes that do not fit the model are refused before anything is built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_llm.flags.parser import parse
from megatron_llm.model.config import ModelConfig
from megatron_llm.parallel import layout_checks
from run_contract.errors import UserError

REQUIRED = "--data_path d --save s --seq_length 30 --micro_batch_size 2 --train_iters 10 --lr 1e-3"


@pytest.mark.parametrize(
    ("changes", "flags", "ranks"),
    [
        ({}, "--tensor_model_parallel_size 4", 4),
        ({"num_attention_heads_kv": 1}, "--tensor_model_parallel_size 4", 4),
        ({}, "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 1", 2),
        ({"tie_embed_logits": True}, "--tensor_model_parallel_size 2 --sequence_parallel", 4),
        ({"tie_embed_logits": True}, "--pipeline_model_parallel_size 2", 2),
        ({"hidden_size": 33}, "", 2),
    ],
)
def test_layouts_that_fit(tiny_config: ModelConfig, changes: dict[str, Any], flags: str, ranks: int) -> None:
    """More ranks than key/value heads, interleaved stages, tied embeddings on any ranks are all possible."""
    args = parse([*REQUIRED.split(), *flags.split()])
    layout_checks.check(replace(tiny_config, **changes), args.parallel, args.model.seq_length, ranks)


@pytest.mark.parametrize(
    ("changes", "flags", "ranks", "message"),
    [
        ({}, "--tensor_model_parallel_size 8", 8, "8 does not divide num_attention_heads 4"),
        ({"ffn_hidden_size": 47}, "--tensor_model_parallel_size 2", 2, "2 does not divide ffn_hidden_size 47"),
        ({}, "--tensor_model_parallel_size 4 --sequence_parallel", 4, "4 does not divide seq_length 30"),
        (
            {"num_attention_heads": 12, "num_attention_heads_kv": 4},
            "--tensor_model_parallel_size 6",
            6,
            "6 neither divides nor is a multiple of num_attention_heads_kv 4",
        ),
        ({"vocab_size": 5}, "--tensor_model_parallel_size 4", 4, "leaves a rank without any of the 5 tokens"),
        ({}, "--tensor_model_parallel_size 2", 6, "hidden_size 32 is not a multiple of the 3 data-parallel ranks"),
        ({}, "--pipeline_model_parallel_size 3", 3, "3 does not divide the model's 4 layers"),
        (
            {},
            "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 3",
            2,
            "2 x --num_layers_per_virtual_pipeline_stage 3 does not divide",
        ),
        ({}, "--num_layers_per_virtual_pipeline_stage 1", 1, "needs --pipeline_model_parallel_size above 1"),
    ],
)
def test_layouts_that_do_not_fit(
    tiny_config: ModelConfig, changes: dict[str, Any], flags: str, ranks: int, message: str
) -> None:
    """The message names the flag, the model's size that it does not fit, and what to choose."""
    args = parse([*REQUIRED.split(), *flags.split()])
    with pytest.raises(UserError, match=message):
        layout_checks.check(replace(tiny_config, **changes), args.parallel, args.model.seq_length, ranks)
