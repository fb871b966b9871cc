"""The file of sources: how each corpus is had, which format it has, and under which terms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator

from run_contract.errors import UserError
from snakmodel.config.load import validate
from snakmodel.config.sections import Section, suggest
from snakmodel.config.yaml_file import read_yaml

Format = Literal["lines", "jsonl", "convokit", "mediawiki", "tweets", "parquet"]
WAYS = ("url", "urls", "dataset", "ask")
"""The keys that say how a source is had; each source has exactly one of them."""
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "config": ("dataset", ()),
    "split": ("dataset", ()),
    "revision": ("dataset", ()),
    "files": ("dataset or ask", ()),
    "key": ("format", ("jsonl", "convokit", "parquet")),
    "columns": ("format", ("jsonl",)),
    "lang": ("format", ("tweets",)),
    "members": ("format", ("lines", "jsonl", "convokit", "mediawiki", "tweets")),
    "skip": ("format", ("lines", "jsonl", "convokit", "mediawiki", "tweets")),
    "min_characters": ("format", ("lines", "jsonl", "convokit", "mediawiki", "tweets")),
    "leave_out": ("format", ("lines", "jsonl", "convokit", "mediawiki", "tweets")),
}
"""Maps a key to what it depends on: a way to have the source, or its format, with the formats for which it is valid."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Source(Section):
    """A corpus: how it is had, what its files hold, and under which terms it may be used."""

    url: str | None = None
    """The address of the file, if there is one file."""
    urls: list[str] | None = Field(default=None, min_length=1)
    """The addresses of the files, in the order in which they are converted."""
    dataset: str | None = Field(default=None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """ORG/NAME of a dataset on the Hugging Face Hub; its Parquet files are downloaded."""
    config: str | None = None
    """The dataset's configuration: the folder of its Parquet files in the repository."""
    split: str = "train"
    """The dataset's split."""
    revision: str = "main"
    """The branch, tag or commit of the dataset's repository."""
    ask: str | None = None
    """Whom to ask for the files, in words; the user puts them into the folder that the command `list` names."""
    files: list[str] | None = Field(default=None, min_length=1)
    """With `ask`, the names or patterns of the files; with `dataset`, patterns of the repository's files."""
    format: Format
    """What the files hold, once they are unpacked."""
    members: list[str] = Field(default_factory=list)
    """Patterns of the files in an archive to read; all if empty. A pattern without a slash is for the file's name, one
    with a slash for its whole path; `*` matches slashes too."""
    skip: list[str] = Field(default_factory=list)
    """Patterns of the files in an archive to leave out."""
    key: str = "text"
    """The JSON key or the column that holds the text."""
    columns: list[str] = Field(default_factory=list)
    """JSON keys that are kept beside the text."""
    lang: str | None = None
    """The language of the tweets to keep, such as da; all if absent."""
    min_characters: int = Field(default=0, ge=0)
    """The number of characters below which a document is left out, without white space at both ends."""
    leave_out: list[str] = Field(default_factory=list)
    """Texts that stand for a document that is gone, such as `[deleted]`."""
    sha256: str | dict[str, str] | None = None
    """The checksum of the file or, if there are several, a mapping from their names to checksums."""
    version: str | None = None
    """The version of the corpus. If it changes, the files are downloaded again."""
    licence: str
    """The licence, or `unknown`."""
    citation: str | None = None
    """How the corpus is cited."""
    max_mb_per_second: float | None = Field(default=None, gt=0)
    """The speed at which the files are downloaded at most."""
    max_ratio: float = Field(default=200, gt=1)
    """How many times its own size a file may have when it is unpacked."""
    max_unpacked_gb: float = Field(default=1000, gt=0)
    """The number of GB that a file may have when it is unpacked."""

    @model_validator(mode="before")
    @classmethod
    def _licensed(cls, found: Any) -> Any:
        if isinstance(found, dict) and "licence" not in found:
            raise ValueError("licence: missing. Name the licence, or write `licence: unknown` if you do not know it.")
        return found

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, found: Any) -> Any:
        """YAML reads 2024-01-01 as a date and 2018 as a number; a version is text."""
        return found if found is None or isinstance(found, (dict, list)) else str(found)

    @field_validator("sha256")
    @classmethod
    def _digests(cls, found: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for digest in found.values() if isinstance(found, dict) else [found] if found else []:
            if not _SHA256.fullmatch(digest):
                raise ValueError(f"found {digest!r}, expected 64 of the characters 0-9 and a-f, as `sha256sum` prints")
        return found

    @field_validator("files")
    @classmethod
    def _below(cls, found: list[str] | None) -> list[str] | None:
        for pattern in found or []:
            if not pattern or pattern.startswith(("/", ".", "~")) or ".." in pattern.split("/"):
                raise ValueError(
                    f"found {pattern!r}, expected a name or pattern of files below the source's own folder"
                )
        return found

    @field_validator("url", "urls")
    @classmethod
    def _addresses(cls, found: str | list[str] | None) -> str | list[str] | None:
        for url in found if isinstance(found, list) else [found] if found else []:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"found {url!r}, expected an address that begins with http:// or https://")
            file_name(url)
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        ways = [way for way in WAYS if getattr(self, way) is not None]
        if len(ways) != 1:
            raise ValueError(f"found {' and '.join(ways) or 'none of them'}, expected exactly one of {', '.join(WAYS)}")
        for key in self.model_fields_set & set(_NEEDS):
            on, formats = _NEEDS[key]
            if on == "format" and self.format not in formats:
                raise ValueError(f"{key} is not for the format {self.format}, only for {', '.join(formats)}; remove it")
            if on != "format" and ways[0] not in on.split(" or "):
                raise ValueError(f"{key} is only for a source with the key {on}, and this one has {ways[0]}; remove it")
        if self.ask and not self.files:
            raise ValueError("files: missing. Name the files that the user has to put in place, such as corpus.zip.")
        if self.dataset and self.format != "parquet":
            raise ValueError(f"format is {self.format}; a dataset of the Hub is had as parquet, so write that")
        names = [file_name(url) for url in self.addresses]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"urls: several of them end with the file name {repeated[0]}; make a source of each")
        if isinstance(self.sha256, str) and len(names) != 1 and not self._is_one_file():
            raise ValueError("sha256: with several files, map each file's name to its checksum")
        return self

    def _is_one_file(self) -> bool:
        return len(self.files or []) == 1 and not re.search(r"[*?\[]", (self.files or [""])[0])

    @property
    def addresses(self) -> list[str]:
        """The addresses of the files; none for a dataset of the Hub and for files put in place by hand."""
        return self.urls or ([self.url] if self.url else [])

    @property
    def way(self) -> str:
        """How the source is had, in a few words."""
        if self.ask:
            return "by hand"
        return f"Hub: {self.dataset}" if self.dataset else urlsplit(self.addresses[0]).hostname or ""

    def checksum(self, name: str) -> str | None:
        """The checksum that the file of sources gives for a file, if it gives one."""
        return self.sha256.get(name) if isinstance(self.sha256, dict) else self.sha256

    def entry(self) -> dict[str, Any]:
        """The keys of the source as they are in the file, as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


def file_name(url: str) -> str:
    """The name of the file behind an address. Raises ValueError if its path does not end with a usable name."""
    name = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"found {url!r}, whose path does not end with a file's name; give the address of the file")
    return name


def read_sources(path: Path) -> dict[str, Source]:
    """The sources in a file, by name. Raises UserError that names the file, the key, what was found and what to do."""
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give an existing one with --sources.") from None
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: found {type(raw).__name__}, expected sources: NAME: and its keys below it")
    for name, entry in raw.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".json"):
            raise UserError(
                f"{path}: found the source name {name!r}; a name begins with a letter or digit and holds only those, "
                "dots, dashes and underscores, without .json at the end, because it becomes the name of a folder"
            )
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {name}: found {entry!r}, expected keys such as {', '.join(Source.model_fields)}")
    return {name: validate(path, f"{name}.", Source, entry) for name, entry in raw.items()}


def chosen(sources: dict[str, Source], name: str, path: Path) -> Source:
    """The source of a name. Raises UserError that lists the valid names."""
    if name not in sources:
        raise UserError(f"--source {name}: {path} has no such source. {suggest(name, sources)}")
    return sources[name]
