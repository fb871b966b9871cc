"""The stages of deduplication as the recipe declares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snakmodel.chain import data_stages
from snakmodel.chain.context import Context
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.dedup.__main__ import parse_arguments
from snakmodel.dedup.flags import parameters_of
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.prepare.input_files import FilePart, selection
from tests import toy


def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **dedup: Any) -> dict[str, Stage]:
    """The data stages of a run of two shards with these keys in the recipe's section `dedup`."""
    monkeypatch.setattr("snakmodel.chain.context._pieces", lambda *_: 1)
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base/config.json").write_text(json.dumps({"vocab_size": 10}))
    (tmp_path / "base/tokenizer.model").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("en\nto\n")
    files = {"tokenizer": {"file": str(tmp_path / "base/tokenizer.model")}, "model": {"base": str(tmp_path / "base")}}
    recipe = Recipe.model_validate(toy.recipe(dedup={"ranges": 3, **dedup}, **files))
    parts = [[FilePart(str(tmp_path / "a.txt"), "s", 0, 3)], [FilePart(str(tmp_path / "a.txt"), "s", 3, 6)]]
    inputs = Inputs(tmp_path / "run", {}, {})
    inputs.look(selection(tmp_path, None), parts, recipe.data)
    context = Context(Config(recipe=recipe, cluster=Cluster()), tmp_path / "run", parts, inputs)
    return {stage.name: stage for stage in [*data_stages.text_stages(context), *data_stages.token_stages(context)]}


def test_recipe_keys_reach_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of the recipe's section arrives as the parameter of that name."""
    given: dict[str, Any] = {
        "num_perm": 32,
        "threshold": 0.7,
        "ngram": 3,
        "min_length": 4,
        "b": 5,
        "r": 6,
        "short_docs": "keep",
    }
    for extra in ({"hash_func": "xxh3"}, {"compat": "text-dedup-0.3.1"}):
        task = stages(tmp_path, monkeypatch, **given, **extra)["dedup-signatures"].tasks[1]
        args = parse_arguments(task.argv[3:])
        assert parameters_of(args) == Parameters(**given, **extra)
        assert (args.ranges, args.input.name) == (3, "shard-00001.arrow")


def test_verification_reads_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `verify_jaccard` the buckets also read what prepare wrote, and only then."""
    for verify in (False, True):
        stage = stages(tmp_path, monkeypatch, verify_jaccard=verify)["dedup-buckets"]
        args = parse_arguments(stage.tasks[2].argv[3:])
        assert (args.texts is not None) == verify
        assert ("prepare" in {source.stage for source in stage.tasks[2].inputs}) == verify


def test_nothing_waits_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is written beside the rest of the chain; its command has the flags it needs."""
    found = stages(tmp_path, monkeypatch)
    read = {source.stage for stage in found.values() for task in stage.tasks for source in task.inputs}
    assert "dedup-components" in read
    assert "dedup-report" not in read
    (task,) = found["dedup-report"].tasks
    args = parse_arguments(task.argv[3:])
    assert (args.shards, args.components.name, task.outputs) == (
        2,
        "components",
        ("dedup/report.png", "dedup/report.json"),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"b": 4}, "give both, or neither"),
        ({"b": 9, "r": 8}, "need num_perm of 72 or more"),
        ({"compat": "text-dedup-0.3.1", "hash_func": "xxh3"}, "0.3.1 has sha1 only"),
        ({"compat": "text-dedup-0.2"}, "text-dedup-0.4.0"),
    ],
)
def test_settings_that_contradict_each_other(wrong: dict[str, Any], message: str) -> None:
    """Bands that do not fit, and what a version does not have, are refused when the recipe is read."""
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(toy.recipe(dedup=wrong))
