"""Megatron checkpoints on disk: ROOT/<release | iter_NNNNNNN>/mp_rank_TT[_PPP]/model_optim_rng.pt and the tracker file.

load: tracker -> every rank's file (nothing in it can run) -> flat neutral names -> `reshard.merge_ranks` -> canonical
state. save: canonical state -> `reshard.rank_state`, one rank at a time -> nested dict in one of the two spellings ->
folder renamed into place, tracker last.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_llm import reshard
from megatron_llm.files import InputsMissing, UserError, publishing, write_text
from megatron_llm.model_config import ModelConfig

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0
FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
"""The second is what upstream's trainer writes with its distributed optimizer."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Spelling: TypeAlias = Literal["converter", "trainer"]
BODY: dict[Spelling, str] = {"converter": "transformer", "trainer": "encoder"}
ATTENTION: dict[Spelling, str] = {"converter": "attention", "trainer": "self_attention"}


class EnumStandIn:
    """Takes the place of an upstream enum member when a file is read; it only keeps the value."""

    def __init__(self, value: int) -> None:
        self.value = value


def _safe_globals() -> list[Any]:
    """What a file may name besides tensors: Namespace, NumPy arrays and inert stand-ins for upstream's enums."""
    enums = ("ModelType", "LayerType", "AttnType", "AttnMaskType", "PositionEmbeddingType")
    stand_ins = [(type(name, (EnumStandIn,), {}), f"megatron.model.enums.{name}") for name in enums]
    scalars = [np.dtype(code) for code in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "bool")]
    rebuild = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    return [
        argparse.Namespace,
        *(
            (function, f"numpy.{core}.multiarray.{name}")
            for name, function in rebuild.items()
            for core in ("core", "_core")
        ),
        np.ndarray,
        np.dtype,
        *(type(dtype) for dtype in scalars),
        *stand_ins,
    ]


def iteration_name(iteration: int | Literal["release"]) -> str:
    """`release` or `iter_0000060`."""
    return iteration if iteration == "release" else f"iter_{iteration:07d}"


def find(root: Path, iteration: int | str | None = None) -> Path:
    """The folder of an iteration (a number, "release", or None for the tracker's). Raises InputsMissing."""
    if iteration is None:
        tracker = root / TRACKER
        if not tracker.is_file():
            raise InputsMissing(f"{tracker} is missing: {root} is not a checkpoint folder; check --load / --load_dir")
        iteration = tracker.read_text().strip()
    if iteration != "release" and not str(iteration).isdecimal():
        raise UserError(f"{root}: the iteration is {iteration!r}; valid are a number and 'release'")
    folder = root / iteration_name("release" if iteration == "release" else int(iteration))
    if not folder.is_dir():
        present = sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
        raise InputsMissing(f"{folder} is missing; {root} holds {', '.join(present) or 'no checkpoint'}")
    return folder


def _rank_files(folder: Path) -> dict[reshard.Rank, Path]:
    """Every rank's file; raises InputsMissing when the grid of ranks has a hole."""
    files: dict[reshard.Rank, Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if found := re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", path.name):
            present = [path / name for name in FILE_NAMES if (path / name).is_file()]
            if not present:
                raise InputsMissing(f"{path} holds neither {' nor '.join(FILE_NAMES)}")
            files[int(found[1]), int(found[2] or 0)] = present[0]
    if not files:
        raise InputsMissing(f"{folder} holds no mp_rank_* folder: not a Megatron checkpoint")
    tp, pp = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    if missing := [(t, p) for p in range(pp) for t in range(tp) if (t, p) not in files]:
        raise InputsMissing(
            f"{folder}: the file of tensor rank {missing[0][0]}, pipeline rank {missing[0][1]} is missing"
        )
    return files


def read_file(path: Path) -> dict[str, Any]:
    """One rank's file as plain data and memory-mapped CPU tensors; refuses a file that names anything else."""
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else str(error).splitlines()[0]
        raise UserError(f"{path} is not loaded, it holds more than weights and plain data: {reason}") from error
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read, it may be truncated ({error!r:.200})") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("args"), argparse.Namespace)
        or "model" not in content
    ):
        raise UserError(f"{path} lacks 'args' or 'model' (virtual pipeline stages are not supported)")
    if content.get("checkpoint_version") != CHECKPOINT_VERSION:
        raise UserError(f"{path} has checkpoint_version {content.get('checkpoint_version')}; only 3.0 is readable")
    return content


def _neutral(model: Mapping[str, Any], where: Path) -> reshard.State:
    """Either spelling's nested model as the flat names of `reshard`."""
    language = model.get("language_model", model)
    body = language.get("transformer", language.get("encoder"))
    if body is None:
        raise UserError(f"{where}: 'language_model' has neither 'transformer' nor 'encoder' but {sorted(language)}")
    state = {name.replace(".self_attention.", ".attention."): tensor for name, tensor in body.items()}
    if embedding := language.get("embedding"):
        flat = embedding.get("word_embeddings.weight")
        state[reshard.EMBEDDING] = flat if flat is not None else embedding["word_embeddings"]["weight"]
    if isinstance(language.get("lm_head"), Tensor):
        state[reshard.HEAD] = language["lm_head"]
    if head := model.get("word_embeddings_for_head"):
        state[reshard.TIED_HEAD] = head["weight"]
    if biased := [name for name in state if name.endswith(".bias")]:
        raise UserError(f"{where}: {biased[0]}: models with biases (Falcon, GPT) are not supported yet")
    return state


def _config(args: argparse.Namespace, where: Path) -> ModelConfig:
    """The geometry in a file's `args`; raises UserError for what is not a Llama."""
    unsupported = {
        "parallel_attn": ("Falcon", bool(getattr(args, "parallel_attn", False))),
        "sliding_window_size": ("Mistral", getattr(args, "sliding_window_size", None) is not None),
        "glu_activation": ("Falcon, GPT", getattr(args, "glu_activation", None) != "swiglu"),
    }
    for name, (models, found) in unsupported.items():
        if found:
            raise UserError(f"{where}: {name} = {getattr(args, name, None)}: {models} models are not supported yet")
    try:
        heads = args.num_attention_heads
        return ModelConfig(
            vocab_size=getattr(args, "true_vocab_size", None) or args.padded_vocab_size,
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            num_attention_heads=heads,
            num_attention_heads_kv=getattr(args, "num_attention_heads_kv", None) or heads,
            ffn_hidden_size=args.ffn_hidden_size,
            max_position_embeddings=args.max_position_embeddings,
            kv_channels=getattr(args, "kv_channels", None) or args.hidden_size // heads,
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
            rope_theta=getattr(args, "rope_theta", 10000.0),
            rope_scaling_factor=getattr(args, "rope_scaling_factor", 1.0),
            tie_embed_logits=getattr(args, "tie_embed_logits", False),
        )
    except (AttributeError, ValueError) as error:
        raise UserError(f"{where}: args do not describe a model: {error}") from error


def load(root: Path, iteration: int | str | None = None) -> tuple[ModelConfig, reshard.State, argparse.Namespace]:
    """Any TP x PP layout as geometry, canonical CPU tensors in the stored dtype, and rank 0's `args`.

    `iteration` None means the tracker's. Raises InputsMissing for absent files, UserError for unreadable or unsafe.
    """
    folder = find(root, iteration)
    contents = {rank: read_file(path) for rank, path in _rank_files(folder).items()}
    args = contents[0, 0]["args"]
    config = _config(args, folder)
    pp = 1 + max(stage for _, stage in contents)
    if config.num_layers % pp:
        raise UserError(f"{folder} has {pp} pipeline stages, which do not divide num_layers = {config.num_layers}")
    try:
        state = reshard.merge_ranks(
            config, {rank: _neutral(content["model"], folder) for rank, content in contents.items()}
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not laid out as a Megatron Llama: {error!r}") from error
    reshard.check_state(config, state, folder)
    return config, state, args


def make_args(
    config: ModelConfig,
    *,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    iteration: int | Literal["release"],
    extra: Mapping[str, Any],
) -> argparse.Namespace:
    """The `args` that upstream's and our readers need; `extra` overrides (sequence length, consumed samples, …)."""
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels": config.kv_channels,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_heads_kv": config.num_attention_heads_kv,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "padded_vocab_size": reshard.padded_vocab_size(config.vocab_size, tp),
        "true_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": reshard.VOCAB_MULTIPLE,
        "tokenizer_type": "SentencePieceTokenizer",
        "glu_activation": "swiglu",
        "use_rms_norm": True,
        "tie_embed_logits": config.tie_embed_logits,
        "parallel_attn": False,
        "parallel_layernorm": False,
        "layernorm_epsilon": config.layernorm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.rope_scaling_factor,
        "position_embedding_type": "rotary",
        "params_dtype": dtype,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "iteration": iteration,
        "bias_gelu_fusion": False,
        "bias_droput_fusion": False,
        "use_flash_attn": True,
        "hidden_dropout": 0.0,
        "sliding_window_size": None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**(values | dict(extra)))


def _nested(state: Mapping[str, Tensor], spelling: Spelling, dtype: torch.dtype) -> dict[str, Any]:
    """A rank's neutral tensors as the nested dict of `spelling`, each in its own storage (a view drags the whole)."""
    own = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}
    language: dict[str, Any] = {}
    if (embedding := own.pop(reshard.EMBEDDING, None)) is not None:
        converter = spelling == "converter"
        language["embedding"] = (
            {"word_embeddings.weight": embedding} if converter else {"word_embeddings": {"weight": embedding}}
        )
    head, tied = own.pop(reshard.HEAD, None), own.pop(reshard.TIED_HEAD, None)
    language[BODY[spelling]] = {
        name.replace(".attention.", f".{ATTENTION[spelling]}."): tensor for name, tensor in own.items()
    }
    if head is not None:
        language["lm_head"] = head
    return {"language_model": language} | ({} if tied is None else {"word_embeddings_for_head": {"weight": tied}})


def save(
    root: Path,
    iteration: int | Literal["release"],
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    extra_args: Mapping[str, Any],
    spelling: Spelling = "trainer",
) -> Path:
    """Publish ROOT/<iteration>/mp_rank_*/model_optim_rng.pt, then the tracker (newest iteration); return the folder.

    Raises UserError when `tp` or `pp` does not divide the model.
    """
    reshard.check_sizes(config, tp, pp)
    reshard.check_state(config, state, root)
    args = make_args(config, tp=tp, pp=pp, dtype=dtype, iteration=iteration, extra=extra_args)
    final = root / iteration_name(iteration)
    with publishing(final) as (temporary,):
        for stage in range(pp):
            for tensor_rank in range(tp):
                local = reshard.rank_state(config, state, tp, pp, (tensor_rank, stage))
                folder = temporary / (f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
                folder.mkdir(parents=True)
                content = {
                    "args": args,
                    "checkpoint_version": CHECKPOINT_VERSION,
                    "iteration": iteration,
                    "model": _nested(local, spelling, dtype),
                }
                torch.save(content, folder / FILE_NAMES[0])
    write_text(root / TRACKER, newest(root) if iteration != "release" else "release")
    return final


def newest(root: Path) -> str:
    """The largest iteration present: merging several in any order leaves the same tracker."""
    names = [path.name for path in root.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    return str(max(int(name[5:]) for name in names))
