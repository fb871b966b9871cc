"""The model is Hugging Face's Llama, number for number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_llm.model import Llama, initial_weights
from megatron_llm.model_config import ModelConfig

TO_HF = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_layernorm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "layers.": "model.layers.",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor."""
    for ours, theirs in TO_HF.items():
        name = name.replace(ours, theirs)
    return name


def hf_model(config: ModelConfig) -> Any:
    """transformers' Llama of the same geometry, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads_kv,
            head_dim=config.kv_channels,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.layernorm_epsilon,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embed_logits,
            initializer_range=0.2,  # large enough for every part to matter in the logits
        )
    )


VARIANTS = {
    "grouped queries": {},
    "as many kv heads": {"num_attention_heads_kv": 4},
    "tied": {"tie_embed_logits": True},
    "another head size, theta and epsilon": {"kv_channels": 12, "rope_theta": 500000.0, "layernorm_epsilon": 1e-2},
    "linear position interpolation": {"rope_scaling_factor": 4.0},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_transformers(tiny_config: ModelConfig, changes: dict[str, Any]) -> None:
    """Logits, and the gradient of every tensor, equal those of LlamaForCausalLM with the same weights."""
    config = replace(tiny_config, **changes)
    torch.manual_seed(0)
    reference, model = hf_model(config), Llama(config)
    theirs = dict(reference.named_parameters())
    model.load_state_dict({name: theirs[hf_name(name)].detach() for name in model.state_dict()})
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    logits = model(tokens[:, :-1])
    expected = reference(tokens[:, :-1]).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for output in (logits, expected):
        functional.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[hf_name(name)].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(tiny_config: ModelConfig, recompute: Any) -> None:
    """Gradients are bit for bit those of the model that keeps its activations."""
    tokens = torch.randint(0, tiny_config.vocab_size, (2, 16))
    gradients = []
    for mode in (None, recompute):
        model = Llama(tiny_config, mode)
        model.load_state_dict(dict(initial_weights(tiny_config, 1, 0.02)))
        model(tokens).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_initial_weights_are_megatrons(tiny_config: ModelConfig) -> None:
    """Normal with the given deviation, less by sqrt(2 * layers) into the residual stream; the seed decides."""
    config = replace(tiny_config, hidden_size=256, ffn_hidden_size=512)
    weights = dict(initial_weights(config, 7, 0.02))
    assert list(weights) == list(Llama(config).state_dict())
    assert weights["layers.1.mlp.w1.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["layers.1.mlp.w2.weight"].std() == pytest.approx(0.02 / 4**0.5, rel=0.02)
    assert torch.equal(weights["final_layernorm.weight"], torch.ones(256))
    other = dict(initial_weights(config, 8, 0.02))
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])
