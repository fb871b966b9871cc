"""Old checkpoints go only when they are ours, not to be kept, and the newest one verifies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.checkpoint.retention import prune
from megatron_llm.checkpoint.saver import Saver
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights, shapes
from megatron_llm.optim.adamw import build_optimizer
from megatron_llm.parallel.sharding import fill, parameters_by_name, shard
from megatron_llm.parallel.world import World
from run_contract.errors import Superseded
from tests.engine.tiny_run import save_arguments


@pytest.fixture
def saved(tmp_path: Path, world: World, tiny_config: ModelConfig) -> Path:
    """Checkpoints of the iterations 5, 10, …, 30, and one of Megatron's beside them."""
    with torch.device("meta"):
        model = Llama(tiny_config)
    shard(model, world, bf16=False)
    parameters = parameters_by_name([model])
    fill(parameters, shapes(tiny_config), world, initial_weights(tiny_config, 1, 0.02))
    optimizer = build_optimizer(parameters.values(), betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
    saver = Saver(save_arguments(tmp_path).checkpoint, world, tiny_config)
    for iteration in range(5, 31, 5):
        saver.begin(parameters, optimizer, {"iteration": iteration})
    saver.finish()
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    return tmp_path


def left(folder: Path) -> list[int]:
    """Iterations that are there; nothing else but the tracker is."""
    names = sorted(path.name for path in folder.iterdir() if path.name != checkpoint.TRACKER)
    return [int(name.removeprefix("iter_")) for name in names]


def test_what_stays(saved: Path) -> None:
    """All without --keep_last; then the newest and every twentieth; Megatron's own are never touched."""
    prune(saved, None, None)
    assert left(saved) == [1, 5, 10, 15, 20, 25, 30]
    prune(saved, 7, None)
    assert left(saved) == [1, 5, 10, 15, 20, 25, 30]
    prune(saved, 2, 10)
    assert left(saved) == [1, 10, 20, 25, 30]
    prune(saved, 1, 20)
    assert left(saved) == [1, 20, 30]
    assert checkpoint.latest_valid(saved) == saved / "iter_0000030"


def test_a_damaged_newest_one_keeps_the_others(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is deleted while the newest does not verify, and the reason is said."""
    damaged = saved / "iter_0000030" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    prune(saved, 1, None)
    assert left(saved) == [1, 5, 10, 15, 20, 25, 30]
    assert "no checkpoint is deleted" in capsys.readouterr().out


def test_a_superseded_attempt_deletes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt may be reading them."""
    (saved / checkpoint.TRACKER).with_name("claim.json").write_text('{"attempt": "another"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(saved / "claim.json"))
    with pytest.raises(Superseded):
        prune(saved, 1, None)
    (saved / "claim.json").unlink()
    assert left(saved) == [1, 5, 10, 15, 20, 25, 30]
