"""What is told about a training before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from snakmodel.chain.disk_forecast import Forecast, forecast
from snakmodel.chain.engine_check import Facts, device_of
from snakmodel.chain.training_sum import disk, gpu_hours, remembered, tokens_and_epochs
from snakmodel.config.cluster import Cluster, Resources
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.run.paths import RunPaths
from tests import toy


def recipe(**changes: object) -> Recipe:
    """A recipe of 100 iterations of 8 samples of 10 tokens, half of whose documents are for training."""
    training = {"train_iters": 100, "global_batch_size": 8, "seq_length": 10, "lr": 0.1, "save_interval": 10}
    return Recipe.model_validate(toy.recipe(training=training | {"split": "50,25,25"} | changes))


def test_tokens_and_epochs(tmp_path: Path) -> None:
    """Epochs are estimated from the raw text, and exact when the corpus is tokenised; above four there is a warning."""
    first = "training: 100 iterations of 8 samples of 10 tokens, 8,000 tokens"
    assert tokens_and_epochs(recipe(), tmp_path, None) == [first]
    estimated = "epochs: 1.6 of the training part of the corpus (about 10,000 tokens, estimated from the raw text)"
    assert tokens_and_epochs(recipe(), tmp_path, 30_000) == [first, estimated]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "corpus_text_document.json").write_text(json.dumps({"tokens": 320}))
    lines = tokens_and_epochs(recipe(), tmp_path, 30_000)
    assert lines[1] == "epochs: 50.0 of the training part of the corpus (320 tokens)"
    assert lines[2].startswith("warning: the corpus would be repeated 50 times. Above 4 epochs")


def test_status_says_it_again(tmp_path: Path) -> None:
    """Of a run that was started: what it costs as said then, and the epochs of the tokens that there are by now."""
    paths = RunPaths(tmp_path)
    assert remembered(paths) == []
    paths.frozen.write_text(yaml.safe_dump({"recipe": recipe().model_dump(mode="json")}))
    [first] = remembered(paths)
    assert first.startswith("training: 100 iterations")
    paths.training_sum.write_text(json.dumps({"text_bytes": 30_000, "costs": ["disk: 3 GB at most"]}))
    assert [line.partition(":")[0] for line in remembered(paths)] == ["training", "epochs", "disk"]
    assert "estimated" in remembered(paths)[1]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "corpus_text_document.json").write_text(json.dumps({"tokens": 8000}))
    assert remembered(paths)[1] == "epochs: 2.0 of the training part of the corpus (8,000 tokens)"
    paths.training_sum.write_text("half a li")
    assert [line.partition(":")[0] for line in remembered(paths)] == ["training", "epochs"]


@pytest.mark.parametrize(
    ("flops", "shown"), [(312e12 * 0.4 * 3600, "about 1 on"), (312e12 * 0.4 * 3600 * 12345, "12,345")]
)
def test_gpu_hours(flops: float, shown: str) -> None:
    """Model FLOPs over 40 % of the peak; without a known peak nothing is said."""
    line = gpu_hours(Facts(10, flops, 312.0), "a100")
    assert shown in line
    assert line.endswith("on A100, at 40% of its peak of 312 TFLOP/s")
    assert gpu_hours(Facts(10, flops, None), "abacus") == ""


@pytest.mark.parametrize(("gres", "name"), [("gpu:h100:4", "h100"), ("gpu:4", "a100"), (None, "a100")])
def test_the_gpu_that_cluster_yaml_names(gres: str | None, name: str) -> None:
    """The type in `gres`, else an A100."""
    assert device_of(Resources(gres=gres)) == name


def test_disk_of_checkpoints() -> None:
    """Ten checkpoints that nobody asked to keep are pointed out, and keep_last shrinks the forecast."""
    every = Config(recipe=recipe(), cluster=Cluster())
    needs = forecast(every, {}, 10**9, 32000, 4)
    assert needs.parts["checkpoints"] == 12 * 10**9 * 11
    lines = disk(every.recipe, needs)
    assert lines[0].endswith("GB at most, 132.0 GB of it for checkpoints")
    assert lines[1].startswith("note: all 10 checkpoints are kept; training.keep_last: 2 would need 36.0 GB")
    fewer = Config(recipe=recipe(keep_last=2, keep_every=50), cluster=Cluster())
    assert forecast(fewer, {}, 10**9, 32000, 4).parts["checkpoints"] == 12 * 10**9 * 4  # 50, 90, 100, one half-written
    assert len(disk(fewer.recipe, needs)) == 1
    assert len(disk(every.recipe, Forecast({"checkpoints": 1, "arrow": 2}))) == 1


def test_checkpoints_that_are_exported_stay(tmp_path: Path) -> None:
    """An exported iteration that keep_last might delete first is refused; keep_every alone is, too."""
    with pytest.raises(ValidationError, match="20 may be deleted before it is exported"):
        Recipe.model_validate({**recipe(keep_last=2).model_dump(), "export": {"iterations": [20, 100]}})
    Recipe.model_validate({**recipe(keep_last=2, keep_every=20).model_dump(), "export": {"iterations": [20, 100]}})
    with pytest.raises(ValidationError, match="keep_every is 5 but keep_last is missing"):
        recipe(keep_every=5)
