"""The section of a recipe that says what the data card tells about each source."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from snakmodel.config.sections import Section

UNKNOWN = "unknown"
"""What a recipe writes for a licence that is not known."""
_CLOSED = re.compile(r"proprietary|all[ -]rights[ -]reserved|confidential|private|internal|no[ -]redistribution", re.I)


def _day(value: Any) -> Any:
    """A date as text; YAML reads one without quotes as a date. Raises ValueError if it is none."""
    if type(value) is date:
        return value.isoformat()
    if isinstance(value, str):
        try:
            if date.fromisoformat(value).isoformat() == value:
                return value
        except ValueError:
            pass
        raise ValueError(f"found {value!r}; write a date as YYYY-MM-DD")
    return value


Day = Annotated[str, BeforeValidator(_day)]


def forbids_public(licence: str) -> bool:
    """Whether a licence, by its name, forbids that a model made from the text is made public."""
    return bool(_CLOSED.search(licence))


class SourceCard(Section):
    """What is known of one source that was not fetched by `snakmodel.collect`, which records it itself."""

    licence: str
    """The licence of the text, such as cc0-1.0; `unknown` if it is not known."""
    public: bool | None = None
    """Whether a model made from the text may be made public. If absent, the name of the licence decides: it forbids
    that if it says proprietary, all rights reserved, confidential, private, internal or no redistribution."""
    title: str | None = None
    url: str | None = None
    version: str | None = None
    cite: str | None = None
    """The publication to cite."""
    retrieved: Day | None = None
    """The date of retrieval, YYYY-MM-DD."""

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, version: Any) -> Any:
        """YAML reads 2018 as a number and 2024-01-01 as a date; a version is text."""
        return version if version is None or isinstance(version, (dict, list)) else str(version)

    @field_validator("licence")
    @classmethod
    def _named(cls, licence: str) -> str:
        if not licence.strip():
            raise ValueError("is empty; name the licence, or write `unknown`")
        return licence


class DataCard(Section):
    """The data card of the run. It is written if the recipe has this section, which may be empty (`data_card: {}`)."""

    title: str | None = None
    """The name of the corpus; that of the run if absent."""
    description: str | None = None
    published: Day | None = None
    """The date of publication, YYYY-MM-DD."""
    sources: dict[str, SourceCard] = Field(default={})
    """Maps names of sources to what is known of them."""
