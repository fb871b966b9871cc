"""The base class of the sections of recipes and cluster.yaml, which are frozen and know their keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

PROJECT = Path(__file__).resolve().parents[2]


def _from_project(path: Path) -> Path:
    return PROJECT / path.expanduser()


ProjectPath = Annotated[Path, AfterValidator(_from_project)]


class Section(BaseModel):
    """A group of settings, which is frozen and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def suggest(found: str, valid: Iterable[str]) -> str:
    """A message with the nearest valid name, if there is one, and all valid names."""
    names = list(valid)
    near = difflib.get_close_matches(found, names, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Valid: {', '.join(names)}."
