"""The text of the data card: its tables, what it must not say, and what it does with very many sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import PROJECT
from snakmodel.register.data_card import data_card, table
from snakmodel.register.funnel import Flow
from snakmodel.register.sources import SourceFacts, source_facts
from snakmodel.shards.arrow_stream import SCHEMA, write_stream
from snakmodel.shards.counts import MANY_SOURCES
from tests.register.counted_run import flows, write_run
from tests.toy import recipe


def full_recipe(folder: Path) -> Recipe:
    """A recipe with a path of this machine wherever one may be."""
    return Recipe.model_validate(
        recipe(
            data={
                "path": str(folder / "text"),
                "collect": str(folder / "sources.yaml"),
                "keep": ["url?"],
                "where": "source != '/secret/folder/x' or url is None",
                "custom": [
                    {"name": "one", "command": f"python {folder}/a.py --in={{input}} --by={folder}/m.bin {{output}}"},
                    {"name": "two", "command": f"'{folder}/a b/run' {{input}} {{output}} https://example.org/x/y"},
                ],
            },
            filter={
                "language": {"keep": "da", "model": str(folder / "lid.bin")},
                "quality": {"thresholds": str(folder / "t.yaml")},
                "pii": {},
            },
            decontaminate={"against": [str(folder / "my tests" / "eval.jsonl")]},
            dedup={"against": [str(folder / "earlier")]},
            data_card={"title": "Dansk", "sources": {"a": {"licence": "cc0-1.0", "cite": "Nobody", "title": "A|B"}}},
        )
    )  # fmt: skip


def test_a_card(tmp_path: Path) -> None:
    """It has the sources with their licences, each stage with its numbers, the reasons and the settings."""
    write_run(tmp_path / "run")
    found = flows(tmp_path / "run")
    (tmp_path / "t.yaml").write_text("gopher_min_words: 7\n")
    settings = full_recipe(tmp_path)
    text = data_card(settings, source_facts(settings, ["a", "b"]), found)
    assert text.startswith("# Data card: Dansk\n")
    assert "3 documents, 30 bytes of text and 9 tokens, from 2 source(s)." in text
    assert r"| A\|B | cc0-1.0 |  |  | 5 | 3 | 30 bytes | 9 |" in text
    assert "| b | unknown |  |  | 3 | 0 | 0 bytes | 0 |" in text
    assert "- a: Nobody" in text
    assert "| dedup | 7 | 5 | 71.4 % | 50 bytes |  |" in text
    assert "| prepare | empty | 2 |" in text
    assert "gopher_min_words: 7" in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["decontaminate"]["against"] == ["eval.jsonl"]
    assert shown["dedup"]["against"] == ["earlier"]
    assert shown["filter"]["language"]["model"] == "lid.bin"
    assert shown["data"]["custom"][0]["command"] == "python a.py --in={input} --by=m.bin {output}"
    assert "https://example.org/x/y" in shown["data"]["custom"][1]["command"]
    assert "Personal data was replaced where it was recognised" in text


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    """Neither the card nor the description of the files names a folder of this machine."""
    run, settings = tmp_path / "run", full_recipe(tmp_path)
    write_run(run)
    rows = pa.table({"text": pa.array(["x"], pa.large_string()), "source": ["a"]})
    for index in range(2):
        write_stream(run / "filtered" / f"shard-0000{index}.arrow", SCHEMA, rows.to_batches())
    (run / "run.yaml").write_text(yaml.safe_dump({"recipe": settings.model_dump(mode="json")}))
    words = ["--run_dir", str(run), "--shards", "2", "--before", "filter", "--after", "filtered"]
    words += ["--documents", "filtered", "--output", str(run / "card")]
    command = [sys.executable, "-m", "snakmodel.register", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in (run / "card").iterdir()}
    assert set(written) == {"data-card.md", "croissant.json", "funnel.json"}
    for text in written.values():
        assert str(tmp_path) not in text
        assert str(PROJECT) not in text
        assert "/secret" not in text
    assert json.loads(written["croissant.json"])["name"] == "Dansk"


def test_a_card_of_many_sources() -> None:
    """More sources than are told apart are one row, and the card does not call them one source."""
    flow = Flow("prepare", 5, 5, {MANY_SOURCES: 5}, bytes={MANY_SOURCES: 50}, tokens={MANY_SOURCES: 9})
    text = data_card(Recipe.model_validate(recipe()), [SourceFacts(MANY_SOURCES)], [flow])
    assert "from more than 1000 source(s)." in text
    few = {f"s{number:03d}": 1 for number in range(100)}
    flow = Flow("prepare", 100, 100, few, bytes=few, tokens=few)
    text = data_card(Recipe.model_validate(recipe()), [SourceFacts(name) for name in few], [flow])
    assert "from 100 source(s)." in text
    assert "| s039 |" in text
    assert "| s040 |" not in text
    assert "| and 60 more |" in text


@pytest.mark.parametrize(
    ("value", "cell"), [(None, ""), (1234567, "1,234,567"), ("a|b\nc", r"a\|b c"), (" x ", "x"), (0, "0")]
)
def test_cells_of_a_table(value: Any, cell: str) -> None:
    """No value breaks the table."""
    assert table(["a", "b"], [["x", value]], [1]).split("\n") == ["| a | b |", "| --- | ---: |", f"| x | {cell} |"]
