"""The stage that collects: which sources it has, when it is done, and what its keys depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from run_contract.errors import InputsMissing, UserError
from snakmodel.chain.build import build_collection
from snakmodel.chain.collect_stage import refuse_what_is_not_there, uncollected, wanted_sources
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Chain
from snakmodel.collect.places import Place
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from tests.chain.optional_stages import data_recipe

WEB = {"url": "https://a.dk/a.txt", "format": "lines", "licence": "cc0-1.0"}


def write_sources(folder: Path, **sources: Any) -> Path:
    """Write a file of sources."""
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources, sort_keys=False))
    return folder / "sources.yaml"


def collecting(folder: Path, *taken: str) -> Recipe:
    """A recipe that collects these sources, or all."""
    data = {"collect": str(folder / "sources.yaml"), **({"sources": list(taken)} if taken else {})}
    return data_recipe(folder, data=data)


def chain(folder: Path, recipe: Recipe) -> Chain:
    """The chain of a run as long as its text is not collected."""
    return build_collection(Config(recipe=recipe, cluster=Cluster()), folder / "run", Inputs(folder / "run", {}, {}))


def write_record(folder: Path, name: str) -> Path:
    """Write what `collect` leaves of a source of the recipe, and return the file of text."""
    source = wanted_sources(collecting(folder))[name]
    text = folder / "text" / name / "a.jsonl"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text('{"text": "x"}\n')
    output = {"file": f"{name}/a.jsonl", "bytes": text.stat().st_size, "sha256": "", "documents": 1}
    record = {"name": name, "source": source.entry(), "collected": "2026-01-01", "downloads": [], "outputs": [output]}
    path = Place(folder / "text", name).record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "documents": 1, "left_out": {}}))
    return text


def test_one_task_per_source(tmp_path: Path) -> None:
    """The chain is this stage alone; its tasks name the sources that the recipe takes."""
    write_sources(tmp_path, a=WEB, b={**WEB, "url": "https://b.dk/b.txt"})
    found = chain(tmp_path, collecting(tmp_path))
    assert list(found.keys) == ["collect"]
    assert [task.outputs for task in found["collect"].tasks] == [("collect/a.json",), ("collect/b.json",)]
    assert [one.outputs for one in chain(tmp_path, collecting(tmp_path, "b"))["collect"].tasks] == [("collect/b.json",)]
    assert wanted_sources(data_recipe(tmp_path)) == {}


def test_keys_depend_on_the_entry(tmp_path: Path) -> None:
    """A changed entry changes the key of its task, and of no other."""
    write_sources(tmp_path, a=WEB, b=WEB)
    before = chain(tmp_path, collecting(tmp_path)).keys["collect"]
    write_sources(tmp_path, b={**WEB, "min_characters": 5}, a=WEB, c=WEB)
    after = dict(zip(("b", "a", "c"), chain(tmp_path, collecting(tmp_path)).keys["collect"], strict=True))
    assert after["a"] == before[0]
    assert after["b"] != before[1]


def test_what_is_still_to_be_collected(tmp_path: Path) -> None:
    """A source is collected if there is a record of the same entry and its files are there."""
    write_sources(tmp_path, a=WEB, b=WEB)
    recipe = collecting(tmp_path)
    assert list(uncollected(recipe)) == ["a", "b"]
    text = write_record(tmp_path, "a")
    assert list(uncollected(recipe)) == ["b"]
    assert list(uncollected(collecting(tmp_path, "a"))) == []
    text.unlink()
    assert list(uncollected(recipe)) == ["a", "b"]
    write_record(tmp_path, "a")
    write_sources(tmp_path, a={**WEB, "min_characters": 5}, b=WEB)
    assert list(uncollected(recipe)) == ["a", "b"]


def test_sources_that_there_are_not(tmp_path: Path) -> None:
    """If the recipe takes none of the file's sources, the nearest name is told; sources from elsewhere may be added."""
    write_sources(tmp_path, danews=WEB, b=WEB)
    with pytest.raises(
        UserError, match=r"data\.collect: .*has none of the sources in data\.sources \(danew\)\. Did you"
    ):
        wanted_sources(collecting(tmp_path, "danew"))
    (tmp_path / "text" / "mine").mkdir(parents=True)
    assert list(wanted_sources(collecting(tmp_path, "b", "mine"))) == ["b"]


def test_files_to_be_put_in_place_by_hand(tmp_path: Path) -> None:
    """All that are missing are told at once."""
    ask = {"ask": "Write to them.", "format": "lines", "licence": "unknown"}
    write_sources(tmp_path, a={**ask, "files": ["a.txt"]}, b={**ask, "files": ["b.txt"]}, c=WEB)
    sources = wanted_sources(collecting(tmp_path))
    with pytest.raises(InputsMissing, match=r"(?s)data\.collect: .*a\.txt.*\n.*b\.txt"):
        refuse_what_is_not_there(tmp_path / "text", sources)
    refuse_what_is_not_there(tmp_path / "text", {"c": sources["c"]})
