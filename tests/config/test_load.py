"""cluster.yaml and recipes: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from megatron_llm.flags import parser as flags_parser
from run_contract.errors import UserError
from snakmodel.chain.build import STAGES
from snakmodel.chain.context import Context
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.model_stages import _training_flags
from snakmodel.config import load as config
from snakmodel.config.sections import PROJECT
from tests import toy


def load(folder: Path, recipe: dict[str, Any], cluster: dict[str, Any] | None = None) -> config.Config:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster or {}))
    return config.load(folder / "recipe.yaml", folder / "cluster.yaml", STAGES)


def with_training(**changes: Any) -> dict[str, Any]:
    recipe = toy.recipe()
    recipe["training"] = {**recipe["training"], **changes}
    return recipe


def test_shipped_files_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe of the project validates together with its cluster.yaml, and holds the published numbers."""
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("BASE", "/base")
    found = {path.stem: config.load(path, PROJECT / "cluster.yaml", STAGES) for path in PROJECT.glob("recipes/*.yaml")}
    assert {"demo", "snakmodel-7b"} <= set(found)
    training = found["snakmodel-7b"].recipe.training
    assert (training.train_iters, training.global_batch_size, training.lr, training.min_lr) == (12500, 512, 15e-6, 5e-8)
    assert (training.tensor_parallel, training.pipeline_parallel) == (4, 1)
    assert found["demo"].cluster.resources("train").ranks == 2


def test_unknown_key_names_it_the_nearest_and_the_valid_ones(tmp_path: Path) -> None:
    """A mistyped key is refused with its full name, the nearest match and all valid names."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, with_training(train_iterz=5))
    message = str(caught.value)
    assert "recipe.yaml: training.train_iterz: unknown key" in message
    assert "Did you mean train_iters?" in message
    assert "global_batch_size" in message


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "an empty section": ({"filter": None}, "filter: there is nothing below this key. Write keys such as language, "),
    "a word for a section": (
        {"filter": {"language": "da"}}, "filter.language: found 'da', expected keys such as keep, min_probability"),
    "a word for a list": (
        {"filter": {"pii": {"region": "DK"}}}, "filter.pii.region: found 'DK', expected a list, such as [DK]."),
    "a list for a path": ({"data": {"path": ["text"]}}, "data.path: found ['text'], expected one path."),
    "true for a number": ({"dedup": {"lines": True}}, "dedup.lines: found True, expected a number"),
    "a number for a language": ({"filter": {"language": {"keep": [3]}}}, "filter.language.keep.0: found 3."),
    "a key of an item of a list": (
        {"data": {"path": "text", "custom": [{"nmae": "a"}]}}, "data.custom.0.nmae: unknown key. Did you mean name"),
    "a word for an item of a list": (
        {"data": {"path": "text", "custom": ["a"]}}, "data.custom.0: found 'a', expected keys such as name, command"),
    "a key of a named item": (
        {"data_card": {"sources": {"news": {"licens": "x"}}}},
        "data_card.sources.news.licens: unknown key. Did you mean licence"),
    "a NUL character": (
        {"data": {"path": "text", "custom": [{"name": "a", "command": "a\0 {input} {output}"}]}},
        "which holds a NUL character"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_TYPES)
def test_values_of_wrong_types(tmp_path: Path, mistake: str) -> None:
    """The message names the key as the user wrote it, what was found and what is expected, in YAML's words."""
    changes, words = WRONG_TYPES[mistake]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(toy.recipe(**changes)))
    (tmp_path / "cluster.yaml").write_text("{}")
    with pytest.raises(UserError) as refused:
        config.load(tmp_path / "recipe.yaml", tmp_path / "cluster.yaml", STAGES)
    assert words in str(refused.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """Several mistakes in one file come in one message, a line each."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, with_training(lr="fast", seq_length=0))
    message = str(caught.value)
    assert "training.lr: found 'fast'" in message
    assert "training.seq_length: found 0" in message


def test_missing_key(tmp_path: Path) -> None:
    """A missing required key is named."""
    recipe = toy.recipe()
    del recipe["training"]["lr"]
    with pytest.raises(UserError, match=r"training\.lr: missing"):
        load(tmp_path, recipe)


def test_export_of_an_iteration_that_is_never_saved(tmp_path: Path) -> None:
    """An exported iteration must be one that a checkpoint is written at."""
    with pytest.raises(UserError, match="3 is never saved; checkpoints are written every 2 steps and at 4"):
        load(tmp_path, toy.recipe(export={"iterations": [3]}))


@pytest.mark.parametrize("name", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_masks_of_documents_need_their_ends(tmp_path: Path, name: str) -> None:
    """What acts at the ends of documents is refused where nothing marks them."""
    recipe = with_training(**{name: True})
    assert getattr(load(tmp_path, recipe).recipe.training, name)
    recipe["tokenizer"] = {**recipe["tokenizer"], "append_eod": False}
    with pytest.raises(UserError, match=rf"training\.{name} is true but tokenizer\.append_eod is false"):
        load(tmp_path, recipe)


def test_tensor_ranks_share_the_sequence(tmp_path: Path) -> None:
    """A sequence length that the tensor parallel size does not divide is refused."""
    assert load(tmp_path, with_training(tensor_parallel=4)).recipe.training.tensor_parallel == 4
    with pytest.raises(UserError, match=r"training\.tensor_parallel is 3 and does not divide training\.seq_length 8"):
        load(tmp_path, with_training(tensor_parallel=3))


def test_the_last_decay_belongs_to_wsd(tmp_path: Path) -> None:
    """Its length without the style, the style without it, and one longer than the run are refused."""
    for changes in ({"lr_decay_style": "WSD"}, {"lr_wsd_decay_iters": 2}):
        with pytest.raises(UserError, match="WSD and the length of its decay belong together"):
            load(tmp_path, with_training(**changes))
    with pytest.raises(UserError, match=r"lr_wsd_decay_iters is 5 but train_iters is only 4"):
        load(tmp_path, with_training(lr_decay_style="WSD", lr_wsd_decay_iters=5))


def test_training_keys_are_flags_that_the_engine_takes(tmp_path: Path) -> None:
    """What a recipe asks for arrives as the engine's flags; what it does not mention is left to the engine."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"vocab_size": 100}')
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>")).save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").touch()
    asked = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "minus_sqrt", "skip_spikes": 6}
    found = []
    for keys in ({}, {**asked, "dtype": "fp16", "wandb_project": "danish"}):
        recipe = with_training(**keys) | {"model": {"base": str(base)}}
        recipe["tokenizer"] = {"type": "HuggingFaceTokenizer", "file": str(base / "tokenizer.json")}
        context = Context(load(tmp_path, recipe), tmp_path, [], Inputs(tmp_path, {}, {}))
        found.append(flags_parser.parse(_training_flags(context)))
    plain, full = ({name: args.flag(name) for name in (*asked, "fp16", "bf16", "wandb_logger")} for args in found)
    assert full == {**asked, "fp16": True, "bf16": False, "wandb_logger": True}
    assert plain == {
        **{"lr_decay_style": "cosine", "lr_wsd_decay_iters": None, "lr_wsd_decay_style": "exponential"},
        **{"skip_spikes": None, "fp16": False, "bf16": True, "wandb_logger": False},
    }
    assert found[1].flag("wandb_project") == "danish"


def test_stage_resources(tmp_path: Path) -> None:
    """A stage's own values lie over the defaults; an unknown stage and an unknown resource are refused."""
    cluster: dict[str, Any] = {
        "defaults": {"cpus": 2, "minutes": 30},
        "stages": {"train": {"nodes": 3, "ranks_per_node": 4}},
    }
    resources = load(tmp_path, toy.recipe(), cluster).cluster.resources("train")
    assert (resources.cpus, resources.minutes, resources.ranks) == (2, 30, 12)
    with pytest.raises(UserError, match=r"stages\.tokenise: there is no such stage. Did you mean tokenize\?"):
        load(tmp_path, toy.recipe(), {"stages": {"tokenise": {}}})
    with pytest.raises(UserError, match=r"stages\.train\.gpu_per_node: unknown key. Did you mean gpus_per_node\?"):
        load(tmp_path, toy.recipe(), {"stages": {"train": {"gpu_per_node": 4}}})
    with pytest.raises(UserError, match=r"stages\.train\.container\.imag: unknown key. Did you mean image\?"):
        load(tmp_path, toy.recipe(), {"stages": {"train": {"container": {"runtime": "none", "imag": "x"}}}})
    with pytest.raises(UserError, match=r"container\.runtime is docker but container\.image is missing"):
        load(tmp_path, toy.recipe(), {"stages": {"train": {"container": {"runtime": "docker"}}}})


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` and `${NAME:-default}` are replaced; an unset name without a default is refused."""
    monkeypatch.setenv("CORPUS", "/corpus")
    recipe = toy.recipe(data={"path": "${CORPUS}/raw"}, model={"base": "${NOWHERE:-models/x}"})
    found = load(tmp_path, recipe).recipe
    assert found.data.path == Path("/corpus/raw")
    assert found.model.base == PROJECT / "models/x"
    with pytest.raises(UserError, match=r"data: .*path: \$\{NOWHERE\} is not set|data\.path: \$\{NOWHERE\} is not set"):
        load(tmp_path, toy.recipe(data={"path": "${NOWHERE}"}))
    assert "${NOWHERE}" in str(load(tmp_path, toy.recipe(model={"base": "${NOWHERE}"})).recipe.model.base)


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    """A missing file, broken YAML and a list instead of keys are each said."""
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(UserError, match="no such file"):
        config.load(tmp_path / "none.yaml", tmp_path / "c.yaml", STAGES)
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        config.load(tmp_path / "r.yaml", tmp_path / "c.yaml", STAGES)
    (tmp_path / "r.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="found list, expected keys"):
        config.load(tmp_path / "r.yaml", tmp_path / "c.yaml", STAGES)


def test_configuration_is_frozen(tmp_path: Path) -> None:
    """Nothing can change the configuration after it was validated."""
    found = load(tmp_path, toy.recipe())
    with pytest.raises(ValueError, match="frozen"):
        found.recipe.training.lr = 1.0  # type: ignore[misc]


def with_sources(*sources: Any) -> dict[str, Any]:
    return toy.recipe(data={"path": "text", "sources": list(sources)})


def test_shares_of_sources(tmp_path: Path) -> None:
    """A source may be a name or NAME: SHARE; the order is kept."""
    found = load(tmp_path, with_sources("b", {"a": 0.5}, {"c": 1})).recipe.data
    assert found.shares == {"b": 1.0, "a": 0.5, "c": 1.0}
    assert list(found.shares) == ["b", "a", "c"]
    assert load(tmp_path, toy.recipe()).recipe.data.shares is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": 2}, "deduplication removes the copies. To weight sources, blend tokenised datasets in training"),
        ({"a": 0}, "expected a share above 0 and up to 1"),
        ({"a": "half"}, "expected a source's name or NAME: SHARE, such as news: 0.5"),
        ({"a": True}, "expected a source's name or NAME: SHARE"),
        ({"a": 0.5, "c": 0.5}, "expected a source's name or NAME: SHARE"),
        (2021, "found 2021, expected a source's name"),
        ("b", "'b' is there 2 times; name each source once"),
    ],
)
def test_shares_that_make_no_sense(tmp_path: Path, source: Any, message: str) -> None:
    """More than all, nothing, no number, two in one entry and a name twice are refused, with the reason."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, with_sources("b", source))
    assert "recipe.yaml: data.sources: " in str(caught.value)
    assert message in str(caught.value)


def test_a_repository_needs_a_licence(tmp_path: Path) -> None:
    """Pushing to the Hub is refused until push.license is given; pushing to a folder needs none."""
    with pytest.raises(UserError, match=r"push: push\.repository is org/model but push\.license is missing"):
        load(tmp_path, toy.recipe(push={"repository": "org/model"}))
    assert load(tmp_path, toy.recipe(push={"repository": "org/model", "license": "llama2"})).recipe.push.public is False


def test_every_saved_iteration_can_be_exported(tmp_path: Path) -> None:
    """`all` means each multiple of save_interval, and the last; without a word it is the last alone."""
    training = {"train_iters": 10, "global_batch_size": 4, "seq_length": 8, "lr": 1e-3, "save_interval": 4}
    for asked, expected in (("all", [4, 8, 10]), (None, [10]), ([8, 10], [8, 10])):
        recipe = toy.recipe(training=training, export={"iterations": asked})
        assert load(tmp_path, recipe).recipe.exported_iterations == expected


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("24:00", 24), ("24:00:00", 1440), ("1:00:01", 61), ("2-12", 3600), ("1-0:30", 1470), ("0-0:2:0", 2)],
)
def test_time_limits_as_slurm_writes_them(tmp_path: Path, written: str, minutes: int) -> None:
    """`minutes` also takes what sbatch's --time takes, with or without quotes."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(toy.recipe()))
    for text in (written, f'"{written}"'):
        (tmp_path / "cluster.yaml").write_text(f"stages: {{train: {{minutes: {text}}}}}\n")
        found = config.load(tmp_path / "recipe.yaml", tmp_path / "cluster.yaml", STAGES)
        assert found.cluster.resources("train").minutes == minutes


@pytest.mark.parametrize("written", ["1:2:3:4", "a day", "-5", "1-", "1.5 h"])
def test_a_time_limit_that_is_none(tmp_path: Path, written: str) -> None:
    """What is no time limit is answered with the forms that are."""
    with pytest.raises(
        UserError, match=r"stages\.train\.minutes: found .* expected minutes, .* such as 90 or 24:00:00"
    ):
        load(tmp_path, toy.recipe(), {"stages": {"train": {"minutes": written}}})
