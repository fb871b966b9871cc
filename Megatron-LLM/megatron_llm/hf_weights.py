"""Hugging Face Llama folders: config.json and weights to canonical state, and back with everything a folder needs.

load: config.json -> ModelConfig; safetensors or pytorch_model*.bin, one file or an index -> canonical names (a rename:
the engine keeps Hugging Face's rotary halves). save: config.json in the spellings of Transformers 4 and 5,
generation_config.json, safetensors shards with their index, tokenizer files.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llm import hf_tokenizer
from megatron_llm.files import InputsMissing, UserError
from megatron_llm.model_config import ModelConfig
from megatron_llm.reshard import EMBEDDING, FINAL_NORM, HEAD, State, check_state, expected_shapes

LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
"""Hugging Face's name within a layer -> the canonical one."""
OUTER_NAMES = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": FINAL_NORM, "lm_head.weight": HEAD}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PUBLISHED = {
    "llama": "huggyllama/llama-{size}b",
    "llama2": "meta-llama/Llama-2-{size}b-hf",
    "codellama": "codellama/CodeLlama-{size}b-hf",
}
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def canonical_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `layers.3.mlp.w3.weight`; unknown names are returned as they are."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if found and found[2] in LAYER_NAMES:
        return f"layers.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    return OUTER_NAMES.get(name, name)


def hf_name(name: str) -> str:
    """The inverse of `canonical_name`."""
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        (inner,) = (theirs for theirs, ours in LAYER_NAMES.items() if ours == found[2])
        return f"model.layers.{found[1]}.{inner}.weight"
    (outer,) = (theirs for theirs, ours in OUTER_NAMES.items() if ours == name)
    return outer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the folder of a Hugging Face Llama model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _rope(raw: Mapping[str, Any], where: Path) -> tuple[float, float]:
    """(theta, linear scaling factor) from `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported are 'default' and 'linear'")
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    return float(theta), float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0


def load_config(folder: Path) -> ModelConfig:
    """The geometry in a folder's config.json. Raises InputsMissing, or UserError for what is not a plain Llama."""
    path = folder / "config.json"
    raw = _read_json(path)
    architecture = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise UserError(f"{path}: architecture {architecture} is not supported yet; supported is LlamaForCausalLM")
    for key, valid in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        if raw.get(key, valid) != valid:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported; it must be {valid!r}")
    theta, factor = _rope(raw, path)
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_attention_heads_kv=raw.get("num_key_value_heads") or heads,
            ffn_hidden_size=raw["intermediate_size"],
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            kv_channels=raw.get("head_dim") or raw["hidden_size"] // heads,
            layernorm_epsilon=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tie_embed_logits=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: of an index if there is one, else the single file. Safetensors come first."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / file for file in sorted(set(_read_json(index).get("weight_map", {}).values()))]
            if missing := [path.name for path in files if not path.is_file()]:
                raise InputsMissing(
                    f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(files)} shards)"
                )
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise InputsMissing(
        f"{folder} holds no weights; expected {' or '.join(WEIGHT_FILES)} or an .index.json beside shards"
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    """One file's tensors; nothing in it can run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read, it may be truncated or hold more than weights ({reason})") from error
    return dict(tensors)


def load(folder: Path) -> tuple[ModelConfig, State]:
    """Geometry and canonical CPU tensors in the stored dtypes. Raises InputsMissing or UserError."""
    config = load_config(folder)
    state: State = {}
    for path in _weight_files(folder):
        tensors = _read_weights(path)
        state |= {canonical_name(name): tensor for name, tensor in tensors.items() if not name.endswith(".inv_freq")}
    if config.tie_embed_logits:
        state.pop(HEAD, None)
    check_state(config, state, folder)
    return config, {name: state[name] for name in expected_shapes(config)}


def locate(model: str, size: int | None, path: str | None, cache: Path | None) -> Path:
    """The folder of a model: `path` or `cache` if it holds a config.json, else a download into `cache`.

    What is downloaded is `path` as a name on the Hub, or the published model of that kind and size.
    """
    for folder in (Path(path) if path else None, cache):
        if folder and (folder / "config.json").is_file():
            return folder
    if path and (Path(path).is_absolute() or Path(path).exists() or path.count("/") != 1):
        raise InputsMissing(f"{path} holds no config.json; give the folder of a Hugging Face model, or ORG/NAME")
    if not path and size is None:
        raise UserError("which model? give --model-path FOLDER, or --size to download the published one")
    name = path or PUBLISHED[model].format(size=size)
    try:
        return Path(huggingface_hub.snapshot_download(name, cache_dir=cache, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputsMissing(
            f"{name} cannot be downloaded: {str(error).splitlines()[0]}; give a local folder"
        ) from error


def make_config(config: ModelConfig, dtype: torch.dtype, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json, each of dtype and rotary settings in the spellings of Transformers 4 and of 5."""
    name = str(dtype).removeprefix("torch.")
    scaled = config.rope_scaling_factor != 1.0
    rope = {"rope_type": "linear", "factor": config.rope_scaling_factor} if scaled else {"rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads_kv,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope | {"type": "linear"} if scaled else None,
        "tie_word_embeddings": config.tie_embed_logits,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": name,
        "torch_dtype": name,
    }


def parse_size(text: str) -> int:
    """`2GB` or `500MB` (decimal), `2GiB` (binary) or plain bytes -> bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise UserError(f"shard size {text!r} is not a size; valid are for example 2GB, 500MB, 2GiB")
    return int(float(found[1]) * UNITS.get(found[2], 1))


def _shards(state: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Names in order, cut before a shard would exceed `max_bytes` (a larger tensor has a shard of its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors with their index."""
    shards = _shards(state, dtype, max_bytes)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {hf_name(name): state[name].to(dtype, copy=True).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors writes for the owner alone
        weight_map |= dict.fromkeys(tensors, file)
    if count > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    vocab_file: Path,
    max_shard_size: str = "10GB",
) -> None:
    """Write a whole Hugging Face folder into `folder` (a temporary one: the caller publishes it).

    The tokenizer files come from `vocab_file`, a tokenizer.model or tokenizer.json, and are compared with it. Raises
    UserError when the tokenizer does not fit the model.
    """
    check_state(config, state, folder)
    hf_tokenizer.check_fits(vocab_file, config.vocab_size)
    folder.mkdir(parents=True)
    bos, eos = hf_tokenizer.sentence_ids(vocab_file)
    _write_json(folder / "config.json", make_config(config, dtype, bos, eos))
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False})
    _write_weights(folder, state, dtype, parse_size(max_shard_size))
    hf_tokenizer.save(folder, vocab_file, config.max_position_embeddings)


def check_written(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Read a written folder back; raise UserError unless geometry and every tensor are what was to be written."""
    written_config, written = load(folder)
    if written_config != config:
        raise UserError(f"{folder}: read back as {written_config}, written was {config}")
    for name, tensor in state.items():
        if not torch.equal(written[name], tensor.to(dtype)):
            raise UserError(f"{folder}: {name} read back differs from what was written; the disk may be failing")
