"""How much text: what every count of documents has in common, and how counts are added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

MOST_SOURCES = 1000
MANY_SOURCES = f"(more than {MOST_SOURCES} sources)"


def merged(one: Any, other: Any) -> Any:
    """The sum of two numbers; of two dictionaries, key by key."""
    if not isinstance(one, dict):
        return one + other
    return {**one, **{key: merged(one[key], value) if key in one else value for key, value in other.items()}}


def bounded(sources: dict[str, Any]) -> dict[str, Any]:
    """Counts by source; with more than MOST_SOURCES sources only their sum, under a name that says so.

    Whether they are summed up before or after counts are added makes no difference.
    """
    if len(sources) <= MOST_SOURCES and MANY_SOURCES not in sources:
        return sources
    return {MANY_SOURCES: reduce(merged, sources.values())}


@dataclass
class Amounts:
    """Documents, their characters and UTF-8 bytes, in all and by source."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> documents, characters and bytes; see `bounded`."""

    def add(self, other: Amounts) -> None:
        """Add counts of the same kind, field by field."""
        for name, value in vars(other).items():
            setattr(self, name, merged(getattr(self, name), value))
        self.sources = bounded(self.sources)
