"""Converts between the canonical state and one Megatron rank's tensors: pure functions, exact to the bit.

canonical state -> cut by tensor rank -> fuse each layer (q, k, v grouped and rotary-interleaved; [up; gate]) -> number
layers from 0 within the pipeline stage; and back, tensor by tensor. The names here are neutral; weights/megatron.py
translates them to and from the two spellings on disk. The formulae follow epfLLM/Megatron-LLM's layouts.

A state may be larger than memory: its tensors are memory-mapped files, or are made on access (LazyState).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_llm.model.canonical_state import (
    EMBEDDING,
    HEAD,
    LazyState,
    State,
    expected_shapes,
    is_norm,
    layer_norms,
    norm_parts,
)
from megatron_llm.model.config import ModelConfig
from run_contract.errors import UserError

Rank: TypeAlias = tuple[int, int]
"""A rank's coordinates: (tensor rank, pipeline rank)."""


def common_dtype(tensors: Iterable[tuple[str, Tensor]], where: object) -> torch.dtype:
    """The narrowest dtype that represents all of the named tensors exactly. Raises UserError for quantised tensors."""
    found: dict[torch.dtype, str] = {}
    for name, tensor in tensors:
        found.setdefault(tensor.dtype, name)
    for dtype, name in found.items():
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise UserError(f"{where}: {name} holds {dtype}: quantised weights are not supported")
    return functools.reduce(torch.promote_types, found)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors in `dtype`, made on access; the mapping itself if they have that dtype already."""
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return tensors
    return LazyState(tensors, lambda name: tensors[name].to(dtype))


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors, perhaps of different dtypes, hold the same numbers."""
    if left.dtype == right.dtype:
        return torch.equal(left, right)
    return left.shape == right.shape and all(
        torch.equal(*pair) for pair in zip(left.double(), right.double(), strict=True)
    )


VOCAB_MULTIPLE = 128
QKV, DENSE = "attention.query_key_value.weight", "attention.dense.weight"
UP_GATE, DOWN = "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"
QUERY, KEY, VALUE = slice(None, -2), slice(-2, -1), slice(-1, None)
"""Positions of the heads within a kv group."""
TIED_HEAD = "word_embeddings_for_head.weight"
"""Name of the copy of the embedding in the last pipeline stage of a tied model."""


def check_sizes(config: ModelConfig, tp: int, pp: int) -> None:
    """Raise UserError unless the model can be cut over `tp` tensor and `pp` pipeline ranks."""
    for name in ("num_attention_heads", "num_attention_heads_kv", "ffn_hidden_size"):
        count = getattr(config, name)
        if tp < 1 or count % tp:
            raise UserError(f"tensor parallel size {tp} does not divide {name} = {count}; choose one that does")
    if pp < 1 or config.num_layers % pp:
        raise UserError(
            f"pipeline parallel size {pp} does not divide num_layers = {config.num_layers}; choose one that does"
        )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The size of the vocabulary, rounded up to a multiple of 128 * tp."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def interleave(weight: Tensor, size: int) -> Tensor:
    """Reorder the rows of every head (heads*size, h) from two rotary halves to interleaved pairs."""
    return weight.reshape(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, size: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.reshape(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def group_heads(config: ModelConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Group queries, keys and values (heads*d, h) of some kv groups: in each group its queries, its key, its value."""
    size = config.kv_channels
    groups = key.shape[0] // size
    grouped = [part.reshape(groups, -1, size, part.shape[1]) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, query.shape[1])


def pick_heads(config: ModelConfig, fused: Tensor, which: slice) -> Tensor:
    """The queries (QUERY), keys (KEY) or values (VALUE) of a grouped tensor."""
    heads = config.num_attention_heads // config.num_attention_heads_kv + 2
    return fused.reshape(-1, heads, config.kv_channels, fused.shape[1])[:, which].reshape(-1, fused.shape[1])


def fuse_qkv(config: ModelConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Build Megatron's fused tensor: grouped, with queries and keys interleaved."""
    size = config.kv_channels
    return group_heads(config, interleave(query, size), interleave(key, size), value)


def unfuse_qkv(config: ModelConfig, fused: Tensor, which: slice) -> Tensor:
    """The queries, keys or values of Megatron's fused tensor, in the canonical row order."""
    picked = pick_heads(config, fused, which)
    return picked if which is VALUE else deinterleave(picked, config.kv_channels)


def rank_layer(config: ModelConfig, state: Mapping[str, Tensor], number: int, tp: int, rank: int) -> State:
    """The Megatron tensors of one layer on a tensor rank, named without the layer's number."""

    def take(name: str, dim: int = 0) -> Tensor:
        tensor = state[f"layers.{number}.{name}"]
        return tensor if tp == 1 else tensor.chunk(tp, dim)[rank].clone()  # a view would keep the whole in memory

    return {
        **{name: state[f"layers.{number}.{name}"] for name in layer_norms(config)},
        QKV: fuse_qkv(config, *(take(f"attention.{name}.weight") for name in ("wq", "wk", "wv"))),
        DENSE: take("attention.wo.weight", 1),
        UP_GATE: torch.cat(
            [take(f"mlp.{name}.weight") for name in (("w3", "w1") if config.glu_activation else ("w3",))]
        ),
        DOWN: take("mlp.w2.weight", 1),
    }


FUSED = {
    **dict.fromkeys(("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"), QKV),
    **dict.fromkeys(("mlp.w1.weight", "mlp.w3.weight"), UP_GATE),
    "attention.wo.weight": DENSE,
    "mlp.w2.weight": DOWN,
}
"""Canonical name within a layer -> the Megatron tensor that holds it."""


def extract(config: ModelConfig, name: str, part: Tensor) -> Tensor:
    """A canonical tensor's rows or columns from one rank's Megatron tensor; the inverse of `rank_layer`."""
    match name:
        case "attention.wq.weight":
            return unfuse_qkv(config, part, QUERY)
        case "attention.wk.weight":
            return unfuse_qkv(config, part, KEY)
        case "attention.wv.weight":
            return unfuse_qkv(config, part, VALUE)
        case "mlp.w3.weight" if config.glu_activation:
            return part.chunk(2)[0]
        case "mlp.w1.weight":
            return part.chunk(2)[1]
    return part


def rank_rows(weight: Tensor, tp: int, rank: int) -> Tensor:
    """A tensor rank's rows of a vocabulary (V, h), which is padded by repeating its last row."""
    count = padded_vocab_size(weight.shape[0], tp) // tp
    part = weight[rank * count : (rank + 1) * count]
    if len(part) == len(weight) == count:
        return weight
    return torch.cat([part, weight[-1:].expand(count - len(part), -1)])


def rank_state(config: ModelConfig, state: Mapping[str, Tensor], tp: int, pp: int, rank: Rank) -> State:
    """The tensors of one Megatron rank, with layers numbered within its stage, from the whole canonical state."""
    tensor_rank, stage = rank
    depth = config.num_layers // pp
    local: State = {}
    if stage == 0:
        local[EMBEDDING] = rank_rows(state[EMBEDDING], tp, tensor_rank)
    for index in range(depth):
        layer = rank_layer(config, state, stage * depth + index, tp, tensor_rank)
        local |= {f"layers.{index}.{name}": tensor for name, tensor in layer.items()}
    if stage == pp - 1:
        local |= {f"final_layernorm.{kind}": state[f"final_layernorm.{kind}"] for kind in norm_parts(config)}
        if not config.tie_embed_logits:
            local[HEAD] = rank_rows(state[HEAD], tp, tensor_rank)
        elif pp > 1:
            local[TIED_HEAD] = rank_rows(state[EMBEDDING], tp, tensor_rank)
    return local


def merge_ranks(config: ModelConfig, ranks: Mapping[Rank, Mapping[str, Tensor]]) -> LazyState:
    """The whole canonical state, made tensor by tensor from all ranks; the vocabulary is cut to its true size.

    Raises UserError if a rank lacks a tensor or has one of a different shape, or if copies differ between ranks.
    """
    tp, pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    check_ranks(config, ranks, tp, pp)

    def make(name: str) -> Tensor:
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found is None:
            stage = 0 if name == EMBEDDING else pp - 1
            if is_norm(name):
                return ranks[0, stage][name]
            return _joined([ranks[rank, stage][name] for rank in range(tp)], 0)[: config.vocab_size]
        (stage, index), inner = divmod(int(found[1]), config.num_layers // pp), found[2]
        if is_norm(inner):
            return ranks[0, stage][f"layers.{index}.{inner}"]
        parts = [ranks[rank, stage][f"layers.{index}.{FUSED[inner]}"] for rank in range(tp)]
        return _joined([extract(config, inner, part) for part in parts], 1 if FUSED[inner] in (DENSE, DOWN) else 0)

    return LazyState(expected_shapes(config), make)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def check_ranks(config: ModelConfig, ranks: Mapping[Rank, Mapping[str, Tensor]], tp: int, pp: int) -> None:
    """Raise UserError unless every rank holds exactly its tensors. Only values of copies that must agree are read."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}
    for (rank, stage), tensors in ranks.items():
        wanted_here = rank_state(config, empty, tp, pp, (rank, stage))
        if extra := sorted(tensors.keys() - wanted_here.keys()):
            tied = "; by its args the output layer is the embedding" if extra[0] == HEAD else ""
            raise UserError(
                f"tensor rank {rank} of pipeline stage {stage} has {len(extra)} tensors that do not belong to its "
                f"model, the first is {extra[0]}{tied}"
            )
        for name, expected in wanted_here.items():
            if name not in tensors:
                raise UserError(f"tensor rank {rank} of pipeline stage {stage} lacks the tensor {name}")
            found, wanted = tuple(tensors[name].shape), tuple(expected.shape)
            vocabulary = name in (EMBEDDING, HEAD, TIED_HEAD)  # its padding may differ
            if found[1:] != wanted[1:] or (not vocabulary and found[:1] != wanted[:1]):
                raise UserError(f"{name} of tensor rank {rank} has shape {found}, but its configuration says {wanted}")
            if vocabulary and found[0] * tp < config.vocab_size:
                raise UserError(f"{name} has {found[0] * tp} rows, but its configuration says {config.vocab_size}")
            if is_norm(name) and not torch.equal(tensors[name], ranks[0, stage][name]):
                raise UserError(f"{name} differs between tensor ranks; these files are not one checkpoint")
            if name == TIED_HEAD and not torch.equal(tensors[name], ranks[rank, 0][EMBEDDING]):
                raise UserError(
                    "the tied output layer of the last pipeline stage differs from the embedding of the first"
                )
