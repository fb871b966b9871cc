"""Whatever a run does and however ranks share the model, a stop request saves and a dead rank ends the others."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks, held_finetune
from tests.engine.tiny_run import flags, metrics, tensors

TP, PP = "--tensor_model_parallel_size", "--pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "dp 2": (2, ()),
    "tp 2": (2, (TP, 2, "--sequence_parallel")),
    "pp 2": (2, (PP, 2)),
    "tp 2 pp 2": (4, (TP, 2, PP, 2)),
}
SHORT = ("--train_iters", 12, "--global_batch_size", 4, "--eval_interval", 4, "--log_samples")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Path]:
    """The --save folder of 12 iterations without interruption or saves beside training, at every layout."""
    root = tmp_path_factory.mktemp("straight")
    folders = {name: root / name.replace(" ", "-") for name in LAYOUTS}
    for size in (2, 4):
        own = {name: more for name, (ranks, more) in LAYOUTS.items() if ranks == size}
        several = [flags(tiny_data, folders[name], *SHORT, "--no_async_save", *more) for name, more in own.items()]
        engine_ranks.run_several(root, several, size)
    return folders


@contextmanager
def held(folder: Path, argv: list[object], size: int, phase: str, rank: int) -> Iterator[Ranks]:
    """A run in which a rank has come to a phase and waits there until the body is done."""
    hold = folder / "held"
    hold.write_text(f"{phase} {rank}")
    ranks = Ranks(folder, argv, size, {"HELD": str(hold)}, main=held_finetune)
    ranks.wait_for(f"at {phase}", rank)
    yield ranks
    hold.unlink()


def published(save: Path) -> int:
    """The iteration that the tracker names."""
    return int((save / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_in_every_phase(tmp_path: Path, tiny_data: Path, straight: dict[str, Path], layout: str) -> None:
    """TERM or USR2 to any one rank in its first step, in an evaluation or while a checkpoint is being written ends all
    ranks with 75 and a checkpoint; KILL during a save ends the others; the run ends in the straight one's bytes."""
    size, more = LAYOUTS[layout]
    save = tmp_path / "save"
    argv = flags(tiny_data, save, *SHORT, "--save_interval", 3, *more)

    with held(tmp_path, argv, size, "step", size - 1) as ranks:
        os.kill(ranks.pid(size - 1), signal.SIGTERM)
    assert ranks.wait() == [75] * size, ranks.text()
    assert published(save) == 1

    with held(tmp_path, argv, size, "evaluate", 0) as ranks:
        os.kill(ranks.pid(0), signal.SIGUSR2)
    assert ranks.wait() == [75] * size, ranks.text()
    assert published(save) == 4

    with held(tmp_path, argv, size, "write", size - 1) as ranks:
        ranks.wait_for(" iteration        7/")
        assert published(save) == 4
        os.kill(ranks.pid(1), signal.SIGUSR2)
    assert ranks.wait() == [75] * size, ranks.text()
    assert f"saved {save / 'iter_0000006'}" in ranks.text()
    assert (stopped := published(save)) >= 7

    victim = 0 if layout == "tp 2" else size - 1
    with held(tmp_path, argv, size, "write", victim) as ranks:
        os.kill(ranks.pid(victim), signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL if rank == victim else 1 for rank in range(size)], ranks.text()
    assert published(save) == stopped
    assert list(save.glob(".iter_*.tmp-*"))

    codes, text = engine_ranks.run(tmp_path, argv, size)
    assert codes == [0] * size, text
    assert f"continuing from {save / f'iter_{stopped:07d}'}" in text
    assert not list(save.glob(".iter_*"))
    assert tensors(save, 12) == tensors(straight[layout], 12)
    assert metrics(save) == metrics(straight[layout])
    assert (save / "samples.jsonl").read_text() == (straight[layout] / "samples.jsonl").read_text()


def test_before_the_first_step(tmp_path: Path, tiny_data: Path) -> None:
    """A signal to one rank before the ranks have met ends all with 75; nothing has been trained, nothing is saved."""
    save = tmp_path / "save"
    ranks = Ranks(tmp_path, flags(tiny_data, save, *SHORT), 2, {})
    status = Path(f"/proc/{ranks.pid(1)}/status")
    until = time.monotonic() + engine_ranks.TIMEOUT
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (signal.SIGUSR2 - 1) & 1:
        assert time.monotonic() < until
        time.sleep(0.001)
    os.kill(ranks.pid(1), signal.SIGUSR2)
    assert ranks.wait() == [75, 75], ranks.text()
    assert "stopped after iteration 0 of 12" in ranks.text()
    assert [path.name for path in save.iterdir()] == ["hardware.json"]


def test_killed_while_the_last_save_is_waited_for(tmp_path: Path, tiny_data: Path) -> None:
    """A rank that dies before it has written ends the others, which wait for it before their exit."""
    argv = flags(tiny_data, tmp_path / "save", "--exit_interval", 3)
    with held(tmp_path, argv, 2, "write", 1) as ranks:
        ranks.wait_for(" iteration        3/")
        os.kill(ranks.pid(1), signal.SIGKILL)
        assert ranks.wait() == [1, -signal.SIGKILL], ranks.text()
    assert "stopped after" not in ranks.text()
