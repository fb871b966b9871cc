"""The real training script on a real cluster: asked to stop, it saves, is requeued and ends where it should."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from snakmodel.chain.stage import Stage, Task
from snakmodel.config.cluster import Resources

from ..engine.conftest import tiny_config, tiny_data
from .conftest import REPOSITORY, Cluster
from .toy_run import ToyRun

__all__ = ["tiny_config", "tiny_data"]

FLAGS = (
    "--num_layers 2 --hidden_size 32 --num_attention_heads 4 --num_attention_heads_kv 2 --ffn_hidden_size 48 "
    "--max_position_embeddings 64 --no_tie_embed_logits --seq_length 32 --micro_batch_size 2 --global_batch_size 8 "
    "--train_iters 300 --lr 1e-3 --lr_decay_style constant --log_interval 1 --eval_interval 9999 --eval_iters 0 "
    "--split 100,0,0 --num_workers 2"
)


@pytest.mark.slow
def test_training_saves_at_the_notice_and_goes_on(cluster: Cluster, tiny_data: Path) -> None:
    """Two ranks with live loading processes: USR2 by scancel, a checkpoint, a requeue, and the last iteration."""
    run = ToyRun.new(cluster, "training")
    data = run.folder / "data"
    data.mkdir()
    for path in tiny_data.parent.iterdir():
        shutil.copy(path, data)
    save = run.root / "checkpoints"
    script = str(REPOSITORY / "Megatron-LLM" / "finetune.py")
    argv = ("python", script, *FLAGS.split(), "--data_path", str(data / tiny_data.name), "--save", str(save))
    train = Stage(
        "train",
        (Task(argv, ("checkpoints/iter_0000300",)),),
        resources=Resources(ranks_per_node=2),
        resumable=True,
        progress="checkpoints/latest_checkpointed_iteration.txt",
    )
    run.submit([train])
    run.until(lambda: " iteration        5/" in run.log("train"), "five iterations", timeout=120)
    run.cluster.run(["scancel", "--signal=USR2", run.jobs()[0]])
    assert set(run.finish(timeout=240).values()) == {"COMPLETED"}
    assert run.story("train") == ["start", "requeue", "start", "done"], run.everything()
    assert "continuing from" in run.log("train")
    assert "started again after a signal" in run.told("train", done="1", failed="-", attempts="2")
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "300"
