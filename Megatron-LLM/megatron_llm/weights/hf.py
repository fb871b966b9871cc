"""Converts Hugging Face folders (Llama, Mistral, Falcon) to the canonical state, and back with all files of a folder.

load: config.json -> ModelConfig; safetensors or pytorch_model*.bin, one file or an index -> canonical names. This only
renames tensors, because the engine keeps Hugging Face's rotary halves. save: config.json, generation_config.json,
safetensors shards with their index, tokenizer files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llm.model.canonical_state import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LazyState,
    State,
    check_same,
    check_state,
    expected_shapes,
)
from megatron_llm.model.config import ModelConfig
from megatron_llm.tokenizer import files as tokenizer_files
from megatron_llm.tokenizer import hf_export
from megatron_llm.tokenizer.special_tokens import NONE, SpecialTokens
from megatron_llm.weights import hf_config, hf_falcon
from megatron_llm.weights.hf_config import read_json
from megatron_llm.weights.megatron_layout import cast, common_dtype, equal
from run_contract.claim import CLAIM_VARIABLE
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing

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
"""Hugging Face's name within a layer -> the canonical name."""
OUTER_NAMES = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": FINAL_NORM, "lm_head.weight": HEAD}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OTHER_FORMATS = {
    "adapter_*": "part of an adapter, not a whole model; merge it into its base model and give the result",
    "*.gguf": "a GGUF file, made for inference in llama.cpp; download the model's safetensors",
    "*.pth": "a PyTorch file in another layout; Meta's has consolidated.00.pth beside params.json",
    "*.msgpack": "a Flax file; download the model's safetensors",
    "*.h5": "a TensorFlow file; download the model's safetensors",
}
"""Pattern of a file's name -> what such a file is, and what the user can do."""
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Data types by the names that safetensors gives them."""
ADAPTER = "adapter_config.json"
TIED_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.word_embeddings.weight")
"""Names of the embedding, of which a tied output layer is a copy."""
BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached")
"""Suffixes of tensors that are not weights: old versions of Transformers stored them although they are computed."""
PUBLISHED = {
    "llama": "huggyllama/llama-{size}b",
    "llama2": "meta-llama/Llama-2-{size}b-hf",
    "codellama": "codellama/CodeLlama-{size}b-hf",
    "mistral": "mistralai/Mistral-{size}B-v0.1",
    "falcon": "tiiuae/falcon-{size}b",
}
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def canonical_name(name: str) -> str:
    """The canonical name: `model.layers.3.mlp.up_proj.weight` -> `layers.3.mlp.w3.weight`; unknown names stay."""
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


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights: those of an index if there is one, else the single file; safetensors are preferred.

    Raises UserError, InputsMissing.
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder / ADAPTER} changes the weights beside it; merge the adapter into them, or move it away"
        )
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file() and (folder / name).is_file():
            raise UserError(
                f"{folder} holds {name} and {index.name}, and nothing says which of them are the weights; move one of "
                "them away"
            )
        if index.is_file():
            files = [folder / file for file in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [path.name for path in files if not path.is_file()]:
                raise InputsMissing(
                    f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(files)} shards are); "
                    "download or copy the model again"
                )
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise InputsMissing(
        f"{folder} holds no weights; expected {' or '.join(WEIGHT_FILES)} or an .index.json beside shards"
        + other_format(folder)
    )


def other_format(folder: Path) -> str:
    """A clause for messages about weights in a format that cannot be read; empty where there are none."""
    for pattern, what in OTHER_FORMATS.items():
        if found := sorted(folder.glob(pattern)):
            return f"; {found[0].name} is {what}"
    return ""


def read_weights(path: Path, *, values: bool = True) -> dict[str, Tensor]:
    """Read the tensors of one file, without `values` on the meta device.

    No code in the file can run. Raises UserError.
    """
    try:
        if path.suffix == ".safetensors" and values:
            return load_file(path)
        if path.suffix == ".safetensors":
            return _outlines(path)
        tensors = torch.load(path, map_location="cpu" if values else "meta", weights_only=True, mmap=values)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read, it may be truncated or hold more than weights ({reason}); download or copy it "
            "again"
        ) from error
    return dict(tensors)


def _outlines(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device, without their values. Raises SafetensorError."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
        return {
            name: torch.empty(one.get_shape(), dtype=STORED.get(one.get_dtype(), torch.float32), device="meta")
            for name, one in slices.items()
        }


def load(folder: Path, *, values: bool = True) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Load the geometry and the canonical tensors (CPU, in the stored dtypes) of a folder.

    Without `values` only names and shapes are read, and the tensors are on the meta device. Raises InputsMissing or
    UserError.
    """
    config = hf_config.load(folder)
    tensors = _read_all(folder, values=values)
    head = tensors.pop("lm_head.weight", None) if config.tie_embed_logits else None
    if head is not None and values:
        _check_tied(head, tensors, folder)
    whole = cast(tensors, common_dtype(tensors.items(), folder))
    if config.parallel_attn:
        try:
            state: Mapping[str, Tensor] = hf_falcon.from_hf(config, whole)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    else:
        names = {canonical_name(name): name for name in whole}
        state = LazyState(names, lambda name: whole[names[name]])
    check_state(config, state, folder)
    return config, state


def _read_all(folder: Path, *, values: bool) -> State:
    """Read all tensors of a folder under Hugging Face's names.

    Raises UserError when two files have a tensor of one name.
    """
    tensors: State = {}
    for path in _weight_files(folder):
        read = {name: one for name, one in read_weights(path, values=values).items() if not name.endswith(BUFFERS)}
        if twice := sorted(tensors.keys() & read.keys()):
            raise UserError(
                f"{path}: {twice[0]} is in another file of {folder} too, and nothing says which is right; remove one "
                "of them"
            )
        tensors |= read
    return tensors


def _check_tied(head: Tensor, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError if a stored output layer differs from the embedding although config.json says that they are
    tied."""
    name = next((name for name in TIED_EMBEDDINGS if name in tensors), None)
    if name is not None and not equal(head, tensors[name]):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is stored and differs from {name}; "
            'write "tie_word_embeddings": false to keep it, or remove the tensor to use the embedding, as Transformers '
            "does"
        )


def say_what_stays_behind(folder: Path) -> None:
    """Print the properties of a model in a Hugging Face folder that no other layout can keep."""
    if (folder / "config.json").is_file() and (found := hf_config.not_carried(folder)):
        print(f"{folder}/config.json: not carried along: {'; '.join(found)}", flush=True)


def locate(model: str, size: int | None, path: str | None, cache: Path | None) -> Path:
    """The folder of a model: `path` or `cache` if it has a config.json or Meta's params.json, else a download.

    The download is the model that `path` names on the Hub or, without `path`, the published model of this kind and
    size. Raises InputsMissing, UserError.
    """
    for folder in (Path(path) if path else None, cache):
        if folder and any((folder / name).is_file() for name in ("config.json", "params.json")):
            return folder
    if path and (Path(path).is_absolute() or Path(path).exists() or path.count("/") != 1):
        raise InputsMissing(f"{path} holds no config.json; give the folder of a Hugging Face model, or ORG/NAME")
    if not path and size is None:
        raise UserError("no model is named; give --model-path FOLDER, or --size to download the published one")
    name = path or PUBLISHED[model].format(size=size)
    try:
        return Path(huggingface_hub.snapshot_download(name, cache_dir=cache, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputsMissing(
            f"{name} cannot be downloaded: {str(error).splitlines()[0]}; give a local folder"
        ) from error


def parse_size(text: str) -> int:
    """Convert a size to bytes: `2GB` or `500MB` (decimal), `2GiB` (binary), or a plain number. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise UserError(f"shard size {text!r} is not a size; valid are for example 2GB, 500MB, 2GiB")
    return int(float(found[1]) * UNITS.get(found[2], 1))


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Distribute names over shards in order, such that no shard exceeds `max_bytes`; a larger tensor has its own
    shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _named(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, int]]:
    """The state under Hugging Face's names, with tensors made on access, and the number of elements of each tensor."""
    counts = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    if config.parallel_attn:
        layout = hf_falcon.layout(config)
        return hf_falcon.to_hf(config, state), {name: sum(counts[one] for one in held) for name, held in layout.items()}
    names = {hf_name(name): name for name in counts}
    return LazyState(names, lambda name: state[names[name]]), {name: counts[ours] for name, ours in names.items()}


def _write_weights(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int
) -> None:
    """Write model.safetensors, or model-00001-of-0000N.safetensors and an index; only one shard at a time is in
    memory."""
    named, counts = _named(config, state)
    shards = _shards({name: count * dtype.itemsize for name, count in counts.items()}, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: named[name].to(dtype).contiguous() for name in names}, folder / file, metadata={"format": "pt"}
        )
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(counts.values()) * dtype.itemsize}, "weight_map": weight_map}
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
    special: SpecialTokens = NONE,
) -> None:
    """Write a whole Hugging Face folder into `folder`, which is a temporary folder that the caller publishes.

    The tokenizer files are made from `vocab_file`, a tokenizer.model or tokenizer.json, and compared with it. Raises
    UserError when the tokenizer does not fit the model.
    """
    tokenizer_files.check_fits(vocab_file, config.vocab_size)
    folder.mkdir(parents=True)
    bos, eos = special.sentence_ids(vocab_file)
    _write_json(folder / "config.json", hf_config.make(config, dtype, bos, eos))
    _write_json(folder / "generation_config.json", _generation(vocab_file, bos, eos, special))
    _write_weights(folder, config, state, dtype, parse_size(max_shard_size))
    hf_export.save(folder, vocab_file, config.max_position_embeddings, special)


def _generation(vocab_file: Path, bos: int | None, eos: int | None, special: SpecialTokens) -> dict[str, object]:
    """The content of generation_config.json: the file beside the tokenizer, else sentence tokens and greedy decoding.

    If `special` gives a sentence token's role to another token, that takes precedence over the file.
    """
    tokens = {"bos_token_id": bos, "eos_token_id": eos}
    chosen = {name: number for name, number in tokens.items() if name.removesuffix("_id") in special.roles}
    beside = tokenizer_files.file_of(vocab_file).with_name("generation_config.json")
    given: dict[str, object] = read_json(beside) if beside.is_file() else {"do_sample": False}
    return {**tokens, **given, **chosen}


def check_written(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Read a written folder back, and raise UserError unless the geometry and every tensor are as intended."""
    written_config, written = load(folder)
    if written_config != config:
        raise UserError(
            f"{folder}: what was written reads back as {written_config}, not as {config}; check the disk, and run this "
            "again"
        )
    check_same(written, state, dtype, folder)


def export(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    vocab_file: Path,
    max_shard_size: str = "10GB",
    special: SpecialTokens = NONE,
) -> None:
    """Publish a whole Hugging Face folder after reading it back and comparing it.

    Raises UserError if it is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not os.environ.get(CLAIM_VARIABLE):
        raise UserError(f"{folder} is not empty; give another folder, or move it away")
    with publishing(folder) as (temporary,):
        save(
            temporary, config, state, dtype=dtype, vocab_file=vocab_file, max_shard_size=max_shard_size, special=special
        )
        check_written(temporary, config, state, dtype)
