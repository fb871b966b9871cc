"""What is known of each source of a run, from the records of `collect` in the data folder and from the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.collect.places import Place
from snakmodel.collect.record import read_record
from snakmodel.config.data_card import UNKNOWN, forbids_public
from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import suggest


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
    return Place(folder, name).record


def _facts(recipe: Recipe, name: str) -> SourceFacts:
    record = read_record(record_path(recipe.data.path, name))
    said = recipe.data_card.sources.get(name) if recipe.data_card else None
    known: dict[str, Any] = {}
    if record is not None:
        entry = record["source"]
        urls = entry.get("urls") or [entry.get("url")]
        hub = f"https://huggingface.co/datasets/{entry['dataset']}" if "dataset" in entry else None
        known = {"url": hub or urls[0], "version": entry.get("version"), "cite": entry.get("citation")}
        known |= {"licence": entry.get("licence"), "retrieved": _retrieved(record)}
    if said is not None:
        known |= {key: value for key, value in said.model_dump(exclude={"public"}).items() if value is not None}
    licence = known.pop("licence", None) or UNKNOWN
    public = said.public if said and said.public is not None else not forbids_public(licence)
    return SourceFacts(name, licence, public, collected=record, **known)


def _retrieved(record: Mapping[str, Any]) -> str:
    """The day of the last download, in UTC."""
    return max((str(one["retrieved"]) for one in record["downloads"]), default=str(record["collected"]))[:10]


def refuse_unknown(recipe: Recipe, names: Set[str]) -> None:
    """Raise UserError if the data card tells of a source that is neither in the run nor a folder of the text."""
    told = recipe.data_card.sources if recipe.data_card else ()
    if unknown := next((one for one in told if one not in names and not (recipe.data.path / one).exists()), None):
        raise UserError(f"data_card.sources: the run has no source {unknown}. {suggest(unknown, sorted(names))}")


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
