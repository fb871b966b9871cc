"""Where a run begins or goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llm.model.config import ModelConfig
from megatron_llm.optim.loss_scale import LossScale
from megatron_llm.optim.update_guards import Memory


@dataclass
class Progress:
    """How far a run is; stored in every checkpoint."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    optimizer_steps: int = 0
    """Updates that Adam's moments have seen: fewer than iterations when only weights were taken over."""
    skipped_train_samples: int = 0
    """Consumed in iterations that made no update: the learning rate does not count them."""
    evaluation_due: bool = False
    """The evaluation after this iteration has not been made, or was interrupted."""
    losses_since_log: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """From state.json; checkpoints from before the guards had a memory lack it. Raises KeyError, TypeError."""
        memory = dict(state.get("memory", {}))
        if scale := memory.pop("loss_scale", None):
            memory["loss_scale"] = LossScale(**scale)
        values = {name: state[name] for name in cls.__dataclass_fields__ if name != "memory"}
        return cls(**values, memory=Memory(**memory))


@dataclass(frozen=True)
class Start:
    """What rank 0 found, without the weights."""

    config: ModelConfig
    progress: Progress
    folder: Path | None = None
    """One of our checkpoints, to be loaded by all ranks together."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Its state.json, without what flags say is not to be taken over."""
    with_optimizer: bool = True
    """Whether Adam's moments are loaded from it."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """The flags that the checkpoint was made with, as far as it tells."""
    seq_length: int = 0
    """Of the flags, or without that flag the checkpoint's."""
