"""The canonical state: names and shapes of a model's whole weights, into and from which every layout is converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_llm.model.config import ModelConfig
from run_contract.errors import UserError

State: TypeAlias = dict[str, Tensor]


class LazyState(Mapping[str, Tensor]):
    """A mapping whose tensors are made again at each access, so that only those in use are in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


EMBEDDING, FINAL_NORM, HEAD = "embedding.weight", "final_layernorm.weight", "lm_head.weight"


def layer_norms(config: ModelConfig) -> list[str]:
    """Names of the norm tensors of a layer: weights, and biases where the model has them (Falcon)."""
    second = [] if config.parallel_attn else ["post_attention_layernorm"]
    names = ["input_layernorm", *(["mlp_layernorm"] if config.parallel_layernorm else second)]
    return [f"{name}.{kind}" for name in names for kind in norm_parts(config)]


def norm_parts(config: ModelConfig) -> tuple[str, ...]:
    """The tensors that a norm consists of."""
    return ("weight",) if config.use_rms_norm else ("weight", "bias")


def is_norm(name: str) -> bool:
    """Whether a tensor belongs to a norm; every tensor rank holds such a tensor whole."""
    return name.endswith(("layernorm.weight", "layernorm.bias"))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of the canonical state."""
    hidden, ffn, size = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * size, config.num_attention_heads_kv * size
    gate: dict[str, tuple[int, ...]] = {"mlp.w1.weight": (ffn, hidden)} if config.glu_activation else {}
    layer: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(layer_norms(config), (hidden,)),
        "attention.wq.weight": (queries, hidden),
        "attention.wk.weight": (keys, hidden),
        "attention.wv.weight": (keys, hidden),
        "attention.wo.weight": (hidden, queries),
        **gate,
        "mlp.w2.weight": (hidden, ffn),
        "mlp.w3.weight": (ffn, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    shapes |= {f"layers.{n}.{name}": shape for n in range(config.num_layers) for name, shape in layer.items()}
    shapes |= {f"final_layernorm.{kind}": (hidden,) for kind in norm_parts(config)}
    if not config.tie_embed_logits:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def parameters(config: ModelConfig) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def check_state(config: ModelConfig, state: Mapping[str, Tensor], where: object) -> None:
    """Raise UserError unless `state` holds exactly the model's tensors in their shapes."""
    expected = expected_shapes(config)
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; give a complete set of weights"
        )
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(
            f"{where}: {len(extra)} tensors do not belong to this kind of model, the first is {extra[0]}; give the "
            "weights and the configuration of one model"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, but its configuration says {shape}; give the "
                "weights and the configuration of one model"
            )


def check_same(written: Mapping[str, Tensor], state: Mapping[str, Tensor], dtype: torch.dtype, where: object) -> None:
    """Raise UserError unless every tensor that was read back equals the state's tensor in `dtype`, bit for bit."""
    for name, tensor in written.items():
        bits = [one.contiguous().view(torch.uint8) for one in (tensor, state[name].to(dtype))]
        if tensor.dtype != dtype or not torch.equal(*bits):
            raise UserError(
                f"{where}: {name} reads back different from what was written, so nothing is published; check the disk, "
                "and run this again"
            )
