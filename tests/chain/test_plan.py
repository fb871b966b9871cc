"""Plans of runs that have yet to collect their text: one mistake each is refused before anything is collected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from run_contract.errors import UserError
from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan, make_plan
from snakmodel.config import load as configuration
from tests import toy

SOURCE = {"url": "http://127.0.0.1:9/a.txt", "format": "lines", "licence": "unknown"}
TEXT_STAGES = STAGES[: STAGES.index("tokenize")]


def plan(folder: Path, data: dict[str, Any], *, dry: bool = True, **sections: Any) -> RunPlan:
    """The plan of a run with these keys in the recipe's section `data`, and these sections."""
    (folder / "sources.yaml").write_text(yaml.safe_dump({"news": SOURCE, "books": SOURCE}))
    known = {"path": str(folder / "data"), "collect": str(folder / "sources.yaml"), "keep": ["date?"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(toy.recipe(data={**known, **data}, **sections)))
    (folder / "cluster.yaml").write_text("{}")
    config = configuration.load(folder / "recipe.yaml", folder / "cluster.yaml", STAGES)
    return make_plan(config, folder / "run", TEXT_STAGES, [], dry=dry)


def custom(command: str) -> dict[str, Any]:
    """The keys of `data` with one command."""
    return {"custom": [{"name": "mine", "command": command}]}


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown language": ({}, {"filter": {"language": {"keep": "dk"}}}, "does not know the language 'dk'"),
    "an unknown model": ({}, {"filter": {"language": {"keep": "da", "model": "lid"}}}, "lid does not exist"),
    "an unknown region": ({}, {"filter": {"pii": {"region": ["Denmark"]}}}, "is not a region"),
    "a column that no step makes": (
        {}, {"filter": {"quality": {}, "where": "qualty is None"}}, "names the column 'qualty'.*did you mean quality"),
    "no condition": ({"where": "date >"}, {}, r"data\.where: 'date >' is no condition"),
    "a column that is not kept": ({"where": "dato > 2016"}, {}, r"data\.where: .*did you mean date"),
    "a condition on a type that the recipe names": (
        {"keep": [{"date": "float"}], "where": "date == 'x'"}, {}, "'date', which holds double, with 'x'"),
    "a condition without columns": ({"keep": None, "where": "date > 1"}, {}, r"needs data\.keep"),
    "a script that is not there": (
        custom("python /no/x.py {input} {output}"), {}, r"data\.custom: .*custom-mine.*there is no file /no/x\.py"),
    "evaluation files of another kind": (
        {}, {"decontaminate": {"against": [__file__]}}, "evaluation files are .jsonl"),
    "a mistyped source": ({"sources": ["news", "boks"]}, {}, r"data\.sources: .*boks.*Did you mean books"),
    "no file of sources": ({"collect": "/no/sources.yaml"}, {}, r"data\.collect: there is no file /no/sources"),
    "a folder of sources": ({"collect": "/"}, {}, r"data\.collect: there is no file /\."),
    "a file for the text": ({"path": __file__}, {}, r"data\.path: .* is a file\. Give the folder"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_refused_before_collecting(tmp_path: Path, mistake: str) -> None:
    """The message names the key, what was found and what is valid; nothing is made."""
    data, sections, words = WRONG[mistake]
    with pytest.raises(UserError, match=f"(?s){words}"):
        plan(tmp_path, data, dry=False, **sections)
    assert not (tmp_path / "data").exists()


def test_what_is_not_known_yet_is_not_refused(tmp_path: Path) -> None:
    """Conditions on columns whose types only the text can tell; a source that was put there by hand; a flag's words."""
    (tmp_path / "data" / "own").mkdir(parents=True)
    where = "date is None or date >= 2016 and date != 'x' and not date"
    data = {"where": where, "sources": ["news", "own"], **custom("python -m mine {input} {output}")}
    found = plan(tmp_path, data, filter={"where": where})
    assert found.unfinished
    assert list(found.missing) == ["collect"]


def test_the_data_folder_is_made_for_containers(tmp_path: Path) -> None:
    """A container is shown the folder that `collect` writes into, so it has to be there; a dry run makes nothing."""
    plan(tmp_path, {})
    assert not (tmp_path / "data").exists()
    plan(tmp_path, {}, dry=False)
    assert (tmp_path / "data").is_dir()


def test_a_card_about_a_source_that_is_not_there(tmp_path: Path) -> None:
    """A mistyped name below data_card.sources is refused, when the run's sources are known."""
    (tmp_path / "data" / "news").mkdir(parents=True)
    (tmp_path / "data" / "news" / "a.txt").write_text("en linje\n")
    own = {"collect": None, "keep": None}
    plan(tmp_path, own, data_card={"sources": {"news": {"licence": "cc0"}}})
    with pytest.raises(UserError, match=r"data_card\.sources: the run has no source nws\. Did you mean news"):
        plan(tmp_path, own, data_card={"sources": {"nws": {"licence": "cc0"}}})


def test_a_source_that_is_added_later(tmp_path: Path) -> None:
    """The refusal says that the file of sources has changed, and what to type."""
    plan(tmp_path, {"sources": ["news"]}, dry=False)
    with pytest.raises(UserError, match=r"the sources in .*sources\.yaml.*--restart-from collect"):
        plan(tmp_path, {"sources": ["news", "books"]})
