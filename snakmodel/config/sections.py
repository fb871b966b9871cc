"""What recipes and cluster.yaml are made of: sections that are frozen and know their keys."""

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
    """A group of settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def suggest(found: str, valid: Iterable[str]) -> str:
    """A sentence with the nearest valid name, if any, and all valid ones."""
    names = list(valid)
    near = difflib.get_close_matches(found, names, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Valid: {', '.join(names)}."
