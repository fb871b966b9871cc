"""Where a run starts: what is taken over from a training checkpoint in --load, and how a schedule goes on."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_llm.checkpoint import folder as checkpoint
from tests.engine import engine_ranks
from tests.engine.tiny_run import flags, metrics, tensors


def state(save: Path, iteration: int) -> dict[str, Any]:
    """state.json of a checkpoint."""
    found: dict[str, Any] = json.loads((save / f"iter_{iteration:07d}" / "state.json").read_text())
    return found


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """One of a checkpoint's weights and its first moment."""
    tensors = {f"{kind}.layers.0.mlp.w1.weight": torch.empty(48, 32) for kind in ("model", "optimizer.exp_avg")}
    load_tensors(tensors, storage_reader=checkpoint._Reader(folder), planner=checkpoint._Planner(), no_dist=True)
    return {name.split(".layers")[0]: tensor for name, tensor in tensors.items()}


def encoded_state_of_seed(seed: int) -> str:
    """The random state that a run of this seed begins with, as state.json holds it."""
    torch.manual_seed(seed)
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The --save folder of a run that stopped after 6 iterations, with a random state that no seed here gives."""
    folder = tmp_path_factory.mktemp("earlier")
    codes, text = engine_ranks.run(folder, flags(tiny_data, folder / "save", "--exit_interval", 6), size=1)
    assert codes == [75], text
    path = folder / "save" / "iter_0000006" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rng": {"torch": encoded_state_of_seed(99)}}))
    return folder / "save"


def goes_on(tmp_path: Path, tiny_data: Path, earlier: Path, *more: object) -> Path:
    """The --save folder of a run that goes on from the earlier one by --load, for two iterations."""
    tmp_path.mkdir(exist_ok=True)
    argv = flags(tiny_data, tmp_path / "save", "--load", earlier, "--exit_interval", 2, *more)
    codes, text = engine_ranks.run(tmp_path, argv, size=1)
    assert codes == [75], text
    return tmp_path / "save"


def test_a_training_checkpoint_is_taken_over_whole(tmp_path: Path, tiny_data: Path, earlier: Path) -> None:
    """Moments, schedule, samples and random state go on as they were."""
    save = goes_on(tmp_path, tiny_data, earlier)
    found = state(save, 8)
    assert (found["consumed_train_samples"], found["optimizer_steps"], found["skipped_train_samples"]) == (64, 8, 0)
    assert found["rng"]["torch"] == encoded_state_of_seed(99)
    straight = tmp_path / "straight"
    assert engine_ranks.run(tmp_path, flags(tiny_data, straight, "--exit_interval", 8), size=1)[0] == [75]
    assert tensors(save, 8) == tensors(straight, 8)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_the_optimizer(tmp_path: Path, tiny_data: Path, earlier: Path) -> None:
    """--no_load_optim: samples and random state go on, Adam and the learning rate begin anew, with any schedule."""
    save = goes_on(tmp_path, tiny_data, earlier, "--no_load_optim", "--lr", "2e-3")
    found = state(save, 8)
    assert (found["consumed_train_samples"], found["optimizer_steps"], found["skipped_train_samples"]) == (64, 2, 48)
    assert found["rng"]["torch"] == encoded_state_of_seed(99)
    assert [record["learning_rate"] for record in metrics(save)] == pytest.approx([0.5e-3, 1e-3])
    still = goes_on(tmp_path / "still", tiny_data, earlier, "--no_load_optim", "--lr", "0")
    before, after = (stored(folder) for folder in (earlier / "iter_0000006", still / "iter_0000008"))
    assert torch.equal(before["model"], after["model"])
    assert not torch.equal(before["optimizer.exp_avg"], after["optimizer.exp_avg"])


def test_without_the_random_state(tmp_path: Path, tiny_data: Path, earlier: Path) -> None:
    """--no_load_rng: only the random state is the seed's; the updates are the same."""
    save = goes_on(tmp_path, tiny_data, earlier, "--no_load_rng")
    found = state(save, 8)
    assert (found["consumed_train_samples"], found["optimizer_steps"]) == (64, 8)
    assert found["rng"]["torch"] == encoded_state_of_seed(1234)
    other = goes_on(tmp_path / "other", tiny_data, earlier)
    assert tensors(save, 8) == tensors(other, 8)


def test_a_run_in_save_is_continued_whole(tmp_path: Path, tiny_data: Path, earlier: Path) -> None:
    """The two flags, which a requeued job still has, leave nothing out of the run's own checkpoint."""
    save = tmp_path / "save"
    shutil.copytree(earlier, save)
    argv = flags(tiny_data, save, "--load", earlier, "--no_load_optim", "--no_load_rng", "--exit_interval", 8)
    codes, text = engine_ranks.run(tmp_path, argv, size=1)
    assert codes == [75], text
    assert state(save, 8)["optimizer_steps"] == 8
    assert state(save, 8)["rng"]["torch"] == encoded_state_of_seed(99)


def test_wsd_over_a_restart(tmp_path: Path, tiny_data: Path) -> None:
    """Stopped in the middle of its last decay, a WSD run goes on at the learning rates of the formula."""
    save = tmp_path / "save"
    wsd = (
        "--lr_decay_style",
        "WSD",
        "--lr_wsd_decay_style",
        "minus_sqrt",
        "--lr_wsd_decay_iters",
        4,
        "--eval_iters",
        0,
    )
    argv = flags(tiny_data, save, *wsd, "--lr_warmup_iters", 2, "--train_iters", 8, "--min_lr", "1e-4")
    assert engine_ranks.run(tmp_path, [*argv, "--exit_interval", 6], size=1)[0] == [75]
    codes, text = engine_ranks.run(tmp_path, argv, size=1)
    assert codes == [0], text
    shares = [0.5, 1.0, 1.0, 1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]  # after the update of iteration 1 … 8
    expected = [0.5e-3, 1e-3, *(1e-4 + 9e-4 * share for share in shares[2:])]
    assert [record["learning_rate"] for record in metrics(save)] == pytest.approx(expected)
    codes, text = engine_ranks.run(tmp_path, [*argv, "--train_iters", 9, "--lr_wsd_decay_iters", 3], size=1)
    assert codes == [2]
    assert "wsd_samples 32 -> 24" in text
