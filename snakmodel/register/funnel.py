"""Follows the documents of a run from stage to stage by the counts of the stages, and checks that they add up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

from run_contract.errors import InputsMissing, UserError
from snakmodel.run.paths import shard_name
from snakmodel.shards.counts import MANY_SOURCES, bounded, merged


@dataclass(frozen=True)
class Flow:
    """What went into one step of a run, and what came out of it."""

    name: str
    """The stage, or `STAGE: STEP` for one of several steps."""
    documents: int
    """The number of documents that came in."""
    kept: int
    """The number of documents that went on."""
    sources: Mapping[str, int]
    """Maps each source to its number of documents that went on."""
    came: Mapping[str, int] | None = None
    """Maps each source to its number of documents that came in; None where that is not known."""
    bytes: Mapping[str, int] | None = None
    """Maps each source to the size of its documents that went on, in bytes of UTF-8; None where it is not counted."""
    tokens: Mapping[str, int] | None = None
    """Maps each source to its number of tokens; None before they are tokenised."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Counts of the step's own: why documents were left out, and what was changed."""

    def as_json(self) -> dict[str, Any]:
        """The flow as JSON values."""
        counted = {"bytes": self.bytes, "tokens": self.tokens}
        sums = {name: sum(values.values()) for name, values in counted.items() if values is not None}
        by_source = {
            source: {
                "documents": documents,
                **{name: values[source] for name, values in counted.items() if values and source in values},
            }
            for source, documents in sorted(self.sources.items())
        }
        return {
            "name": self.name,
            "documents": self.documents,
            "kept": self.kept,
            **sums,
            "sources": by_source,
            "details": dict(self.details),
        }


def read_flows(run: Path, shards: int, folders: Sequence[str], after: Sequence[str] = ()) -> list[Flow]:
    """The flows of all steps of a run, in order.

    `folders` are those of the shards that filters and commands wrote before deduplication, and `after` those after it,
    as paths below the run's folder. Raises InputsMissing if counts are missing.
    """
    flows = [_prepared(_sum(run / "arrow", shards))]
    for folder in folders:
        flows += _filtered(folder.split("/")[0], _sum(run / folder, shards))
    flows.append(_deduplicated(_read(run / "dedup" / "report.json")))
    for folder in after:
        flows += _filtered("final-filter", _sum(run / folder, shards))
    flows.append(_tokenised(_read(run / "tokens" / "corpus_text_document.json")))
    return flows


_REMEDY = "The counts of the run do not add up: some of its files were changed. Do it again with --restart-from prepare"


def check(flows: Sequence[Flow]) -> None:
    """Raise UserError unless each step was given what the step before it let through, source by source."""
    for before, now in pairwise(flows):
        if now.documents != before.kept:
            raise UserError(
                f"{before.name} let {before.kept} documents through, but {now.name} was given {now.documents}. "
                f"{_REMEDY}"
            )
        known = now.came is not None and MANY_SOURCES not in {*before.sources, *now.came}
        if known and (wrong := _first_difference(before.sources, now.came or {})):
            source, let, given = wrong
            raise UserError(
                f"{before.name} let {let} documents of {source!r} through, but {now.name} was given {given}. {_REMEDY}"
            )


def _first_difference(one: Mapping[str, int], other: Mapping[str, int]) -> tuple[str, int, int] | None:
    for source in sorted({*one, *other}):
        if one.get(source, 0) != other.get(source, 0):
            return source, one.get(source, 0), other.get(source, 0)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputsMissing(f"{path} does not exist; run the stage that writes it first") from None
    except ValueError as error:
        raise UserError(f"{path} does not hold the counts of a stage ({error}); do the stage again") from error
    return found


def _sum(folder: Path, shards: int) -> dict[str, Any]:
    """The sum of the counts of all shards in a folder. What is neither a number nor made of numbers is left out."""
    return reduce(merged, (_numbers(_read(folder / f"{shard_name(index)}.json")) for index in range(shards)))


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    """The numbers of counts, and of the counts inside them."""
    return {
        name: _numbers(one) if isinstance(one, dict) else one
        for name, one in value.items()
        if isinstance(one, (dict, int)) and not isinstance(one, bool)
    }


def _by_source(sources: Mapping[str, Mapping[str, int]], name: str) -> dict[str, int]:
    """One of the numbers of each source. Counts of few sources and of many may have been added, so they are bounded."""
    return {source: counts.get(name, 0) for source, counts in bounded(dict(sources)).items()}


_LEFT_OUT = ("empty", "beyond_share", "short", "unwanted", "skipped")
_CHANGED = ("trimmed", "composed", "replaced", "byte_order_marks", "empty_files")


def _prepared(counts: Mapping[str, Any]) -> Flow:
    documents = counts["documents"] + sum(counts.get(name, 0) for name in _LEFT_OUT)
    details = {name: counts[name] for name in (*_LEFT_OUT, *_CHANGED) if counts.get(name)}
    sources = counts["sources"]
    return Flow(
        "prepare",
        documents,
        counts["documents"],
        _by_source(sources, "documents"),
        bytes=_by_source(sources, "bytes"),
        details=details,
    )


def _filtered(stage: str, counts: Mapping[str, Any]) -> list[Flow]:
    """The flows of the steps of one pass over the shards."""
    flows = []
    for name, step in counts["steps"].items():
        details = {key: value for key, value in step.items() if key not in ("documents", "kept", "sources")}
        sources = step["sources"]
        kept, came = _by_source(sources, "kept"), _by_source(sources, "documents")
        title = name if name == stage or name.startswith("custom-") else f"{stage}: {name}"
        flows.append(Flow(title, step["documents"], step["kept"], kept, came, details=details))
    return flows


def _deduplicated(report: Mapping[str, Any]) -> Flow:
    sources = report["sources"]
    details = {name: report[name] for name in ("duplicates", "dropped", "clusters") if name in report}
    return Flow(
        "dedup",
        report["documents"],
        report["kept"],
        _by_source(sources, "kept_documents"),
        _by_source(sources, "documents"),
        _by_source(sources, "kept_bytes"),
        details=details,
    )


def _tokenised(manifest: Mapping[str, Any]) -> Flow:
    sources = manifest["sources"]
    documents, empty = _by_source(sources, "documents"), _by_source(sources, "empty_documents")
    return Flow(
        "tokenize",
        manifest["documents"],
        manifest["documents"] - manifest["empty_documents"],
        {source: number - empty[source] for source, number in documents.items()},
        documents,
        _by_source(sources, "bytes"),
        _by_source(sources, "tokens"),
        {"without_tokens": manifest["empty_documents"]} if manifest["empty_documents"] else {},
    )


def funnel_json(flows: Iterable[Flow]) -> dict[str, Any]:
    """All flows as JSON values."""
    found = [flow.as_json() for flow in flows]
    last = found[-1]
    return {"documents": last["kept"], "tokens": last.get("tokens", 0), "bytes": last.get("bytes", 0), "steps": found}
