"""Converts Meta's original folders, consolidated.NN.pth (any number of files) and params.json, to the canonical state.

Meta interleaves the rotary pairs of q and k, as Megatron does; the engine keeps two halves. params.json lacks the width
of the MLP, the number of positions and often the size of the vocabulary. Width and vocabulary are taken from the
tensors, and the number of positions from the model's name. params.json also lacks the factor of `use_scaled_rope`: it
is 8 in Llama 3.1 and 3.3 and 32 in Llama 3.2, according to the configurations that Meta published with Hugging Face.
The geometry of a published model decides which of the two applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.model.canonical_state import EMBEDDING, FINAL_NORM, HEAD, LazyState, expected_shapes
from megatron_llm.model.config import ModelConfig
from megatron_llm.weights.hf import read_weights
from megatron_llm.weights.hf_config import read_json
from megatron_llm.weights.megatron_layout import deinterleave
from run_contract.errors import InputsMissing, UserError

PARAMS = "params.json"
BUFFER = "rope.freqs"
"""Name of a tensor that is not a weight, because it follows from params.json."""
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "attention.wq": "attention.wq",
    "attention.wk": "attention.wk",
    "attention.wv": "attention.wv",
    "attention.wo": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
"""The canonical name within a layer -> Meta's name."""
OUTER_NAMES = {EMBEDDING: "tok_embeddings.weight", FINAL_NORM: "norm.weight", HEAD: "output.weight"}
POSITIONS = {"llama": 2048, "llama2": 4096, "codellama": 16384}
LLAMA3_VOCABULARY = 128256
LLAMA3_POSITIONS = 8192
SCALED_POSITIONS = 131072
ROPE_FACTORS = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}
"""(dim, n_layers) of the published models with `use_scaled_rope` -> their factor."""


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout."""
    return (folder / PARAMS).is_file() and not (folder / "config.json").is_file()


def meta_name(name: str) -> str:
    """Meta's name of a canonical tensor: `layers.3.mlp.w3.weight` -> `layers.3.feed_forward.w3.weight`."""
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        return f"layers.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    return OUTER_NAMES[name]


def _shards(folder: Path) -> list[Mapping[str, Tensor]]:
    """The memory-mapped tensors of every file, in order. Raises InputsMissing."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise InputsMissing(f"{folder} holds {PARAMS} but no consolidated.*.pth; download the model again")
    for number, path in enumerate(files):
        if path.name != f"consolidated.{number:02d}.pth":
            raise InputsMissing(
                f"{folder}/consolidated.{number:02d}.pth is missing, and the next file is {path.name}; download the "
                "model again"
            )
    return [read_weights(path) for path in files]


def load(
    folder: Path, model: str, rope_scaling_factor: float | None = None
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Load the geometry and the canonical tensors (CPU, made on access) of Meta's `model`: llama, llama2 or codellama.

    `rope_scaling_factor` is the factor of `use_scaled_rope`, needed if the model is not a published one. Raises
    InputsMissing for missing files, and UserError for files that do not fit together.
    """
    params, shards = read_json(folder / PARAMS), _shards(folder)
    config = _config(params, shards, folder, model, rope_scaling_factor)
    shapes = expected_shapes(config)
    _check_names(shapes, shards, folder, tied=config.tie_embed_logits)
    axes = {name: _axis(name, shape, shards, folder) for name, shape in shapes.items()}

    def make(name: str) -> Tensor:
        parts, axis = [shard[meta_name(name)] for shard in shards], axes[name]
        if axis is None and not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise UserError(
                f"{folder}: {meta_name(name)} differs between files that each hold the whole of it; download the model "
                "again"
            )
        whole = parts[0] if axis is None else torch.cat(parts, axis)
        return deinterleave(whole, config.kv_channels) if name.endswith(("wq.weight", "wk.weight")) else whole

    return config, LazyState(shapes, make)


def _check_names(
    shapes: Mapping[str, tuple[int, ...]], shards: list[Mapping[str, Tensor]], folder: Path, *, tied: bool
) -> None:
    """Raise UserError when a file contains a tensor that does not belong to the model, or tensors of several dtypes."""
    known = {*map(meta_name, shapes), BUFFER, *(["output.weight"] if tied else [])}
    for number, shard in enumerate(shards):
        path = folder / f"consolidated.{number:02d}.pth"
        if extra := sorted(shard.keys() - known):
            raise UserError(f"{path} has {len(extra)} tensors of a different kind of model, the first is {extra[0]}")
        if len(dtypes := {str(tensor.dtype) for name, tensor in shard.items() if name != BUFFER}) > 1:
            raise UserError(f"{path} has tensors of {' and '.join(sorted(dtypes))}; models of one dtype are supported")


def _rope_scaling(params: Mapping[str, Any], folder: Path, factor: float | None) -> dict[str, Any]:
    """The rotary fields of ModelConfig for `use_scaled_rope`.

    Raises UserError if its factor is unknown or has no use.
    """
    if not params.get("use_scaled_rope"):
        if factor is not None:
            raise UserError(
                f"--rope_scaling_factor {factor} but {folder / PARAMS} has no use_scaled_rope; leave it out"
            )
        return {}
    if factor is not None and factor != (params.get("rope_scaling_factor") or factor):
        stored = params["rope_scaling_factor"]
        raise UserError(f"--rope_scaling_factor {factor} but {folder / PARAMS} says {stored}; leave the flag out")
    known = factor or params.get("rope_scaling_factor") or ROPE_FACTORS.get((params["dim"], params["n_layers"]))
    if known is None:
        raise UserError(
            f"{folder / PARAMS} has use_scaled_rope but not by what factor, and no published model is of this size; "
            "give --rope_scaling_factor 8 (as in Llama 3.1 and 3.3) or 32 (as in Llama 3.2)"
        )
    return {
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": float(known),
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
        "rope_original_max_positions": LLAMA3_POSITIONS,
    }


def _is_tied(shards: list[Mapping[str, Tensor]]) -> bool:
    """Whether the output layer is the embedding: it is absent or (Llama 3.2, in one file) a copy of it."""
    head, embedding = shards[0].get("output.weight"), shards[0]["tok_embeddings.weight"]
    if head is None or len(shards) > 1:
        return head is None
    return torch.equal(head[:8], embedding[:8]) and torch.equal(head, embedding)


def _config(
    params: Mapping[str, Any], shards: list[Mapping[str, Tensor]], folder: Path, model: str, factor: float | None
) -> ModelConfig:
    try:
        heads, hidden = params["n_heads"], params["dim"]
        head = shards[0].get("output.weight")
        rows = shards[0]["tok_embeddings.weight"].shape[0] if head is None else head.shape[0] * len(shards)
        vocabulary = params["vocab_size"] if params.get("vocab_size", -1) > 0 else rows
        scaling = _rope_scaling(params, folder, factor)
        positions = LLAMA3_POSITIONS if vocabulary == LLAMA3_VOCABULARY else POSITIONS[model]
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_layers=params["n_layers"],
            num_attention_heads=heads,
            num_attention_heads_kv=params.get("n_kv_heads") or heads,
            ffn_hidden_size=shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
            max_position_embeddings=SCALED_POSITIONS if scaling else positions,
            kv_channels=hidden // heads,
            layernorm_epsilon=params["norm_eps"],
            rope_theta=params.get("rope_theta", 10000.0),
            tie_embed_logits=_is_tied(shards),
            **scaling,
        )
    except KeyError as error:
        raise UserError(
            f"{folder} lacks {error}, so it is not one of {', '.join(POSITIONS)} in Meta's layout"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / PARAMS}: {error}") from error


def _axis(name: str, shape: tuple[int, ...], shards: list[Mapping[str, Tensor]], folder: Path) -> int | None:
    """The axis along which a tensor is cut, by the sizes of its parts; None when every file has the whole tensor.

    Raises UserError.
    """
    theirs = meta_name(name)
    for number, shard in enumerate(shards):
        if theirs not in shard:
            raise UserError(
                f"{folder}/consolidated.{number:02d}.pth lacks the tensor {theirs}; download the model again"
            )
    sizes = [tuple(shard[theirs].shape) for shard in shards]
    if all(size == shape for size in sizes):
        return None
    for axis in range(len(shape)):
        others = {size[:axis] + size[axis + 1 :] for size in sizes}
        if others == {shape[:axis] + shape[axis + 1 :]} and sum(size[axis] for size in sizes) == shape[axis]:
            return axis
    raise UserError(
        f"{folder}: the {len(shards)} parts of {theirs} have shapes {sizes[0]}, …, which do not make {shape}; check "
        f"that no consolidated.*.pth is missing, and that {PARAMS} belongs to this model"
    )
