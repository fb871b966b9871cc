"""PREFIX.json beside tokens: what they are and how many, in total and by source. Manifests of shards add up."""

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
"""What is counted, in total and for each source."""
SUMMED = (*COUNTS, "sources", "backends", "why_not_fast", "sample_mismatches")
"""What adds up over shards; all else must be the same in them."""
MOST_SOURCES = 1000
MANY_SOURCES = f"(more than {MOST_SOURCES} sources)"
RATES = ("tokens_per_byte", "fallback_rate")
"""What is written beside the counts for people to read; worked out, never read back."""


def beside(prefix: Path, suffix: str) -> Path:
    """PREFIX plus a suffix; unlike Path.with_suffix it keeps dots that are part of the prefix."""
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class Manifest:
    """What PREFIX.json says of its .bin: counts that add up over shards, and what must be the same in all of them."""

    documents: int
    """Documents read, the empty ones among them."""
    empty_documents: int
    """Documents without a single token: nothing is written for them."""
    characters: int
    bytes: int
    """Of the text, in UTF-8."""
    tokens: int
    """The appended EODs and prepended BOSs among them."""
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
    """Single bytes that stand for text which the vocabulary has no piece for."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source of documents -> its counts; see `bounded`."""
    backends: dict[str, int] = field(default_factory=dict)
    """Library -> documents that it encoded. The ids do not depend on it."""
    why_not_fast: tuple[str, ...] = ()
    """Why the fast library did not encode everything that it might have."""
    sample_mismatches: int = 0
    """Sampled documents for which the two libraries gave different ids, so that the tokenizer's own library encoded all
    documents of the task again."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON object, with rates."""
        sources = {name: {**counts, **rates(counts)} for name, counts in sorted(self.sources.items())}
        return {**asdict(self), **rates(asdict(self)), "sources": sources, "why_not_fast": list(self.why_not_fast)}

    @classmethod
    def read(cls, prefix: Path) -> Manifest:
        """Read PREFIX.json; InputsMissing when there is none, UserError when it is not a manifest."""
        path = beside(prefix, ".json")
        try:
            raw = without_rates(json.loads(path.read_bytes()))
            sources = {name: without_rates(counts) for name, counts in raw.pop("sources", {}).items()}
            return cls(**{**raw, "sources": sources, "why_not_fast": tuple(raw.get("why_not_fast", ()))})
        except FileNotFoundError:
            raise InputsMissing(
                f"{path} does not exist: the shard is not whole; run preprocess_data.py again"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest of tokens ({error}); run preprocess_data.py again") from error

    def __add__(self, other: Manifest) -> Manifest:
        """The manifest of two datasets joined; ValueError as check_same."""
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
        """Raise ValueError, which names it, for what must be the same and is not."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(first, one.name)
            if one.name not in SUMMED and mine != theirs:
                raise ValueError(f"{one.name} is {mine!r}, not {theirs!r}")

    def wrong_sum(self) -> str | None:
        """The first count that is not the sum over the sources, as a clause, or None."""
        for name in COUNTS:
            total = sum(counts.get(name, 0) for counts in self.sources.values())
            if self.sources and total != getattr(self, name):
                return f"{name} is {getattr(self, name)}, its sources have {total}"
        return None


def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """Two sets of counts together, the names in order."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}


def bounded(sources: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Counts by source; with more than MOST_SOURCES sources only their sum, under a name that says so.

    Whether they are summed up before or after counts are added makes no difference.
    """
    if len(sources) <= MOST_SOURCES and MANY_SOURCES not in sources:
        return sources
    return {MANY_SOURCES: reduce(added, sources.values())}


def rates(counts: Mapping[str, Any]) -> dict[str, float]:
    """Tokens for a byte of text, and the part of the tokens that are unknown or single bytes."""
    fallback = counts["unknown_tokens"] + counts["byte_tokens"]
    return {
        "tokens_per_byte": round(counts["tokens"] / max(1, counts["bytes"]), 6),
        "fallback_rate": round(fallback / max(1, counts["tokens"]), 6),
    }


def without_rates(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as it is read back."""
    return {name: value for name, value in raw.items() if name not in RATES}
