"""The counts of a small run, as its stages write them beside their outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snakmodel.register.funnel import Flow, read_flows
from snakmodel.run.paths import shard_name


def write(path: Path, value: Any) -> None:
    """Write a file of counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def step(documents: Mapping[str, int], kept: Mapping[str, int], **own: Any) -> dict[str, Any]:
    """The counts of one step of a filter."""
    sources = {name: {"documents": number, "kept": kept.get(name, 0)} for name, number in documents.items()}
    return {"documents": sum(documents.values()), "kept": sum(kept.values()), "sources": sources, **own}


def amounts(documents: Mapping[str, int]) -> dict[str, Any]:
    """The amounts of sources in which each document has ten bytes."""
    return {name: {"documents": n, "characters": 10 * n, "bytes": 10 * n} for name, n in documents.items()}


def write_run(run: Path) -> None:
    """Two shards of the sources a and b: 10 documents are read, 8 prepared, 7 filtered, 5 unique, 4 final."""
    first, second = {"a": 3, "b": 1}, {"a": 2, "b": 2}
    for index, (documents, left) in enumerate(((first, {"a": 3}), (second, second))):
        name = shard_name(index)
        prepared = {"documents": 4, "empty": 1, "invalid": {}, "sources": amounts(documents), "read": [[0, 9, "x"]]}
        write(run / "arrow" / f"{name}.json", prepared)
        passed = step(documents, left, changed=1)
        write(run / "filter" / f"{name}.json", {"documents": passed["kept"], "steps": {"pii": passed}})
        here = {"a": 2} if index == 0 else {"a": 1, "b": 2}
        last = {"a": 2} if index == 0 else {"a": 1, "b": 1}
        write(run / "filtered" / f"{name}.json", {"documents": 2, "steps": {"lines": step(here, last)}})
    sources = {
        "a": {"documents": 5, "kept_documents": 3, "kept_bytes": 30},
        "b": {"documents": 2, "kept_documents": 2, "kept_bytes": 20},
    }
    report = {"documents": 7, "kept": 5, "duplicates": 2, "clusters": 1, "sources": sources}
    write(run / "dedup" / "report.json", report)
    tokens = {
        "a": {"documents": 3, "empty_documents": 0, "bytes": 30, "tokens": 9},
        "b": {"documents": 1, "empty_documents": 1, "bytes": 0, "tokens": 0},
    }
    manifest = {"documents": 4, "empty_documents": 1, "sources": tokens}
    write(run / "tokens" / "corpus_text_document.json", manifest)


def flows(run: Path) -> list[Flow]:
    """The flows of that run."""
    return read_flows(run, 2, ["filter"], ["filtered"])
