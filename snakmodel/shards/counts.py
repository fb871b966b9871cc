"""Counts of text: what all counts of documents have in common, and how counts are added."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

MOST_SOURCES = 1000
MANY_SOURCES = f"(more than {MOST_SOURCES} sources)"


def merged(one: Any, other: Any) -> Any:
    """The sum of two numbers, or of two dictionaries key by key."""
    if not isinstance(one, dict):
        return one + other
    return {**one, **{key: merged(one[key], value) if key in one else value for key, value in other.items()}}


def bounded(sources: dict[str, Any]) -> dict[str, Any]:
    """The counts by source or, if there are more than MOST_SOURCES sources, only their sum under the name MANY_SOURCES.

    It makes no difference whether they are bounded before or after counts are added.
    """
    if len(sources) <= MOST_SOURCES and MANY_SOURCES not in sources:
        return sources
    return {MANY_SOURCES: reduce(merged, sources.values())}


@dataclass
class Amounts:
    """The numbers of documents, characters and UTF-8 bytes, in all and by source."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Maps each source to its numbers of documents, characters and bytes; see `bounded`."""

    def add(self, other: Amounts) -> None:
        """Add counts of the same kind, field by field."""
        for name, value in vars(other).items():
            setattr(self, name, merged(getattr(self, name), value))
        self.sources = bounded(self.sources)
