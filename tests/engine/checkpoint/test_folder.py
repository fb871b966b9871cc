"""Checkpoints are whole or invisible, verified before use, and cannot run code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.checkpoint.saver import Saver
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights, shapes
from megatron_llm.optim.adamw import MOMENTS, build_optimizer
from megatron_llm.parallel.sharding import fill, parameters_by_name, shard
from megatron_llm.parallel.world import World
from run_contract.errors import Superseded, UserError
from tests.engine.tiny_run import save_arguments

Parts = tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]


def build(world: World, config: ModelConfig) -> Parts:
    """A sharded model's parameters, without values, and their optimizer."""
    with torch.device("meta"):
        model = Llama(config)
    shard(model, world, bf16=False)
    parameters = parameters_by_name([model])
    return parameters, build_optimizer(parameters.values(), betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)


@pytest.fixture(scope="module")
def parts(world: World, tiny_config: ModelConfig) -> Parts:
    """A sharded tiny model and its optimizer, whose moments are not all zero."""
    parameters, optimizer = build(world, tiny_config)
    fill(parameters, shapes(tiny_config), world, initial_weights(tiny_config, 1, 0.02))
    for state in optimizer.state.values():
        state["exp_avg"].fill_(0.25)
    return parameters, optimizer


def save(folder: Path, iteration: int, parts: Parts, world: World, config: ModelConfig) -> Path:
    """Save the parts as an iteration."""
    saver = Saver(save_arguments(folder).checkpoint, world, config)
    saver.begin(*parts, {"iteration": iteration})
    saver.finish()
    return checkpoint.iteration_folder(folder, iteration)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, parts: Parts, world: World, tiny_config: ModelConfig) -> None:
    """Every weight and moment is stored once, whole and unchanged, under its name; the tracker names the iteration."""
    folder = save(tmp_path, 20, parts, world, tiny_config)
    config, weights, state = checkpoint.load_model_state(folder)
    expected = dict(initial_weights(tiny_config, 1, 0.02))
    assert config == tiny_config
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert state["iteration"] == 20
    assert checkpoint.is_ours(folder)
    assert (tmp_path / checkpoint.TRACKER).read_text().strip() == "20"
    stored = checkpoint._Reader(folder).read_metadata().state_dict_metadata
    prefixes = ("model", *(f"optimizer.{moment}" for moment in MOMENTS))
    assert set(stored) == {f"{prefix}.{name}" for prefix in prefixes for name in expected}


def test_optimizer_moments_come_back(tmp_path: Path, parts: Parts, world: World, tiny_config: ModelConfig) -> None:
    """Loading fills a fresh model and optimizer with the saved values."""
    folder = save(tmp_path, 20, parts, world, tiny_config)
    parameters, optimizer = build(world, tiny_config)
    checkpoint.load(folder, parameters, optimizer)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, parts[0][name])
        assert (optimizer.state[parameter]["exp_avg"] == 0.25).all()


def test_equal_states_give_equal_bytes(tmp_path: Path, parts: Parts, world: World, tiny_config: ModelConfig) -> None:
    """No path, time or random number is in the files."""
    first, second = (save(tmp_path / name, 20, parts, world, tiny_config) for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == [".metadata", "__0_0.distcp", "state.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def truncate(folder: Path) -> None:
    """Cut a data file short."""
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    """Change one byte."""
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def forget(folder: Path) -> None:
    """Lose state.json."""
    (folder / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"), [(truncate, "bytes, state.json says"), (flip, "checksum"), (forget, "cannot be read")]
)
def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path,
    parts: Parts,
    world: World,
    tiny_config: ModelConfig,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    reason: str,
) -> None:
    """The newest that verifies is taken, whatever the tracker says."""
    good, bad = (save(tmp_path, iteration, parts, world, tiny_config) for iteration in (20, 40))
    assert checkpoint.latest_valid(tmp_path) == bad
    damage(bad)
    assert checkpoint.latest_valid(tmp_path) == good
    printed = capsys.readouterr().out
    assert f"{bad} is skipped" in printed
    assert reason in printed


class Hostile:
    """Pickles to a shell command."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.touched}",)


def test_a_forged_metadata_runs_nothing(tmp_path: Path, parts: Parts, world: World, tiny_config: ModelConfig) -> None:
    """A pickle that names anything but torch's metadata classes is refused before it acts."""
    folder = save(tmp_path, 20, parts, world, tiny_config)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=Hostile(tmp_path / "touched"))))
    with pytest.raises(UserError, match=r"names (posix|nt)\.system"):
        checkpoint.load_model_state(folder)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_of_objects_runs_nothing(tmp_path: Path, parts: Parts, tiny_config: ModelConfig) -> None:
    """Entries that torch would unpickle are refused."""
    objects = {"model.embedding.weight": Hostile(tmp_path / "touched")}
    torch_save(objects, storage_writer=checkpoint._Writer(tmp_path / "iter_0000001"))
    state = {"iteration": 1, "model_config": vars(tiny_config), "files": {}}
    (tmp_path / "iter_0000001" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"BytesStorageMetadata|other than tensors"):
        checkpoint.load_model_state(tmp_path / "iter_0000001")
    with pytest.raises(UserError, match=r"BytesStorageMetadata|other than tensors"):
        checkpoint.load(tmp_path / "iter_0000001", *parts)
    assert not (tmp_path / "touched").exists()


def test_a_superseded_attempt_publishes_nothing(
    tmp_path: Path, parts: Parts, world: World, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the claim is another's, neither the folder nor the tracker changes."""
    claim = tmp_path / "claim.json"
    claim.write_text('{"attempt": "9-0"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(claim))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "9-0")
    save(tmp_path, 20, parts, world, tiny_config)
    claim.write_text('{"attempt": "9-1"}')
    with pytest.raises(Superseded):
        save(tmp_path, 40, parts, world, tiny_config)
    assert not (tmp_path / "iter_0000040").exists()
    assert (tmp_path / checkpoint.TRACKER).read_text() == "20\n"
    checkpoint.remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim.json", "iter_0000020", checkpoint.TRACKER]
