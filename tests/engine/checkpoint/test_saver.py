"""Checkpoints are written beside training, one at a time, from a copy; what fails is told, and leaves nothing."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.checkpoint import saver
from megatron_llm.checkpoint.saver import BUSY, FAILED, IDLE, WRITTEN, Saver
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights, shapes
from megatron_llm.optim.adamw import build_optimizer
from megatron_llm.parallel.sharding import fill, parameters_by_name, shard
from megatron_llm.parallel.world import World
from megatron_llm.process.errors import SaveFailed
from run_contract.errors import EXIT_NO_ROOM, Superseded, UserError
from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks
from tests.engine.tiny_run import flags, metrics, save_arguments, tensors


class Run:
    """A tiny model in training and its saver."""

    def __init__(self, save: Path, world: World, config: ModelConfig, *more: object) -> None:
        self.save = save
        with torch.device("meta"):
            model = Llama(config)
        shard(model, world, bf16=False)
        self.parameters = parameters_by_name([model])
        fill(self.parameters, shapes(config), world, initial_weights(config, 1, 0.02))
        values = self.parameters.values()
        self.optimizer = build_optimizer(values, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
        self.saver = Saver(save_arguments(save, *more).checkpoint, world, config)

    def begin(self, iteration: int) -> None:
        """Begin to save the model as it is."""
        self.saver.begin(self.parameters, self.optimizer, {"iteration": iteration})

    @torch.no_grad()
    def train(self) -> None:
        """Change all that is saved."""
        for parameter in self.parameters.values():
            parameter.add_(1.0)
            self.optimizer.state[parameter]["exp_avg"].add_(1.0)

    def names(self) -> list[str]:
        """What is in the folder."""
        return sorted(path.name for path in self.save.iterdir()) if self.save.exists() else []


@pytest.fixture
def run(tmp_path: Path, world: World, tiny_config: ModelConfig) -> Run:
    """A run that has saved nothing."""
    return Run(tmp_path / "save", world, tiny_config)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the body no save writes anything."""
    go_on = threading.Event()
    write = checkpoint.write

    def waiting(*inputs: Any) -> None:
        go_on.wait()
        write(*inputs)

    monkeypatch.setattr(checkpoint, "write", waiting)
    try:
        yield
    finally:
        go_on.set()


def test_a_save_is_of_when_it_began(
    tmp_path: Path, run: Run, world: World, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on before anything is written, and the checkpoint has the bytes of one that it waited for; nothing
    is published before the ranks have agreed on it. A second save, into the same memory, is of its own time."""
    plain = Run(tmp_path / "plain", world, tiny_config, "--no_async_save")
    plain.begin(1)
    assert plain.names() == ["iter_0000001", checkpoint.TRACKER], "nothing more needs to be waited for"
    with held(monkeypatch):
        run.begin(1)
        run.train()
        assert run.saver.status() == BUSY
    assert run.saver.job
    run.saver.job.result()
    assert run.saver.status() == WRITTEN
    assert run.names() == [f".iter_0000001.tmp-pid{os.getpid()}"]
    run.saver.advance(BUSY)
    assert run.saver.status() == WRITTEN, "another rank was not ready"
    run.saver.advance(WRITTEN)
    assert run.names() == ["iter_0000001", checkpoint.TRACKER]
    assert tensors(run.save, 1) == tensors(plain.save, 1)
    run.begin(2)
    run.saver.finish()
    plain.train()
    plain.begin(2)
    assert run.saver.status() == IDLE
    assert tensors(run.save, 2) == tensors(plain.save, 2) != tensors(plain.save, 1)


def test_one_save_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new save waits until the one before is published."""
    with held(monkeypatch):
        run.begin(1)
        second = threading.Thread(target=run.begin, args=(2,))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert run.names() == [f".iter_0000001.tmp-pid{os.getpid()}"]
    second.join()
    assert "iter_0000001" in run.names()
    assert (run.save / checkpoint.TRACKER).read_text() == "1\n"
    run.saver.finish()
    assert run.names() == ["iter_0000001", "iter_0000002", checkpoint.TRACKER]


def test_a_failed_save_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that grow too large for the system, or break off, are one error at the next boundary; then all is as it
    was and the next save succeeds."""
    run.begin(1)
    run.saver.finish()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        run.begin(2)
        assert run.saver.job
        run.saver.job.exception()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.saver.status() == FAILED
    with pytest.raises(UserError, match=r"iter_0000002 could not be saved: rank 0: .*File too large"):
        run.saver.advance(FAILED)
    assert run.names() == ["iter_0000001", checkpoint.TRACKER]

    def broken(*_inputs: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "digests", broken)
        run.begin(2)
        with pytest.raises(SaveFailed, match=r"iter_0000002 could not be saved: .*Input/output error"):
            run.begin(3)
    assert run.names() == ["iter_0000001", checkpoint.TRACKER]
    assert (run.save / checkpoint.TRACKER).read_text() == "1\n"
    run.begin(4)
    run.saver.finish()
    assert checkpoint.latest_valid(run.save) == run.save / "iter_0000004"


def test_files_that_rank_0_does_not_see(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the nodes do not share is no checkpoint: refused, with the reason."""
    digests = checkpoint.digests
    monkeypatch.setattr(checkpoint, "digests", lambda *inputs: {**digests(*inputs), "__1_0.distcp": (7, "")})
    run.begin(1)
    with pytest.raises(
        UserError, match=r"__1_0.distcp, which another rank wrote; --save must be a folder that all nodes share"
    ):
        run.saver.finish()
    assert run.names() == []


def test_a_checkpoint_that_is_there_stays(run: Run) -> None:
    """One of the same name that verifies is kept, a damaged one replaced; the tracker names it either way."""
    run.begin(1)
    run.begin(2)
    run.saver.finish()
    before = tensors(run.save, 1)
    run.train()
    run.begin(1)
    run.saver.finish()
    assert tensors(run.save, 1) == before
    assert (run.save / checkpoint.TRACKER).read_text() == "1\n"
    (run.save / "iter_0000001" / "__0_0.distcp").write_bytes(b"")
    run.begin(1)
    run.saver.finish()
    assert tensors(run.save, 1) != before
    assert checkpoint.problem(run.save / "iter_0000001") is None
    assert run.names() == ["iter_0000001", "iter_0000002", checkpoint.TRACKER]


def test_superseded_while_writing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that loses its claim after a save began does not publish it."""
    claim = tmp_path / "claim.json"
    claim.write_text('{"attempt": "9-0"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(claim))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "9-0")
    run.begin(1)
    assert run.saver.job
    run.saver.job.result()
    claim.write_text('{"attempt": "9-1"}')
    with pytest.raises(Superseded, match="attempt 9-0 was replaced by 9-1"):
        run.saver.finish()
    assert run.names() == []


def test_no_room(tmp_path: Path, world: World, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, older checkpoints that need not be kept make room; else it is said how much is
    needed. The forecast is the true size, rounded up a little."""
    run = Run(tmp_path / "save", world, tiny_config)
    run.begin(1)
    run.begin(2)
    run.saver.finish()
    needed = checkpoint.needed_bytes(tiny_config, 1)
    taken = sum(path.stat().st_size for path in (run.save / "iter_0000001").iterdir())
    assert 0.9 * needed < taken - (run.save / "iter_0000001" / "state.json").stat().st_size <= needed

    monkeypatch.setattr(saver, "free_bytes", lambda folder: needed - 2 + len(list(folder.glob("iter_*"))))
    size = f"{needed / 1e6:.2f} MB"
    assert run.saver.forecast().startswith(f"a checkpoint takes {size}; ")
    run.begin(3)
    run.saver.finish()
    monkeypatch.setattr(saver, "free_bytes", lambda folder: needed - len(list(folder.glob("iter_*"))))
    assert run.saver.forecast().startswith(f"warning: a checkpoint takes {size}; ")
    with pytest.raises(UserError, match=f"needs {size} and {size} are free; nothing was written, iter_0000003 stays"):
        run.begin(4)
    assert run.names() == ["iter_0000001", "iter_0000002", "iter_0000003", checkpoint.TRACKER]
    frugal = Run(tmp_path / "save", world, tiny_config, "--keep_last", 1)
    monkeypatch.setattr(saver, "free_bytes", lambda folder: needed + 1 - len(list(folder.glob("iter_*"))))
    frugal.begin(4)
    frugal.saver.finish()
    assert run.names() == ["iter_0000004", checkpoint.TRACKER]


def limited(argv: Any) -> None:
    """finetune.py, in which rank 1 can write only small files."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    engine_ranks._finetune(argv)


def test_a_rank_that_cannot_write(tmp_path: Path, tiny_data: Path) -> None:
    """All ranks end with the same code and one line that names it; nothing is published."""
    save = tmp_path / "save"
    ranks = Ranks(tmp_path, flags(tiny_data, save, "--save_interval", 2), 2, {}, main=limited)
    assert ranks.wait() == [EXIT_NO_ROOM] * 2, ranks.text()
    errors = [line for line in ranks.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "iter_0000002 could not be saved: rank 1: " in errors[0]
    assert "File too large" in errors[0]
    assert "Traceback" not in ranks.text()
    assert ranks.text(1) == ""
    assert sorted(path.name for path in save.iterdir()) == ["hardware.json", "metrics.jsonl"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()}); needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk(tmp_path: Path, tiny_data: Path, small_disk: Path) -> None:
    """The run ends before the checkpoint that does not fit, keeps the last one, and goes on from it with more room."""
    argv = flags(tiny_data, small_disk / "save", "--save_interval", 5)
    ranks = Ranks(tmp_path, argv, 2, {})
    assert ranks.wait() == [EXIT_NO_ROOM] * 2, ranks.text()
    lines = ranks.text().splitlines()
    assert any(line.startswith("a checkpoint takes 0.95 MB; ") for line in lines), lines
    assert f"error: --save {small_disk / 'save'}: a checkpoint needs 0.95 MB and " in lines[-1]
    assert "nothing was written, iter_0000010 stays the last one" in lines[-1]
    assert sorted(path.name for path in (small_disk / "save").glob("*iter_*")) == ["iter_0000005", "iter_0000010"]
    codes, text = engine_ranks.run(tmp_path, [*argv, "--keep_last", 1])
    assert codes == [0, 0], text
    assert "continuing from" in text
    assert [path.name for path in (small_disk / "save").glob("*iter_*")] == ["iter_0000040"]
    assert [r["iteration"] for r in metrics(small_disk / "save") if "lm_loss" in r] == list(range(1, 41))
