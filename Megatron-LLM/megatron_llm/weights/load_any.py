"""Loads weights from any kind of --load folder: a Megatron layout, a training checkpoint or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.model import canonical_state
from megatron_llm.model.config import ModelConfig
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron
from run_contract.errors import InputsMissing, UserError

LEFT_OUT: dict[str, tuple[str, float, float | None]] = {
    "llama": ("layernorm_epsilon", 1e-6, 1e-5),
    "codellama": ("rope_theta", 1e6, 10000.0),
    "mistral": ("sliding_window_size", 4096, None),
}
"""Published model -> a setting that upstream's checkpoint_util omits: its name, its true value, the file's default."""
CONSUMED = ("consumed_train_samples", "consumed_valid_samples")


@dataclass(frozen=True)
class Loaded:
    """A loaded model, and its position in a training run."""

    folder: Path
    iteration: int | Literal["release"]
    config: ModelConfig
    state: Mapping[str, Tensor]
    """The canonical tensors; made on access where the model may be larger than memory."""
    args: dict[str, Any]
    """The arguments recorded in the checkpoint, with consumed samples; any name may be absent."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are stored."""
        return self.state[canonical_state.EMBEDDING].dtype


def load(root: Path, iteration: int | None = None) -> Loaded:
    """Load the model of an iteration, or for None the one that the tracker names.

    Among this engine's own checkpoints, None means the newest that verifies. Raises InputsMissing when the model is
    missing or incomplete, and UserError when it cannot be read.
    """
    if (root / "config.json").is_file() and iteration is None:
        hf_geometry, tensors = hf_weights.load(root)
        return Loaded(root, "release", hf_geometry, tensors, {"true_vocab_size": hf_geometry.vocab_size})
    if iteration is None and any(checkpoint.is_ours(folder) for folder in root.glob("iter_*")):
        newest = checkpoint.latest_valid(root)
        if newest is None:
            raise InputsMissing(f"{root} holds no checkpoint that verifies; give another folder")
        return _load_ours(newest)
    folder = megatron.find(root, iteration)
    if checkpoint.is_ours(folder):
        if reason := checkpoint.problem(folder):
            raise InputsMissing(f"{folder} does not verify: {reason}; give another checkpoint")
        return _load_ours(folder)
    config, state, args = megatron.load(root, iteration)
    number: int | Literal["release"] = "release" if folder.name == "release" else int(folder.name[5:])
    return Loaded(folder, number, config, state, vars(args))


def check_family(loaded: Loaded, named: str | None, flag: str) -> None:
    """Raise UserError when `flag` names a Falcon and the model is not one, or the other way round.

    Upstream's checkpoint_util omits some settings, so that its files have the default. Such a file is refused if the
    named model has another value.
    """
    if named and loaded.config.parallel_attn != (named == "falcon"):
        family = "falcon" if loaded.config.parallel_attn else "llama2"
        raise UserError(f"{flag} {named} but {loaded.folder} is a different model; give {family}")
    if named not in LEFT_OUT or not _resharded_by_upstream(loaded):
        return
    name, published, default = LEFT_OUT[named]
    if getattr(loaded.config, name) == default:
        raise UserError(
            f"{flag} {named} but {loaded.folder} has {name} {default}, where {named} has {published}: upstream's "
            "checkpoint_util wrote this file and leaves out the setting; begin from the folder that it read"
        )


def _resharded_by_upstream(loaded: Loaded) -> bool:
    """Whether upstream's checkpoint_util wrote the file: no other upstream program builds a model without values."""
    return loaded.args.get("perform_initialization") is False


def _load_ours(folder: Path) -> Loaded:
    config, state, progress = checkpoint.load_model_state(folder)
    arguments = {**progress.get("arguments", {})}
    arguments |= {name: progress[name] for name in CONSUMED if name in progress}
    return Loaded(folder, int(progress["iteration"]), config, state, arguments)
