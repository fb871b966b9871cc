"""Between the engine's canonical tensors and one Megatron rank's tensors: pure functions, exact to the bit.

canonical state -> fuse each layer (q, k, v grouped and rotary-interleaved; [up; gate]) -> cut by tensor rank
-> number layers from 0 within the pipeline stage; and back. Names here are neutral: the two spellings on disk belong to
`megatron_weights`. Formulae: epfLLM/Megatron-LLM's layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_llm.files import UserError
from megatron_llm.model_config import ModelConfig

State: TypeAlias = dict[str, Tensor]
Rank: TypeAlias = tuple[int, int]
"""(tensor rank, pipeline rank)."""

VOCAB_MULTIPLE = 128
QKV, DENSE = "attention.query_key_value.weight", "attention.dense.weight"
UP_GATE, DOWN = "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
EMBEDDING, FINAL_NORM, HEAD = "embedding.weight", "final_layernorm.weight", "lm_head.weight"
TIED_HEAD = "word_embeddings_for_head.weight"
"""The embedding's copy that a tied model's last pipeline stage holds."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor's name and shape."""
    hidden, ffn, size = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * size, config.num_attention_heads_kv * size
    layer: dict[str, tuple[int, ...]] = {
        NORMS[0]: (hidden,),
        "attention.wq.weight": (queries, hidden),
        "attention.wk.weight": (keys, hidden),
        "attention.wv.weight": (keys, hidden),
        "attention.wo.weight": (hidden, queries),
        NORMS[1]: (hidden,),
        "mlp.w1.weight": (ffn, hidden),
        "mlp.w2.weight": (hidden, ffn),
        "mlp.w3.weight": (ffn, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    shapes |= {f"layers.{n}.{name}": shape for n in range(config.num_layers) for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_embed_logits:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def check_state(config: ModelConfig, state: Mapping[str, Tensor], where: object) -> None:
    """Raise UserError unless `state` holds exactly the model's tensors in their shapes."""
    expected = expected_shapes(config)
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(state.keys() - expected.keys()):
        raise UserError(f"{where}: {len(extra)} tensors do not belong to a Llama model, the first is {extra[0]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)}, its configuration says {shape}")


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
    """The vocabulary rounded up to a multiple of 128 * tp."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def interleave(weight: Tensor, size: int) -> Tensor:
    """Rows of every head (heads*size, h) from two rotary halves to interleaved pairs."""
    return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, size: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.view(-1, size // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def fuse_qkv(config: ModelConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(H*d, h), (G*d, h), (G*d, h) -> (G*(H/G + 2)*d, h): for each kv group its queries, its key, its value."""
    groups, size = config.num_attention_heads_kv, config.kv_channels
    parts = [interleave(query, size), interleave(key, size), value]
    grouped = [part.view(groups, -1, size, part.shape[1]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, query.shape[1])


def unfuse_qkv(config: ModelConfig, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_qkv`."""
    groups, size, hidden = config.num_attention_heads_kv, config.kv_channels, fused.shape[1]
    grouped = fused.reshape(groups, -1, size, hidden)
    query = grouped[:, :-2].reshape(-1, hidden)
    key, value = (grouped[:, index].reshape(-1, hidden) for index in (-2, -1))
    return deinterleave(query, size), deinterleave(key, size), value


def fuse_layer(config: ModelConfig, state: Mapping[str, Tensor], number: int) -> State:
    """One layer's canonical tensors as Megatron's, named without the layer number."""

    def take(name: str) -> Tensor:
        return state[f"layers.{number}.{name}"]

    return {
        NORMS[0]: take(NORMS[0]),
        QKV: fuse_qkv(config, *(take(f"attention.{name}.weight") for name in ("wq", "wk", "wv"))),
        DENSE: take("attention.wo.weight"),
        NORMS[1]: take(NORMS[1]),
        UP_GATE: torch.cat([take("mlp.w3.weight"), take("mlp.w1.weight")]),
        DOWN: take("mlp.w2.weight"),
    }


def unfuse_layer(config: ModelConfig, layer: Mapping[str, Tensor], number: int) -> State:
    """The inverse of `fuse_layer`."""
    query, key, value = unfuse_qkv(config, layer[QKV])
    up, gate = layer[UP_GATE].chunk(2)
    tensors = {
        NORMS[0]: layer[NORMS[0]],
        "attention.wq.weight": query,
        "attention.wk.weight": key,
        "attention.wv.weight": value,
        "attention.wo.weight": layer[DENSE],
        NORMS[1]: layer[NORMS[1]],
        "mlp.w1.weight": gate,
        "mlp.w2.weight": layer[DOWN],
        "mlp.w3.weight": up,
    }
    return {f"layers.{number}.{name}": tensor for name, tensor in tensors.items()}


def split(name: str, tensor: Tensor, tp: int, rank: int) -> Tensor:
    """Tensor rank `rank`'s part of a whole Megatron tensor; `name` decides the axis. Norms are copied."""
    if name in (*NORMS, FINAL_NORM):
        return tensor
    if name == UP_GATE:
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(tp, dim=1 if name in (DENSE, DOWN) else 0)[rank]


def join(name: str, parts: list[Tensor]) -> Tensor:
    """The inverse of `split`: all tensor ranks' parts, in rank order. Raises UserError when copied norms differ."""
    if name in (*NORMS, FINAL_NORM):
        if not all(torch.equal(parts[0], part) for part in parts[1:]):
            raise UserError(f"{name} differs between tensor ranks; these files are not one checkpoint")
        return parts[0]
    if name == UP_GATE:
        return torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
    return torch.cat(parts, dim=1 if name in (DENSE, DOWN) else 0)


def pad_rows(weight: Tensor, rows: int) -> Tensor:
    """(V, h) -> (rows, h), repeating the last row."""
    return torch.cat([weight, weight[-1:].expand(rows - weight.shape[0], -1)])


def rank_state(config: ModelConfig, state: Mapping[str, Tensor], tp: int, pp: int, rank: Rank) -> State:
    """One Megatron rank's tensors (layers numbered within its stage) from the whole canonical state."""
    tensor_rank, stage = rank
    rows, depth = padded_vocab_size(config.vocab_size, tp), config.num_layers // pp
    local: State = {}
    if stage == 0:
        local[EMBEDDING] = split(EMBEDDING, pad_rows(state[EMBEDDING], rows), tp, tensor_rank)
    for index in range(depth):
        layer = fuse_layer(config, state, stage * depth + index)
        local |= {f"layers.{index}.{name}": split(name, tensor, tp, tensor_rank) for name, tensor in layer.items()}
    if stage == pp - 1:
        local[FINAL_NORM] = state[FINAL_NORM]
        if not config.tie_embed_logits:
            local[HEAD] = split(HEAD, pad_rows(state[HEAD], rows), tp, tensor_rank)
        elif pp > 1:
            local[TIED_HEAD] = split(TIED_HEAD, pad_rows(state[EMBEDDING], rows), tp, tensor_rank)
    return local


def merge_ranks(config: ModelConfig, ranks: Mapping[Rank, Mapping[str, Tensor]]) -> State:
    """The whole canonical state (vocabulary cut to its true size) from all ranks. Raises UserError if they disagree."""
    tp, pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    depth = config.num_layers // pp

    def whole(stage: int, name: str, prefix: str = "") -> Tensor:
        try:
            return join(name, [ranks[tensor_rank, stage][prefix + name] for tensor_rank in range(tp)])
        except KeyError as error:
            raise UserError(f"pipeline stage {stage} lacks the tensor {error.args[0]}") from error

    state: State = {EMBEDDING: whole(0, EMBEDDING)[: config.vocab_size]}
    for number in range(config.num_layers):
        stage, index = divmod(number, depth)
        layer = {name: whole(stage, name, f"layers.{index}.") for name in (*NORMS, QKV, DENSE, UP_GATE, DOWN)}
        state |= unfuse_layer(config, layer, number)
    state[FINAL_NORM] = whole(pp - 1, FINAL_NORM)
    if not config.tie_embed_logits:
        state[HEAD] = whole(pp - 1, HEAD)[: config.vocab_size]
    elif pp > 1 and not torch.equal(whole(pp - 1, TIED_HEAD)[: config.vocab_size], state[EMBEDDING]):
        raise UserError("the tied output layer of the last pipeline stage differs from the embedding of the first")
    return state
