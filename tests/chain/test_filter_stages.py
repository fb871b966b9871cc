"""The optional stages on text: which files from outside the run stand in their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snakmodel.chain.context import Context
from snakmodel.chain.filter_stages import filter_stages
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from tests import toy


def stages(root: Path, inputs: Inputs | None = None, **recipe: Any) -> dict[str, Stage]:
    """The optional stages before deduplication of a run of two shards."""
    config = Config(recipe=Recipe.model_validate(toy.recipe(**recipe)), cluster=Cluster())
    context = Context(config, root, [[], []], inputs or Inputs(root, {}, {}))
    return {stage.name: stage for stage in filter_stages(context)}


def custom(command: str) -> dict[str, Any]:
    """A recipe's section `data` with one command."""
    return {"path": "text", "custom": [{"name": "mine", "command": f"{command} {{input}} {{output}}"}]}


def test_files_of_a_command_stand_in_its_keys(tmp_path: Path) -> None:
    """A changed script and a changed model change what stands in the keys; other words, folders and programs do not."""
    script, model = tmp_path / "my script.py", tmp_path / "model.bin"
    script.write_text("1\n")
    model.write_text("a")
    command = f"/bin/sh '{script}' --model={model} --folder {tmp_path} --nothing /no/such/file"
    inputs = Inputs(tmp_path / "run", {}, {})

    def outside() -> list[Any]:
        return [task.outside for task in stages(tmp_path / "run", inputs, data=custom(command))["custom-mine"].tasks]

    first = outside()
    assert first[0] == first[1]
    assert set(inputs.others) == {str(script), str(model)}
    assert outside() == first
    for file in (script, model):
        before = outside()
        file.write_text("another\n")
        assert outside() != before
        assert f"{file} is different" in inputs.changes
    assert stages(tmp_path / "run", data=custom("nothing"))["custom-mine"].tasks[0].outside is None
