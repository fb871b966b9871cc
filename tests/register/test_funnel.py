"""The counts of a run's stages: read, followed from stage to stage, and refused if they do not add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.register.funnel import check, funnel_json, read_flows
from snakmodel.run.paths import shard_name
from snakmodel.shards.counts import MANY_SOURCES
from tests.register.counted_run import amounts, flows, step, write, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose counts add up."""
    write_run(tmp_path)
    return tmp_path


def change(path: Path, how: Callable[[Any], Any]) -> None:
    """Change a file of counts."""
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def test_the_way_of_the_documents(run: Path) -> None:
    """Each step has what came in and went on, in all and by source, with its own counts."""
    found = flows(run)
    check(found)
    names = ["prepare", "filter: pii", "dedup", "final-filter: lines", "tokenize"]
    assert [one.name for one in found] == names
    assert [(one.documents, one.kept) for one in found] == [(10, 8), (8, 7), (7, 5), (5, 4), (4, 3)]
    assert [dict(one.sources) for one in found] == [
        {"a": 5, "b": 3}, {"a": 5, "b": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 1}, {"a": 3, "b": 0}
    ]  # fmt: skip
    assert [dict(one.details) for one in found] == [
        {"empty": 2}, {"changed": 2}, {"duplicates": 2, "clusters": 1}, {}, {"without_tokens": 1}
    ]  # fmt: skip
    told = funnel_json(found)
    assert (told["documents"], told["tokens"], told["bytes"]) == (3, 9, 30)
    assert told["steps"][2]["sources"]["b"] == {"documents": 2, "bytes": 20}
    assert json.loads(json.dumps(told)) == told


def test_a_run_without_filters(run: Path) -> None:
    """Only the stages that every run has; a sum that is wrong without the filter is noticed."""
    with pytest.raises(UserError, match="prepare let 8 documents through, but dedup was given 7"):
        check(read_flows(run, 2, []))


FOLDERS = ["arrow/shard-00000", "filter/shard-00001", "dedup/report", "filtered/shard-00000"]
TOTALS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "prepare": (
        "arrow/shard-00001.json", lambda counts: counts.update(documents=5), r"prepare let 9 .* filter: pii was given 8"
    ),
    "filter": (
        "filter/shard-00000.json",
        lambda counts: counts["steps"]["pii"].update(kept=2),
        r"filter: pii let 6 documents through, but dedup was given 7",
    ),
    "dedup": ("dedup/report.json", lambda counts: counts.update(kept=6), r"dedup let 6 .*: lines was given 5"),
    "final filter": (
        "filtered/shard-00001.json",
        lambda counts: counts["steps"]["lines"].update(kept=3),
        r"final-filter: lines let 5 documents through, but tokenize was given 4",
    ),
    "tokens": (
        "tokens/corpus_text_document.json", lambda counts: counts.update(documents=3), r"tokenize was given 3\. The"
    ),
    "a source before a filter": (
        "arrow/shard-00000.json",
        lambda counts: counts.update(sources=amounts({"a": 2, "b": 2})),
        r"prepare let 4 documents of 'a' through, but filter: pii was given 5",
    ),
    "a source before deduplication": (
        "dedup/report.json",
        lambda counts: [counts["sources"]["a"].update(documents=4), counts["sources"]["b"].update(documents=3)],
        r"filter: pii let 5 documents of 'a' through, but dedup was given 4",
    ),
    "a source that is new": (
        "tokens/corpus_text_document.json",
        lambda counts: counts["sources"].update(c=counts["sources"].pop("b")),
        r"final-filter: lines let 1 documents of 'b' through, but tokenize was given 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOTALS)
def test_sums_that_do_not_add_up(run: Path, case: str) -> None:
    """Both stages and both numbers are named, in total or for the first source, and what to do."""
    name, how, says = TOTALS[case]
    change(run / name, how)
    with pytest.raises(UserError, match=says) as error:
        check(flows(run))
    assert "--restart-from prepare" in str(error.value)


@pytest.mark.parametrize("name", [*(f"{name}.json" for name in FOLDERS), "tokens/corpus_text_document.json"])
def test_counts_that_are_missing_or_damaged(run: Path, name: str) -> None:
    """The file is named."""
    (run / name).write_text("{")
    with pytest.raises(UserError, match=f"{Path(name).name} does not hold the counts of a stage"):
        flows(run)
    (run / name).unlink()
    with pytest.raises(InputsMissing, match=f"{Path(name).name} does not exist; run the stage that writes it first"):
        flows(run)


def test_more_than_a_thousand_sources(tmp_path: Path) -> None:
    """Shards with few sources and with many are added; then only totals are compared, which still have to be right."""
    many = {f"s{number}": 1 for number in range(700)}
    others = {f"t{number}": 1 for number in range(700)}
    bound = {MANY_SOURCES: {"documents": 1400, "kept_documents": 1400, "kept_bytes": 14000}}
    for index, documents in enumerate((many, others)):
        prepared = {"documents": 700, "sources": amounts(documents)}
        write(tmp_path / "arrow" / f"{shard_name(index)}.json", prepared)
        passed = {"documents": 700, "steps": {"pii": step(documents, documents)}}
        write(tmp_path / "filter" / f"{shard_name(index)}.json", passed)
    write(tmp_path / "dedup" / "report.json", {"documents": 1400, "kept": 1400, "sources": bound})
    tokens = {MANY_SOURCES: {"documents": 1400, "empty_documents": 0, "bytes": 14000, "tokens": 1400}}
    manifest = {"documents": 1400, "empty_documents": 0, "sources": tokens}
    write(tmp_path / "tokens" / "corpus_text_document.json", manifest)
    found = read_flows(tmp_path, 2, ["filter"])
    check(found)
    assert [dict(one.sources) for one in found] == [{MANY_SOURCES: 1400}] * 4
    change(tmp_path / "dedup" / "report.json", lambda counts: counts.update(documents=1399))
    with pytest.raises(UserError, match="let 1400 documents through, but dedup was given 1399"):
        check(read_flows(tmp_path, 2, ["filter"]))
