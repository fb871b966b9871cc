"""The data stages of a run of two shards, for tests of the stages that a recipe may leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snakmodel.chain import data_stages
from snakmodel.chain.context import Context
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Chain
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.input_files import FilePart, selection
from tests import toy


def data_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe of a run whose folder, base model and text lie below a folder."""
    files = {"tokenizer": {"file": str(folder / "base/tokenizer.model")}, "model": {"base": str(folder / "base")}}
    data = {"path": str(folder / "text"), **sections.pop("data", {})}
    return Recipe.model_validate(toy.recipe(data=data, **files, **sections))


def data_chain(folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> Chain:
    """The data stages of a run of two shards with these sections in the recipe."""
    monkeypatch.setattr("snakmodel.chain.context._pieces", lambda *_: 1)
    for name in ("base", "text"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "base/config.json").write_text(json.dumps({"vocab_size": 10}))
    (folder / "base/tokenizer.model").write_bytes(b"x")
    (folder / "text/a.txt").write_text("en\nto\n")
    recipe = data_recipe(folder, **sections)
    file = str(folder / "text/a.txt")
    parts = [[FilePart(file, "text", 0, 3)], [FilePart(file, "text", 3, 6)]]
    inputs = Inputs(folder / "run", {}, {})
    inputs.look(selection(folder / "text", None), parts, recipe.data)
    context = Context(Config(recipe=recipe, cluster=Cluster()), folder / "run", parts, inputs)
    stages = [*data_stages.text_stages(context), *data_stages.token_stages(context)]
    return Chain.of(folder / "run", stages)
