"""How much a model computes: its parameters, the floating-point operations (FLOPs) of an update, and the peaks of GPUs.

Model FLOPs are counted as in PaLM (Chowdhery et al. 2022, appendix B) and Megatron-LM (Narayanan et al. 2021, section
5.1): the multiplications and additions of all matrix products, two per weight and token, with the backward pass counted
as twice the forward pass. Attention counts every pair of positions, as both papers do, although half of them are
masked; with a sliding window it counts the width of the window. What activation recomputation repeats is not counted,
and neither are norms, softmax and embedding look-ups.
"""

from __future__ import annotations

from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import shapes

FORWARD_AND_BACKWARD = 3
GPUS = {
    "A100": (312.0, 19.5),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "A40": (149.7, 37.4),
    "L40S": (362.0, 91.6),
    "MI250X": (191.5, 23.9),
    "MI300X": (1307.4, 163.4),
}
"""GPU -> peak TFLOP/s of dense products in half precision and in fp32, from the makers' data sheets.

A MI250X appears as two devices; the figures are those of one of them.
"""
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    *((name, half) for name, (half, _) in sorted(GPUS.items(), key=lambda gpu: -len(gpu[0]))),
    ("A800", 312.0),
    ("A10", 125.0),
    ("L4", 121.0),
    ("V100-PCIE", 112.0),
    ("V100", 125.0),
)
"""Peak TFLOP/s in half precision, by a part of torch's device name; the first match counts. V100: fp16 only."""


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of the whole model; a tied output layer is counted once."""
    return sum(shape.numel() for shape in shapes(config).values())


def forward_flops(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of the forward pass, including the logits, over one sample of seq_length tokens."""
    matrices = {name: shape.numel() for name, shape in shapes(config).items() if len(shape) == 2}
    embedding = matrices.pop("embedding.weight")
    products = sum(matrices.values()) + (embedding if config.tie_embed_logits else 0)
    seen = min(seq_length, config.sliding_window_size or seq_length)
    attention = 2 * config.num_layers * config.num_attention_heads * config.kv_channels * seen
    return 2 * seq_length * (products + attention)


def training_flops(config: ModelConfig, seq_length: int, samples: int) -> int:
    """Model FLOPs of one update from `samples` samples."""
    return FORWARD_AND_BACKWARD * samples * forward_flops(config, seq_length)


def peak_tflops(device_name: str) -> float | None:
    """Peak TFLOP/s of a GPU in half precision; None when its name is unknown."""
    words = device_name.replace("_", " ").upper()
    return next((peak for name, peak in PEAKS if _named(name.upper(), words)), None)


def _named(name: str, words: str) -> bool:
    """Whether the name occurs as a whole word: A10 matches neither A100 nor A10G."""
    before, found, after = words.partition(name)
    return bool(found) and not (before[-1:].isalnum() or after[:1].isalnum())
