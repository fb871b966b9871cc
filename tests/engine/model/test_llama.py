"""The model is Hugging Face's Llama, Mistral or Falcon, number for number."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_llm.model.attention import rotary_frequencies
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights
from megatron_llm.model.recompute import EACH, Recompute, WholeLayers
from tests.engine.hf_reference import hf_model, theirs

FALCON = {
    "use_rms_norm": False,
    "glu_activation": None,
    "parallel_attn": True,
    "tie_embed_logits": True,
    "ffn_hidden_size": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "as many kv heads": {"num_attention_heads_kv": 4},
    "tied": {"tie_embed_logits": True},
    "another head size, theta and epsilon": {"kv_channels": 12, "rope_theta": 500000.0, "layernorm_epsilon": 1e-2},
    "CodeLlama": {"rope_theta": 1e6, "num_attention_heads_kv": 4},
    "linear position interpolation": {"rope_scaling_factor": 4.0},
    "Llama 3.1": {
        "rope_theta": 50.0,
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_original_max_positions": 64,
    },
    "Mistral, longer than its window": {"sliding_window_size": 7},
    "Mistral, window as long as the sequence": {"sliding_window_size": 32},
    "Falcon 7B": FALCON | {"num_attention_heads_kv": 1},
    "Falcon 40B": FALCON | {"parallel_layernorm": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_transformers(tiny_config: ModelConfig, changes: dict[str, Any]) -> None:
    """Logits, and the gradient of every tensor, equal those of Hugging Face's model with the same weights."""
    config = replace(tiny_config, **changes)
    torch.manual_seed(0)
    reference, model = hf_model(config), Llama(config)
    parameters = dict(reference.named_parameters())
    model.load_state_dict(theirs(config, {name: parameter.detach() for name, parameter in parameters.items()}))
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    logits = model(tokens[:, :-1])
    expected = reference(tokens[:, :-1]).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for output in (logits, expected):
        functional.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = theirs(config, {name: parameter.grad for name, parameter in parameters.items()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_every_rotary_frequency_matters_in_the_llama_3_variant(tiny_config: ModelConfig) -> None:
    """It has frequencies that are kept, scaled, and in between."""
    config = replace(tiny_config, **VARIANTS["Llama 3.1"])
    plain = rotary_frequencies(
        replace(config, rope_scaling_type="linear", rope_scaling_factor=1.0), torch.device("cpu")
    )
    ratio = plain / rotary_frequencies(config, torch.device("cpu"))
    assert ratio[0] == 1.0
    assert ratio[-1] == 8.0
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def saved_bytes(config: ModelConfig, recompute: Any, batch: torch.Tensor, whole: WholeLayers = EACH) -> int:
    """Bytes of distinct tensors, parameters not counted, that the backward pass keeps."""
    model = Llama(config, recompute, whole=whole)
    model.load_state_dict(dict(initial_weights(config, 1, 0.02)))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch[:, :-1], batch[:, 1:])
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("changes", "selective_saves"), [({}, 0.2), (VARIANTS["Falcon 40B"], 0.01)], ids=["Llama", "Falcon"]
)
def test_recomputing_keeps_fewer_bytes(
    tiny_config: ModelConfig, changes: dict[str, Any], selective_saves: float
) -> None:
    """Nothing recomputed > selective > full, which keeps little more than one hidden state a layer and the logits."""
    config = replace(tiny_config, num_layers=8, **changes)
    batch = torch.randint(0, config.vocab_size, (2, 65))
    none, selective, full = (saved_bytes(config, mode, batch) for mode in (None, "selective", "full"))
    assert selective < (1 - selective_saves) * none
    hidden, logits = (4 * 2 * 64 * size for size in (config.hidden_size, config.vocab_size))
    assert config.num_layers * hidden < full < (config.num_layers + 6) * hidden + 2 * logits < selective / 2


def test_recomputing_some_whole_layers(tiny_config: ModelConfig) -> None:
    """Of 8 layers, `block` 2 saves a quarter of what all save; `uniform` 4 keeps 2 inputs instead of 8."""
    config = replace(tiny_config, num_layers=8)
    batch = torch.randint(0, config.vocab_size, (2, 65))
    none, full = (saved_bytes(config, mode, batch) for mode in (None, "full"))
    block, uniform = (
        saved_bytes(config, "full", batch, WholeLayers.of(*way)) for way in (("block", 2), ("uniform", 4))
    )
    assert none - block == pytest.approx((none - full) / 4, rel=0.02)
    assert full - uniform == 6 * 4 * 2 * 64 * config.hidden_size


@pytest.mark.parametrize(
    ("recompute", "whole"),
    [("selective", EACH), ("full", EACH), ("full", WholeLayers(first=1)), ("full", WholeLayers(group=3))],
)
def test_recomputing_changes_nothing(tiny_config: ModelConfig, recompute: Any, whole: WholeLayers) -> None:
    """Gradients are bit for bit those of the model that keeps its activations."""
    tokens = torch.randint(0, tiny_config.vocab_size, (2, 16))
    gradients = []
    for mode in (None, recompute):
        model = Llama(tiny_config, mode, whole=whole)
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
    assert weights["layers.1.mlp.w2.weight"].std() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert torch.equal(weights["final_layernorm.weight"], torch.ones(256))
    other = dict(initial_weights(config, 8, 0.02))
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_compiled_layers(monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, recompute: Recompute) -> None:
    """One compiled graph serves all layers, and gives the loss and the gradients of the layers as they are written.

    With recomputation the graphs are made but not turned into machine code, which takes a quarter of a minute each.
    """
    if recompute:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batch = torch.randint(0, tiny_config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    plain, compiled = Llama(tiny_config, recompute), Llama(tiny_config, recompute)
    weights = dict(initial_weights(tiny_config, 1, 0.1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers()
    losses = []
    for model in (plain, compiled):
        model.load_state_dict(weights)
        losses.append(model(batch[:, :-1], batch[:, 1:]))
        losses[-1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
