"""The optional stages on documents: which are there, what they read and write, and what their keys depend on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from run_contract.errors import UserError
from snakmodel.chain.build import STAGES, left_out, stages_of
from snakmodel.chain.context import Context
from snakmodel.chain.filter_stages import check_filter, filter_stages
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.plan import _refuse_left_out
from snakmodel.chain.stage import Chain, Stage
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.filter.__main__ import make_parser
from snakmodel.filter.steps import _parsed
from snakmodel.prepare.kept_columns import KeptColumn
from tests import toy
from tests.chain.optional_stages import data_chain, data_recipe
from tests.filter.fasttext_files import write_model

COMMAND = {"name": "mine", "command": "x {input} {output}"}


def reads(chain: Chain, stage: str) -> list[set[str]]:
    """The stages that each task of a stage reads."""
    return [{one.stage for one in task.inputs} for task in chain[stage].tasks]


def steps_of(chain: Chain, stage: str, index: int = 0) -> list[argparse.Namespace]:
    """The steps in the command line of a task, as the command reads them."""
    argv = chain[stage].tasks[index].argv
    return _parsed(argv[argv.index("+") :])


def argument(argv: tuple[str, ...], flag: str) -> str:
    """The word after a flag."""
    return argv[argv.index(flag) + 1]


def changed(one: Chain, other: Chain) -> set[str]:
    """The stages with other keys."""
    return {name for name, keys in one.keys.items() if other.keys[name] != keys}


def after(chain: Chain, stage: str) -> set[str]:
    """A stage and all that read from it, directly or not."""
    found = {stage}
    for one in chain.stages:
        if found & {each.stage for task in one.tasks for each in task.inputs}:
            found.add(one.name)
    return found


def test_frequent_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dedup.lines` adds the stages that count, find and remove; the tokens are made of their shards."""
    plain = data_chain(tmp_path, monkeypatch)
    chain = data_chain(tmp_path, monkeypatch, dedup={"lines": 100, "ranges": 3})
    assert {one.name for one in chain.stages} - {one.name for one in plain.stages} == {
        "count-lines", "frequent-lines", "final-filter"
    }  # fmt: skip
    assert [len(chain[name].tasks) for name in ("count-lines", "frequent-lines", "final-filter")] == [2, 3, 2]
    assert reads(chain, "count-lines") == [{"dedup-filter"}] * 2
    assert reads(chain, "frequent-lines") == [{"count-lines"}] * 3
    assert reads(chain, "final-filter") == [{"dedup-filter", "frequent-lines"}] * 2
    for stage in ("tokenize", "export-text"):
        assert reads(chain, stage) == [{"final-filter"}] * 2
        assert any("filtered/shard-00001.arrow" in word for word in chain[stage].tasks[1].argv)
        assert reads(plain, stage) == [{"dedup-filter"}] * 2
    assert argument(chain["frequent-lines"].tasks[2].argv, "--min") == "101"
    (step,) = steps_of(chain, "final-filter")
    assert (step.step, step.ranges) == ("lines", 3)


def test_decontamination_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`decontaminate` adds one pass and its report."""
    (tmp_path / "eval.jsonl").write_text("{}\n")
    against = {"against": [str(tmp_path / "eval.jsonl")], "ngram": 8, "fields": ["question", "answer"], "mode": "cut"}
    chain = data_chain(tmp_path, monkeypatch, decontaminate=against)
    new = {one.name for one in chain.stages} - {one.name for one in data_chain(tmp_path, monkeypatch).stages}
    assert new == {"final-filter", "contamination-report"}
    assert reads(chain, "final-filter") == [{"dedup-filter"}] * 2
    assert reads(chain, "contamination-report") == [{"final-filter"}]
    (step,) = steps_of(chain, "final-filter")
    assert (step.step, step.ngram, step.fields, step.mode) == ("decontaminate", 8, ["question", "answer"], "cut")
    (tmp_path / "eval.jsonl").unlink()
    with pytest.raises(UserError, match=r"decontaminate\.against: there is no file .*eval\.jsonl\. Correct the path"):
        data_chain(tmp_path, monkeypatch, decontaminate=against)


def test_own_commands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command reads the shards of the one before it, and deduplication those of the last."""
    other = {**COMMAND, "name": "other"}
    chain = data_chain(tmp_path, monkeypatch, data={"custom": [COMMAND, other]})
    assert "filter" not in chain.keys
    assert reads(chain, "custom-mine") == [{"prepare"}] * 2
    assert reads(chain, "custom-other") == [{"custom-mine"}] * 2
    assert reads(chain, "dedup-signatures") == [{"custom-other"}] * 2
    task = chain["custom-other"].tasks[1]
    assert argument(task.argv, "--input").endswith("run/custom/mine/shard-00001.arrow")
    assert task.outputs == ("custom/other/shard-00001.arrow", "custom/other/shard-00001.json")
    args = make_parser().parse_args(task.argv[3:])
    assert (args.name, args.command) == ("other", "x {input} {output}")
    assert any("custom/other/shard-00001.arrow" in word for word in chain["dedup-signatures"].tasks[1].argv)
    names = stages_of(data_recipe(tmp_path, data={"custom": [COMMAND, other]}))
    assert names[names.index("filter") :][:4] == ["filter", "custom-mine", "custom-other", "dedup-signatures"]


def test_a_filter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are one command, whose words are those of the recipe; what is rejected is an output too."""
    settings: dict[str, Any] = {
        "language": {"keep": ["da", "no"], "min_probability": 0, "unit": "line", "rejected": True},
        "quality": {"mode": "remove", "language": "de", "clean_lines": True},
        "pii": {"kinds": ["email", "phone"], "region": ["DK"]},
        "where": "-1<source",
    }
    chain = data_chain(tmp_path, monkeypatch, filter=settings)
    task = chain["filter"].tasks[1]
    assert reads(chain, "filter") == [{"prepare"}] * 2
    assert reads(chain, "dedup-signatures") == [{"filter"}] * 2
    assert task.outputs == (
        "filter/shard-00001.arrow", "filter/shard-00001.json", "filter/rejected/shard-00001.arrow"
    )  # fmt: skip
    language, quality, pii, where = steps_of(chain, "filter", 1)
    assert (language.keep, language.min_probability, language.unit, language.mark) == (["da", "no"], 0.0, "line", False)
    assert str(language.rejected).endswith("run/filter/rejected/shard-00001")
    assert (quality.mode, quality.language, quality.clean_lines) == ("remove", "de", True)
    assert (pii.kinds, pii.region, pii.national) == (["email", "phone"], ["DK"], [])
    assert where.condition == "-1<source"


def test_a_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card reads the counts of all stages that there are, and nothing else changes."""
    plain = data_chain(tmp_path, monkeypatch)
    chain = data_chain(tmp_path, monkeypatch, data_card={})
    assert set(chain.keys) - set(plain.keys) == {"data-card"}
    assert changed(plain, chain) == set()
    assert reads(chain, "data-card") == [{"prepare", "dedup-filter", "dedup-report", "merge-tokens"}]
    full = data_chain(
        tmp_path, monkeypatch, data_card={}, filter={"pii": {}}, data={"custom": [COMMAND]}, dedup={"lines": 5}
    )
    assert reads(full, "data-card") == [
        {"prepare", "filter", "custom-mine", "final-filter", "dedup-report", "merge-tokens"}
    ]
    argv = full["data-card"].tasks[0].argv
    assert argv[argv.index("--before") :] == ("--before", "filter", "custom/mine", "--after", "filtered")
    titled = data_chain(tmp_path, monkeypatch, data_card={"title": "x"})
    assert changed(chain, titled) == {"data-card"}


def test_files_that_change_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another content of a file from outside the run changes the stage that reads it and all after it, and no other."""
    model, thresholds, items = tmp_path / "m.bin", tmp_path / "t.yaml", tmp_path / "eval.jsonl"
    write_model(model)
    thresholds.write_text("gopher_min_words: 5\n")
    items.write_text('{"question": "en"}\n')
    sections: dict[str, Any] = {
        "filter": {"language": {"keep": "da", "model": str(model)}, "quality": {"thresholds": str(thresholds)}},
        "decontaminate": {"against": [str(items)]},
        "dedup": {"lines": 5},
        "data_card": {},
    }
    before = data_chain(tmp_path, monkeypatch, **sections)
    assert changed(before, data_chain(tmp_path, monkeypatch, **sections)) == set()
    for path, stage in ((model, "filter"), (thresholds, "filter"), (items, "final-filter")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b" ")
        assert changed(before, data_chain(tmp_path, monkeypatch, **sections)) == after(before, stage)
        path.write_bytes(content)
        assert changed(before, data_chain(tmp_path, monkeypatch, **sections)) == set()
    assert not {"prepare", "dedup-filter"} & after(before, "final-filter")
    assert {"filter", "dedup-filter", "tokenize", "data-card", "index"} <= after(before, "filter")


@pytest.mark.parametrize(("key", "name"), [("filter.language.model", "m.bin"), ("filter.quality.thresholds", "t.yaml")])
def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str) -> None:
    """The key is named."""
    _, step, setting = key.split(".")
    values = {setting: str(tmp_path / name), **({"keep": "da"} if step == "language" else {})}
    with pytest.raises(UserError, match=rf"{key}: there is no file .*{name}\. Correct the path, or leave the key out"):
        data_chain(tmp_path, monkeypatch, filter={step: values})


def test_settings_that_change_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed setting changes its stage and all after it; the keys of a plain run know no setting at all."""
    before = data_chain(tmp_path, monkeypatch, filter={"where": "source == 'a'"}, dedup={"lines": 5})
    other = data_chain(tmp_path, monkeypatch, filter={"where": "source == 'b'"}, dedup={"lines": 5})
    assert changed(before, other) == after(before, "filter")
    other = data_chain(tmp_path, monkeypatch, filter={"where": "source == 'a'"}, dedup={"lines": 6})
    assert changed(before, other) == after(before, "frequent-lines")


LEFT_OUT = {
    "collect": "a key `data.collect`",
    "filter": "a section `filter` with a step",
    "count-lines": "a key `dedup.lines`",
    "frequent-lines": "a key `dedup.lines`",
    "final-filter": "a key `dedup.lines` or a section `decontaminate`",
    "contamination-report": "a section `decontaminate`",
    "data-card": "a section `data_card`",
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_stages_that_the_recipe_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Who asks for one is told what the recipe has to say."""
    chain, recipe = data_chain(tmp_path, monkeypatch), data_recipe(tmp_path)
    assert left_out(recipe) == LEFT_OUT
    for selected, again in (([name], []), (STAGES, [name])):
        with pytest.raises(UserError) as error:
            _refuse_left_out(chain, recipe, selected, again)
        assert f"{name}: left out, as the recipe says. Change the recipe ({name} needs {LEFT_OUT[name]})" in str(
            error.value
        )
    _refuse_left_out(chain, recipe, STAGES, [])


def test_steps_are_checked_when_planning(tmp_path: Path) -> None:
    """Wrong settings are refused with the section of the recipe, and kept columns may be named."""
    kept = [KeptColumn.of("score=float")]
    check_filter(data_recipe(tmp_path, data={"keep": ["score"]}, filter={"where": "score > 1 and id != 'x'"}), kept)
    with pytest.raises(UserError, match=r"filter: where: .*names the column 'score'"):
        check_filter(data_recipe(tmp_path, filter={"where": "score > 1"}), [])
    with pytest.raises(UserError, match=r"filter: .*'XX'"):
        check_filter(data_recipe(tmp_path, filter={"pii": {"region": ["XX"]}}), [])
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"gopher_min_word": 5}))
    with pytest.raises(UserError, match=r"filter: .*gopher_min_word"):
        check_filter(data_recipe(tmp_path, filter={"quality": {"thresholds": str(tmp_path / "t.yaml")}}), [])
    with pytest.raises(UserError, match=r"decontaminate: .*eval\.jsonl"):
        check_filter(data_recipe(tmp_path, decontaminate={"against": [str(tmp_path / "eval.jsonl")]}), [])
    taken = {"keep": [{"quality": "float"}]}
    with pytest.raises(UserError, match=r"filter: .*has a column 'quality' already"):
        check_filter(data_recipe(tmp_path, data=taken, filter={"quality": {}}), [KeptColumn.of("quality=float")])


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
