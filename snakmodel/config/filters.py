"""The sections of a recipe that say which documents are kept, marked or changed, and by which steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from snakmodel.config.sections import PROJECT, ProjectPath, Section

CUSTOM_STAGE = re.compile(r"custom-[a-z0-9-]+")
"""The names of the stages of users' own commands."""


class Language(Section):
    """The step `language`: documents or lines of some languages."""

    keep: list[Annotated[str, Field(min_length=1)]]
    """The labels to keep, such as da or [da, no]."""
    min_probability: float | None = Field(default=None, ge=0, lt=1)
    """A text passes if its probability is greater; 0.6 if absent, as in the published run. heliport has thresholds of
    its own."""
    model: str = "lid.176"
    """lid.176, heliport, or a .bin or .ftz file of fastText, such as GlotLID's."""
    unit: Literal["document", "line"] = "document"
    """What is judged, and kept or removed."""
    mode: Literal["remove", "mark"] = "remove"
    """Whether the rest is removed, or all documents get the columns `language` and `language_probability`."""
    rejected: bool = False
    """Whether what is rejected is written to `filter/rejected/`, one shard per shard."""

    @field_validator("keep", mode="before")
    @classmethod
    def _as_list(cls, keep: Any) -> Any:
        return [keep] if isinstance(keep, str) else keep

    @field_validator("model")
    @classmethod
    def _from_project(cls, model: str) -> str:
        return str(PROJECT / Path(model).expanduser()) if model.endswith((".bin", ".ftz")) else model

    @model_validator(mode="after")
    def _consistent(self) -> Language:
        if self.mode == "mark" and (self.unit == "line" or self.rejected):
            raise ValueError("mode: mark keeps whole documents and rejects none; leave out unit: line and rejected")
        if not self.keep:
            raise ValueError("keep is empty; name the languages to keep, such as da")
        return self


class Quality(Section):
    """The step `quality`: the rules of Gopher, C4 and FineWeb."""

    mode: Literal["mark", "remove"] = "mark"
    """Whether all documents are kept, with the rules that they fail in the column `quality`, or only those that fail
    none."""
    language: str = "da"
    """The language of the stop words."""
    thresholds: ProjectPath | None = None
    """A file of thresholds, such as `python -m snakmodel.filter calibrate` writes; the published ones if absent."""
    clean_lines: bool = False
    """Whether each text is replaced by the lines that the line rules of C4 keep."""


class Pii(Section):
    """The step `pii`: personal data is replaced by placeholders."""

    kinds: list[Literal["email", "ip", "iban", "national", "phone"]] | None = None
    """What is replaced; everything if absent, and national numbers only if `national` names some."""
    region: list[str] = Field(default=[])
    """The regions whose phone numbers are found without a country code, such as DK."""
    national: list[str] = Field(default=[])
    """The national numbers to find, by modules of python-stdnum, such as dk.cpr."""


class Filter(Section):
    """The steps that every document passes before deduplication, all in one pass; each is left out if it is absent."""

    language: Language | None = None
    quality: Quality | None = None
    pii: Pii | None = None
    where: str | None = Field(default=None, min_length=1)
    """A condition on the columns after the steps above; documents for which it does not hold are left out."""

    @property
    def any(self) -> bool:
        """Whether there is any step."""
        return any(value is not None for value in (self.language, self.quality, self.pii, self.where))


class Decontaminate(Section):
    """The step `decontaminate`: documents that share words with evaluation items, after deduplication."""

    against: list[ProjectPath] = Field(min_length=1)
    """The evaluation files: .jsonl, .jsonl.gz or .parquet, with an item per line or row."""
    fields: list[str] = Field(default=[])
    """The fields that hold an item's text, such as [question, choices, answer]; all strings of an item if empty."""
    ngram: int = Field(default=13, ge=1, le=100)
    """The number of words in a row that have to be shared; the published check took 8."""
    mode: Literal["mark", "remove", "cut"] = "mark"
    """Whether documents are kept with the column `contaminated`, are removed, or lose the shared words."""


class Custom(Section):
    """A user's own command, which reads one Arrow shard and writes another."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=40)
    """The stage is named custom-NAME."""
    command: str
    """The command line, with {input} and {output} for the paths of the two shards."""
    per: Literal["shard"] = "shard"

    @field_validator("command")
    @classmethod
    def _has_paths(cls, command: str) -> str:
        if "\0" in command:
            raise ValueError(f"found {command!r}, which holds a NUL character; remove it")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"found {command!r}, which is no command line: {error}") from None
        for place in ("{input}", "{output}"):
            if not any(place in word for word in words):
                raise ValueError(
                    f"found {command!r}, which does not name {place}; write {{input}} and {{output}} where the command "
                    "takes the path of the shard that it reads and of the one that it writes"
                )
        return command

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return f"custom-{self.name}"

    @property
    def missing_script(self) -> str | None:
        """The script that `python SCRIPT` names, if there is no such file."""
        program, script, *_ = [*shlex.split(self.command), ""]
        is_script = program == "python" and script.endswith(".py")
        return script if is_script and not (PROJECT / script).is_file() else None

    @property
    def paths(self) -> list[Path]:
        """The existing files and folders that the command line names, also as `--flag=PATH`.

        The system's own programs and files are left out: they are not the user's to change, and a container has its
        own.
        """
        words = [path for word in shlex.split(self.command) for path in (word, word.partition("=")[2]) if path]
        found = [PROJECT / word for word in words if "{" not in word]
        return [path for path in dict.fromkeys(found) if _is_there(path) and not _is_of_the_system(path)]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a word that is too long for a path
        return False


def _is_of_the_system(path: Path) -> bool:
    return path == Path("/") or path.parts[1:2] in (("bin",), ("dev",), ("lib",), ("sbin",), ("usr",))
