"""The list `data.keep` of a recipe: which JSON keys or columns the shards keep, and of which types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

TYPES = ("string", "int", "float", "bool", "date", "timestamp", "json")
"""The types that a recipe can name."""
RESERVED = ("text", "source", "id")
"""Columns that every shard has, or gets, from elsewhere."""


def _checked(entries: list[Any]) -> list[Any]:
    """The entries as they are. Raises ValueError if one is no NAME or NAME: TYPE, or if a name is there twice."""
    names = [name for entry in entries for name, _, _ in [parsed(entry)]]
    for name in names:
        if name in RESERVED:
            raise ValueError(f"{name!r} is a column that every shard has by itself; leave it out")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is there {names.count(name)} times; name each column once")
    return entries


def parsed(entry: Any) -> tuple[str, str | None, bool]:
    """The name of a kept column, its type (None if the files decide), and whether files and documents may lack it.

    Raises ValueError if an entry is neither `NAME` nor `NAME: TYPE`.
    """
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, type_),) = entry.items()
        if type_ not in TYPES:
            raise ValueError(f"{name} has the type {type_!r}; the types are {', '.join(TYPES)}")
    else:
        name, type_ = entry, None
    if not isinstance(name, str) or not name.removesuffix("?"):
        raise ValueError(f"found {entry!r}, expected the name of a column or NAME: TYPE, such as score: float")
    if name.startswith("-"):
        raise ValueError(f"found {name!r}; a name that begins with a minus sign cannot be kept, so rename the column")
    return name.removesuffix("?"), type_, name.endswith("?")


KeptColumns = Annotated[list[Any], AfterValidator(_checked)]
"""Entries `NAME` or `NAME: TYPE`. A name that ends with `?` is of a column that files and documents may lack."""
