"""The manifest PREFIX.json of a tokenised dataset: its properties and counts, in total and by source.

The manifests of shards can be added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

from run_contract.errors import InputsMissing, UserError

COUNTS = (
    "documents",
    "empty_documents",
    "characters",
    "bytes",
    "tokens",
    "sequences",
    "unknown_tokens",
    "byte_tokens",
)
"""The quantities that are counted, in total and for each source."""
SUMMED = (*COUNTS, "sources", "backends", "why_not_fast", "sample_mismatches")
"""The fields that are added or merged over shards; all other fields must be equal in them."""
MOST_SOURCES = 1000
MANY_SOURCES = f"(more than {MOST_SOURCES} sources)"
RATES = ("tokens_per_byte", "fallback_rate")
"""Rates that are written beside the counts for users to read; they are computed, and never read back."""


def beside(prefix: Path, suffix: str) -> Path:
    """PREFIX plus a suffix; unlike Path.with_suffix, this keeps dots that are part of the prefix."""
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class Manifest:
    """The content of PREFIX.json: counts that are added over shards, and properties that must be equal in all of
    them."""

    documents: int
    """Number of documents read, including the empty ones."""
    empty_documents: int
    """Number of documents without a single token, for which nothing is written."""
    characters: int
    bytes: int
    """Size of the text in UTF-8."""
    tokens: int
    """Number of tokens, including appended EODs and prepended BOSs."""
    sequences: int
    vocab_size: int
    tokenizer_fingerprint: str
    tokenizer_type: str
    append_eod: bool
    eod: int
    dtype: str
    prepend_bos: bool = False
    bos: int | None = None
    unknown_tokens: int = 0
    byte_tokens: int = 0
    """Number of tokens for single bytes, which stand for text that no piece of the vocabulary covers."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source of documents -> its counts; see `bounded`."""
    backends: dict[str, int] = field(default_factory=dict)
    """Library -> number of documents that it encoded. The ids do not depend on the library."""
    why_not_fast: tuple[str, ...] = ()
    """The reasons why the fast library did not encode everything that it could have encoded."""
    sample_mismatches: int = 0
    """Number of sampled documents for which the two libraries gave different ids.

    If there is one, the tokenizer's own library encodes all documents of the task again.
    """
    columns: tuple[str, ...] = ()
    """The columns of PREFIX.columns.arrow, which holds a row per sequence; empty if there is no such file."""

    def as_dict(self) -> dict[str, Any]:
        """The manifest as a JSON object, with rates."""
        sources = {name: {**counts, **rates(counts)} for name, counts in sorted(self.sources.items())}
        found = {**asdict(self), **rates(asdict(self)), "sources": sources, "why_not_fast": list(self.why_not_fast)}
        columns = found.pop("columns")
        return {**found, "columns": list(columns)} if columns else found

    @classmethod
    def read(cls, prefix: Path) -> Manifest:
        """Read PREFIX.json. Raises InputsMissing when there is none, and UserError when it is not a manifest."""
        path = beside(prefix, ".json")
        try:
            raw = without_rates(json.loads(path.read_bytes()))
            sources = {name: without_rates(counts) for name, counts in raw.pop("sources", {}).items()}
            lists = {name: tuple(raw.get(name, ())) for name in ("why_not_fast", "columns")}
            return cls(**{**raw, "sources": sources, **lists})
        except FileNotFoundError:
            raise InputsMissing(
                f"{path} does not exist: the shard is not whole; run preprocess_data.py again"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest of tokens ({error}); run preprocess_data.py again") from error

    def __add__(self, other: Manifest) -> Manifest:
        """The manifest of two datasets joined. Raises ValueError as `check_same` does."""
        other.check_same(self)
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        names = sorted({*self.sources, *other.sources})
        together = {name: added(self.sources.get(name, {}), other.sources.get(name, {})) for name in names}
        sums["sources"] = bounded(together)
        sums["backends"] = added(self.backends, other.backends)
        sums["sample_mismatches"] = self.sample_mismatches + other.sample_mismatches
        sums["why_not_fast"] = tuple(sorted({*self.why_not_fast, *other.why_not_fast}))
        return replace(self, **sums)

    def check_same(self, first: Manifest) -> None:
        """Raise ValueError, naming the field, if a field that must be equal in both manifests is not."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(first, one.name)
            if one.name not in SUMMED and mine != theirs:
                raise ValueError(f"{one.name} is {mine!r}, not {theirs!r}")

    def wrong_sum(self) -> str | None:
        """The first count that is not the sum over the sources, described in a clause, or None."""
        for name in COUNTS:
            total = sum(counts.get(name, 0) for counts in self.sources.values())
            if self.sources and total != getattr(self, name):
                return f"{name} is {getattr(self, name)}, its sources have {total}"
        return None


def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """The sum of two sets of counts, with the names in order."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}


def bounded(sources: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The counts by source or, with more than MOST_SOURCES sources, only their sum under a name that says so.

    The result is the same whether this is applied before or after counts are added.
    """
    if len(sources) <= MOST_SOURCES and MANY_SOURCES not in sources:
        return sources
    return {MANY_SOURCES: reduce(added, sources.values())}


def rates(counts: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per byte of text, and the share of tokens that are unknown or single bytes."""
    fallback = counts["unknown_tokens"] + counts["byte_tokens"]
    return {
        "tokens_per_byte": round(counts["tokens"] / max(1, counts["bytes"]), 6),
        "fallback_rate": round(fallback / max(1, counts["tokens"]), 6),
    }


def without_rates(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without the rates, as it is read back."""
    return {name: value for name, value in raw.items() if name not in RATES}
