"""The chain's index stage: it asks for the order that training reads, and is done again when that may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Input
from snakmodel.config import load as configuration
from snakmodel.launch.by_hand import plan_by_hand
from tests.conftest import PROJECT


@pytest.fixture
def planned(tmp_path: Path, demo_base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: changed training settings of the demonstration -> its plan."""
    monkeypatch.setenv("DEMO_BASE", str(demo_base))
    monkeypatch.setenv("SNAKMODEL_LOGS", str(tmp_path / "logs"))
    config = configuration.load(PROJECT / "recipes" / "demo.yaml", PROJECT / "cluster.yaml", STAGES)

    def plan(**training: object) -> RunPlan:
        changed = config.recipe.training.model_copy(update=training)
        recipe = config.recipe.model_copy(update={"training": changed})
        folder = tmp_path / "-".join(["run", *training])
        return plan_by_hand(config.model_copy(update={"recipe": recipe}), folder, STAGES, None)

    return plan


def flags(plan: RunPlan, stage: str) -> dict[str, str]:
    """The flags of a stage's one task: name -> value, empty for a switch."""
    words = plan.chain[stage].tasks[0].argv[2:]
    values = (*words[1:], "--")
    return {w: "" if v.startswith("--") else v for w, v in zip(words, values, strict=True) if w.startswith("--")}


def test_both_commands_name_the_same_samples(planned: Any) -> None:
    """Every flag of the index stage is one of training's too, with the same value: else training would not find it."""
    plan = planned()
    index, train = flags(plan, "index"), flags(plan, "train")
    assert index.items() <= train.items()
    order = {
        "data_path",
        "split",
        "seed",
        "seq_length",
        "train_iters",
        "global_batch_size",
        "eval_interval",
        "eval_iters",
    }
    assert set(index) == {f"--{name}" for name in order | {"index_path"}}
    assert not {name for name in train if name.endswith("_data_path") and name != "--data_path"}


def test_training_waits_for_it_and_verifies_it(planned: Any) -> None:
    """Training starts when the index is done, and its checksums are compared first."""
    chain = planned().chain
    assert chain["train"].waits["index"] == "all"
    assert Input("index") in chain["train"].tasks[0].inputs
    assert chain["index"].waits == {"merge-tokens": "all"}
    assert chain["index"].tasks[0].outputs == ("index",)


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "90,9,1"}, {"seq_length": 64}, {"train_iters": 240}])
def test_what_changes_the_order_changes_its_key(planned: Any, change: dict[str, object]) -> None:
    """Another seed, split, length or number of iterations is another index, of the same tokens."""
    before, after = planned().chain.stage_keys(), planned(**change).chain.stage_keys()
    assert before["merge-tokens"] == after["merge-tokens"]
    assert before["index"] != after["index"]
    assert before["train"] != after["train"]


def test_what_does_not_change_the_order_keeps_it(planned: Any) -> None:
    """Another learning rate trains again from the same index."""
    before, after = planned().chain.stage_keys(), planned(lr=1e-3).chain.stage_keys()
    assert before["index"] == after["index"]
    assert before["train"] != after["train"]
