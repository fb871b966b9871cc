"""The base class of the sections of recipes and cluster.yaml, which are frozen and know their keys."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

PROJECT = Path(__file__).resolve().parents[2]


def _from_project(path: Path) -> Path:
    return PROJECT / path.expanduser()


ProjectPath = Annotated[Path, AfterValidator(_from_project)]


class Section(BaseModel):
    """A group of settings, which is frozen and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        types = {annotation, *typing.get_args(annotation)}
        if isinstance(value, bool) and types & {int, float} and bool not in types:
            raise ValueError(f"found {value}, expected a number")
        return value


def suggest(found: str, valid: Iterable[str]) -> str:
    """A message with the nearest valid name, if there is one, and all valid names."""
    names = list(valid)
    near = difflib.get_close_matches(found, names, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Valid: {', '.join(names)}."
