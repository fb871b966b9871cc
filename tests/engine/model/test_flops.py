"""Parameters and FLOPs are those of the model that runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import forward_flops, parameter_count, peak_tflops, training_flops
from megatron_llm.model.llama import Llama

FAMILIES: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha, tied": {"num_attention_heads_kv": 4, "tie_embed_logits": True},
    "falcon": {
        "num_attention_heads_kv": 1,
        "tie_embed_logits": True,
        "use_rms_norm": False,
        "glu_activation": None,
        "parallel_attn": True,
        "parallel_layernorm": True,
    },
    "wide heads": {"kv_channels": 12},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(tiny_config: ModelConfig, family: str) -> None:
    """Of the forward pass exactly; forward and backward together without the gradient of what has none."""
    config = replace(tiny_config, **FAMILIES[family])  # type: ignore[arg-type]
    model, tokens = Llama(config), torch.randint(0, config.vocab_size, (3, 24))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(tokens, tokens)
    assert forward.get_total_flops() == 3 * forward_flops(config, 24)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() + backward.get_total_flops() == training_flops(config, 24, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_models(tiny_config: ModelConfig, family: str) -> None:
    """Every parameter once."""
    config = replace(tiny_config, **FAMILIES[family])  # type: ignore[arg-type]
    assert parameter_count(config) == sum(parameter.numel() for parameter in Llama(config).parameters())


def test_llama_2_7b() -> None:
    """Its published size, and Narayanan's formula without recomputation, adapted to three MLP matrices."""
    config = ModelConfig(32000, 4096, 32, 32, 32, 11008, 4096, 128)
    assert parameter_count(config) == 6_738_415_616
    layer = 8 * 4096**2 + 6 * 4096 * 11008 + 4 * 4096 * 4096
    assert training_flops(config, 4096, 2) == 3 * 2 * 4096 * (32 * layer + 2 * 4096 * 32000)


def test_a_window_bounds_attention(tiny_config: ModelConfig) -> None:
    """Positions outside the sliding window are not counted."""
    narrow = replace(tiny_config, sliding_window_size=8)
    difference = forward_flops(tiny_config, 24) - forward_flops(narrow, 24)
    assert difference == 4 * 4 * 4 * 8 * 24 * (24 - 8)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 2080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    """Names as torch gives them; what is not known has no peak rather than a neighbour's."""
    assert peak_tflops(name) == peak
