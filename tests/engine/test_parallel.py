"""Layouts of ranks change nothing but the speed: the whole matrix of a world size in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_ranks
import pytest
import torch
from tiny_run import flags, metrics

from megatron_llm import checkpoint
from megatron_llm.model import shapes
from megatron_llm.model_config import ModelConfig
from megatron_llm.optimizer import MOMENTS

TP, PP = "--tensor_model_parallel_size", "--pipeline_model_parallel_size"
SHORT = ("--train_iters", 20, "--eval_interval", 20)
LAYOUTS: dict[int, dict[str, tuple[object, ...]]] = {
    1: {"1,1,1": ()},
    2: {
        "1,1,2": (),
        "2,1,1": (TP, 2),
        "2,1,1 sequence": (TP, 2, "--sequence_parallel"),
    },
    4: {
        "4,1,1 with 2 kv heads": (TP, 4, "--sequence_parallel"),
        "2,1,2": (TP, 2, "--sequence_parallel"),
    },
}


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Path]:
    """The --save folder of 20 iterations at every layout."""
    root, found = tmp_path_factory.mktemp("layouts"), {}
    for size, layouts in LAYOUTS.items():
        names = {name: root / name.replace(" ", "-") for name in layouts}
        argvs = [flags(tiny_data, names[name], *SHORT, *more) for name, more in layouts.items()]
        engine_ranks.run_several(root, argvs, size)
        found |= names
    return found


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts][1:])
def test_layouts_give_equal_losses(saves: dict[str, Path], layout: str) -> None:
    """Training loss, gradient norm and validation loss of 20 steps equal those of one process."""
    alone, spread = metrics(saves["1,1,1"]), metrics(saves[layout])
    assert len(alone) == len(spread) == 21
    for one, other in zip(alone, spread, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_checkpoints_hold_the_whole_model(saves: dict[str, Path], layout: str, tiny_config: ModelConfig) -> None:
    """Each weight and moment is stored once, under the model's own name, at its whole and true size."""
    folder = checkpoint.iteration_folder(saves[layout], 20)
    stored: Any = checkpoint._Reader(folder).read_metadata().state_dict_metadata
    expected = {
        f"{prefix}.{name}": shape
        for prefix in ("model", *(f"optimizer.{moment}" for moment in MOMENTS))
        for name, shape in shapes(tiny_config).items()
    }
    assert {name: entry.size for name, entry in stored.items()} == expected
    _, alone, _ = checkpoint.load_model_state(checkpoint.iteration_folder(saves["1,1,1"], 20))
    _, weights, _ = checkpoint.load_model_state(folder)
    for name, tensor in alone.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0)
