"""The state from which a run begins or goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llm.model.config import ModelConfig
from megatron_llm.optim.loss_scale import LossScale
from megatron_llm.optim.update_guards import SpikeHistory


@dataclass
class Progress:
    """The progress of a run; stored in every checkpoint."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    optimizer_steps: int = 0
    """Updates that Adam's moments have seen; fewer than iterations when only weights were taken from a checkpoint."""
    skipped_train_samples: int = 0
    """Samples consumed in iterations that made no update; the learning-rate schedule does not count them."""
    evaluation_due: bool = False
    """Whether the evaluation after this iteration is still to be made, because it was interrupted or has not begun."""
    losses_since_log: list[float] = field(default_factory=list)
    memory: SpikeHistory = field(default_factory=SpikeHistory)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """Read the progress from a state.json; in checkpoints from before the guards had a memory, that part starts
        empty.

        Raises KeyError, TypeError.
        """
        memory = dict(state.get("memory", {}))
        if scale := memory.pop("loss_scale", None):
            memory["loss_scale"] = LossScale(**scale)
        values = {name: state[name] for name in cls.__dataclass_fields__ if name != "memory"}
        return cls(**values, memory=SpikeHistory(**memory))


@dataclass(frozen=True)
class Start:
    """The starting point that rank 0 found, without the weights."""

    config: ModelConfig
    progress: Progress
    folder: Path | None = None
    """A checkpoint of this engine, which all ranks load together; None when the run starts otherwise."""
    saved: dict[str, Any] = field(default_factory=dict)
    """The state.json of that checkpoint, without the parts that flags exclude."""
    with_optimizer: bool = True
    """Whether Adam's moments are loaded from that checkpoint."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """The flags with which the checkpoint was made, as far as it recorded them."""
    seq_length: int = 0
    """Sequence length: --seq_length, or the checkpoint's value when that flag is not given."""
