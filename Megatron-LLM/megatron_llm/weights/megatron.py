"""Megatron checkpoints on disk: ROOT/<release | iter_NNNNNNN>/mp_rank_TT[_PPP]/model_optim_rng.pt and the tracker file.

load: tracker -> every rank's file (no code in it can run) -> flat neutral names -> `megatron_layout.merge_ranks` ->
canonical state. save: canonical state -> `megatron_layout.rank_state`, one rank at a time -> nested dict in one of the
two spellings -> folder renamed into place, tracker last.
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

from megatron_llm.model import canonical_state
from megatron_llm.model.config import ModelConfig
from megatron_llm.weights import megatron_args, megatron_layout
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_shared

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0
FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
"""Names of a rank's file; upstream's trainer writes the second one with its distributed optimizer."""
TRAINING_STATE = {
    "optimizer": "Adam's moments",
    "opt_param_scheduler": "the state of the schedule",
    "lr_scheduler": "the state of the schedule",
    "rng_state": "the random state",
}
"""Parts of a file that only the original trainer can use to go on -> what they are."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Spelling: TypeAlias = Literal["converter", "trainer"]
KNOWN_PARTS = {
    *("language_model", "transformer", "encoder", "embedding", "lm_head", "word_embeddings_for_head"),
    *("word_embeddings.weight", "word_embeddings"),
}
"""Keys of the nested model that can be read."""
BUFFER = ".inv_freq"
"""Suffix of tensors that are not weights, because they follow from rope_theta."""
BODY: dict[Spelling, str] = {"converter": "transformer", "trainer": "encoder"}
ATTENTION: dict[Spelling, str] = {"converter": "attention", "trainer": "self_attention"}


class EnumStandIn:
    """Stands in for a member of an upstream enum when a file is read; it only keeps the value."""

    def __init__(self, value: int) -> None:
        self.value = value


def _safe_globals() -> list[Any]:
    """All that a file may refer to besides tensors: Namespace, NumPy arrays and inert stand-ins for upstream's
    enums."""
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
    """The name of an iteration's folder: `release`, or for example `iter_0000060`."""
    return iteration if iteration == "release" else f"iter_{iteration:07d}"


def find(root: Path, iteration: int | str | None = None) -> Path:
    """The folder of an iteration (a number, "release", or None for the tracker's). Raises InputsMissing, UserError."""
    if iteration is None:
        tracker = root / TRACKER
        if not tracker.is_file():
            raise InputsMissing(
                f"{tracker} is missing, so {root} is not a checkpoint folder; check --load / --load_dir"
            )
        iteration = tracker.read_text().strip()
    if iteration != "release" and not str(iteration).isdecimal():
        raise UserError(f"{root}: the iteration is {iteration!r}; valid are a number and 'release'")
    folder = root / iteration_name("release" if iteration == "release" else int(iteration))
    if not folder.is_dir():
        present = sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
        raise InputsMissing(f"{folder} is missing; {root} holds {', '.join(present) or 'no checkpoint'}")
    return folder


def _rank_files(folder: Path) -> dict[megatron_layout.Rank, Path]:
    """The file of every rank. Raises InputsMissing when the file of a rank is missing."""
    files: dict[megatron_layout.Rank, Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if found := re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", path.name):
            present = [path / name for name in FILE_NAMES if (path / name).is_file()]
            if not present:
                raise InputsMissing(f"{path} holds neither {' nor '.join(FILE_NAMES)}; copy the checkpoint again")
            files[int(found[1]), int(found[2] or 0)] = present[0]
    if not files:
        raise InputsMissing(
            f"{folder} holds no mp_rank_* folder, so it is not a Megatron checkpoint; check --load / --load_dir"
        )
    tp, pp = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    if missing := [(t, p) for p in range(pp) for t in range(tp) if (t, p) not in files]:
        raise InputsMissing(
            f"{folder}: the file of tensor rank {missing[0][0]}, pipeline rank {missing[0][1]} is missing; copy the "
            "checkpoint again"
        )
    return files


def read_file(path: Path) -> dict[str, Any]:
    """Read one rank's file as plain data and memory-mapped CPU tensors.

    Raises UserError if it contains anything else.
    """
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else str(error).splitlines()[0]
        raise UserError(f"{path} is not loaded, because it holds more than weights and plain data: {reason}") from error
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read, it may be truncated ({error!r:.200}); copy it again") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("args"), argparse.Namespace)
        or "model" not in content
    ):
        raise UserError(f"{path} lacks 'args' or 'model' (virtual pipeline stages are not supported)")
    if content.get("checkpoint_version") != CHECKPOINT_VERSION:
        raise UserError(f"{path} has checkpoint_version {content.get('checkpoint_version')}; only 3.0 is readable")
    return content


def training_state(folder: Path) -> list[str]:
    """The contents of an original trainer's checkpoint that are not read here, such as Adam's moments."""
    path = _rank_files(folder)[0, 0]
    names = [name for name in read_file(path) if name in TRAINING_STATE]
    return [TRAINING_STATE[name] for name in names] + [
        f"Adam's moments ({other.name})" for other in sorted(path.parent.glob("optim*.pt"))
    ]


def _neutral(model: Mapping[str, Any], where: Path) -> canonical_state.State:
    """Convert the nested model of either spelling to the flat names of `megatron_layout`. Raises UserError."""
    language = model.get("language_model", model)
    body = language.get("transformer", language.get("encoder"))
    if body is None:
        raise UserError(f"{where}: 'language_model' has neither 'transformer' nor 'encoder' but {sorted(language)}")
    kept = {name: tensor for name, tensor in body.items() if not name.endswith(BUFFER)}
    state = {name.replace(".self_attention.", ".attention."): tensor for name, tensor in kept.items()}
    embedding = language.get("embedding") or {}
    if embedding:
        flat = embedding.get("word_embeddings.weight")
        state[canonical_state.EMBEDDING] = flat if flat is not None else embedding["word_embeddings"]["weight"]
    if (output := language.get("lm_head")) is not None:
        state[canonical_state.HEAD] = output
    if head := model.get("word_embeddings_for_head"):
        state[megatron_layout.TIED_HEAD] = head["weight"]
    unknown = {*model, *language, *embedding} - KNOWN_PARTS
    if odd := sorted(unknown) + [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{where}: {odd[0]} in the model is not known here, and would be lost")
    if biased := [name for name in state if name.endswith(".bias") and not canonical_state.is_norm(name)]:
        raise UserError(f"{where}: there is {biased[0]}, and models with biases outside of norms are not supported")
    return state


def load(
    root: Path, iteration: int | str | None = None
) -> tuple[ModelConfig, Mapping[str, Tensor], argparse.Namespace]:
    """Load any TP x PP layout: the geometry, the canonical tensors (CPU, in the stored dtype) and the `args` of rank 0.

    The tensors are made from the mapped files on access. `iteration` None means the tracker's. Raises InputsMissing for
    missing files, and UserError for unreadable or unsafe ones.
    """
    return load_folder(find(root, iteration))


def load_folder(folder: Path) -> tuple[ModelConfig, Mapping[str, Tensor], argparse.Namespace]:
    """Do the same as `load` for the folder of one iteration."""
    contents = {rank: read_file(path) for rank, path in _rank_files(folder).items()}
    args = contents[0, 0]["args"]
    if len(iterations := {content.get("iteration") for content in contents.values()}) > 1:
        raise UserError(
            f"{folder}: its files are of the iterations {sorted(map(str, iterations))}, so they are not one "
            "checkpoint; copy the checkpoint again"
        )
    tp, pp = (1 + max(rank[axis] for rank in contents) for axis in (0, 1))
    try:
        ranks = {rank: _neutral(content["model"], folder) for rank, content in contents.items()}
        dtype = megatron_layout.common_dtype((one for rank in ranks.values() for one in rank.items()), folder)
        rows = tp * len(ranks[0, 0].get(canonical_state.EMBEDDING, ()))
        config = megatron_args.to_config(args, rows=rows, tied=canonical_state.HEAD not in ranks[0, pp - 1])
        if config.num_layers % pp:
            raise UserError(f"there are {pp} pipeline stages, which do not divide num_layers = {config.num_layers}")
        return (
            config,
            megatron_layout.merge_ranks(
                config, {rank: megatron_layout.cast(own, dtype) for rank, own in ranks.items()}
            ),
            args,
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not laid out as a Megatron model: {error!r}") from error


def _nested(state: Mapping[str, Tensor], spelling: Spelling, dtype: torch.dtype) -> dict[str, Any]:
    """A rank's neutral tensors as the nested dict of `spelling`.

    Each tensor has a storage of its own, because a view would be saved with its whole storage.
    """
    own = {name: _own(tensor.to(dtype)) for name, tensor in state.items()}
    language: dict[str, Any] = {}
    if (embedding := own.pop(canonical_state.EMBEDDING, None)) is not None:
        converter = spelling == "converter"
        language["embedding"] = (
            {"word_embeddings.weight": embedding} if converter else {"word_embeddings": {"weight": embedding}}
        )
    head, tied = own.pop(canonical_state.HEAD, None), own.pop(megatron_layout.TIED_HEAD, None)
    language[BODY[spelling]] = {
        name.replace(".attention.", f".{ATTENTION[spelling]}."): tensor for name, tensor in own.items()
    }
    if head is not None:
        language["lm_head"] = head
    return {"language_model": language} | ({} if tied is None else {"word_embeddings_for_head": {"weight": tied}})


def _own(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is part of a larger storage."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


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

    Before publishing, what was written is read back, merged and compared with `state`. Raises UserError when `tp` or
    `pp` does not divide the model, or when the comparison fails.
    """
    megatron_layout.check_sizes(config, tp, pp)
    args = megatron_args.make_args(config, tp=tp, pp=pp, dtype=dtype, iteration=iteration, extra=extra_args)
    final = root / iteration_name(iteration)
    with publishing(final) as (temporary,):
        for stage in range(pp):
            for tensor_rank in range(tp):
                local = megatron_layout.rank_state(config, state, tp, pp, (tensor_rank, stage))
                folder = temporary / (f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
                folder.mkdir(parents=True)
                content = {
                    "args": args,
                    "checkpoint_version": CHECKPOINT_VERSION,
                    "iteration": iteration,
                    "model": _nested(local, spelling, dtype),
                }
                torch.save(content, folder / FILE_NAMES[0])
                del local, content
        check_written(temporary, config, state, dtype)
    write_shared(root / TRACKER, (newest(root) if iteration != "release" else "release").encode())
    return final


def check_written(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise UserError unless the merged files of all ranks have the intended geometry and tensors."""
    written_config, written, _ = load_folder(folder)
    if written_config != config:
        raise UserError(
            f"{folder}: what was written reads back as {written_config}, not as {config}; check the disk, and run this "
            "again"
        )
    canonical_state.check_same(written, state, dtype, folder)


def newest(root: Path) -> str:
    """The largest iteration present, so that merging several in any order leaves the same tracker."""
    names = [path.name for path in root.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    return str(max(int(name[5:]) for name in names))
