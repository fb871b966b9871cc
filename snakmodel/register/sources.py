"""What is known of each source of a run, from the records of `collect` in the data folder and from the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.config.data_card import UNKNOWN, forbids_public
from snakmodel.config.recipe import Recipe

RECORDS = ".collected"
"""The folder of the records, below the data folder."""


@dataclass(frozen=True)
class SourceFacts:
    """What the data card says of one source."""

    name: str
    licence: str = UNKNOWN
    public: bool = True
    """Whether a model made from the text may be made public."""
    title: str | None = None
    url: str | None = None
    version: str | None = None
    cite: str | None = None
    retrieved: str | None = None
    collected: Mapping[str, Any] | None = None
    """The record of `collect`; None if the source was put there by hand."""


def source_facts(recipe: Recipe, names: Iterable[str]) -> list[SourceFacts]:
    """What is known of these sources, in this order. Raises UserError if a record cannot be read."""
    return [_facts(recipe, name) for name in names]


def record_path(folder: Path, name: str) -> Path:
    """The place of the record that `collect` leaves about a source."""
    return folder / RECORDS / f"{name}.json"


def _facts(recipe: Recipe, name: str) -> SourceFacts:
    path = record_path(recipe.data.path, name)
    record = _record(path) if path.is_file() else None
    said = recipe.data_card.sources.get(name) if recipe.data_card else None
    if said is not None:
        known = {key: value for key, value in said.model_dump().items() if key != "public"}
    elif record is not None:
        entry = record.get("source", {})
        known = {key: entry.get(key) for key in ("title", "url", "version", "cite")}
        known |= {
            "licence": entry.get("licence") or UNKNOWN,
            "retrieved": str(record.get("retrieved", ""))[:10] or None,
        }
    else:
        known = {}
    licence = known.get("licence", UNKNOWN)
    declared = said.public if said else (record or {}).get("source", {}).get("public")
    public = declared if declared is not None else not forbids_public(licence)
    return SourceFacts(name, public=public, collected=record, **{**known, "licence": licence})


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}, expected an object")
    except ValueError as error:
        raise UserError(f"{path} is no record of a collected source ({error}); collect the source again") from error
    return found


def refuse_private(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise UserError if the recipe makes the model public although the licence of a source forbids that."""
    if not recipe.push.public:
        return
    closed = [one for one in source_facts(recipe, names) if not one.public]
    if closed:
        named = ", ".join(f"{one.name} ({one.licence})" for one in closed)
        raise UserError(
            f"push.public is true, but the licence of a source forbids it: {named}. Leave the source out of "
            "data.sources, set push.public to false, or, if you have the permission, say `public: true` for it in "
            "data_card.sources"
        )
