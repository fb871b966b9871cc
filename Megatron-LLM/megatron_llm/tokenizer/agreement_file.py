"""Keeps what tokenizer/agreement.py found for the next task: one small file per tokenizer and version of the libraries.

The file lies where the kernel of near-deduplication is kept too: in `NUMBA_CACHE_DIR` if that is set, else in
`__pycache__` beside this file, else in the user's cache folder, whichever is the first that can be written. It is
published by rename, and a damaged file counts as missing. If no folder can be written, each task makes the comparison
itself.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import unicodedata
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from megatron_llm.tokenizer.base import Tokenizer
from megatron_llm.tokenizer.characters import Characters

SOURCES = ("agreement.py", "characters.py", "gigatoken.py", "huggingface.py", "sentencepiece.py")
"""Modules whose change makes a kept file invalid."""
LIBRARIES = ("gigatoken", "tokenizers", "sentencepiece")


@dataclass(frozen=True)
class Agreement:
    """The result of comparing a tokenizer's two libraries."""

    ranges: tuple[tuple[int, int], ...] = ()
    """For each range of characters that the libraries agree on: its first character, and the one after its last."""
    why_not: str = ""
    """The reason why gigatoken may not be used at all; empty if it may."""

    @classmethod
    def on(cls, characters: Characters) -> Agreement:
        """The agreement on a set of characters."""
        borders = np.flatnonzero(np.diff(characters.table, prepend=False, append=False)).tolist()
        return cls(tuple(zip(borders[::2], borders[1::2], strict=True)))

    def characters(self) -> Characters:
        """The characters agreed on."""
        return Characters(chain.from_iterable(range(start, end) for start, end in self.ranges))


def file_name(tokenizer: Tokenizer) -> str:
    """The name of the file for this tokenizer, these libraries and this code."""
    digest = xxhash.xxh3_128()
    for source in SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    versions = [version(library) for library in LIBRARIES]
    about = [tokenizer.fingerprint, *versions, unicodedata.unidata_version, platform.machine()]
    digest.update(json.dumps(about).encode())
    return f"tokenizer-{digest.hexdigest()}.json"


def folders() -> list[Path]:
    """The folders in which the file may lie, in order of preference."""
    given = [Path(folder)] if (folder := os.environ.get("NUMBA_CACHE_DIR")) else []
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 Path's raises without home
    return [*given, Path(__file__).parent / "__pycache__", Path(user, "snakmodel")]


def read(name: str) -> Agreement | None:
    """The agreement kept under a name; None if there is no file, or only a damaged one."""
    for folder in folders():
        try:
            raw = json.loads((folder / name).read_bytes())
            if raw.pop("digest") == digest_of(raw):
                return Agreement(tuple((start, end) for start, end in raw["ranges"]), raw["why_not"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


def keep(name: str, agreement: Agreement) -> None:
    """Write an agreement to the first folder that accepts it."""
    raw = json.loads(json.dumps(asdict(agreement)))
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as aside:
                written = Path(aside, name)
                written.write_text(json.dumps({**raw, "digest": digest_of(raw)}))
                written.replace(folder / name)
            return
        except OSError:
            continue


def digest_of(raw: dict[str, object]) -> str:
    """The digest of a JSON object."""
    return xxhash.xxh3_128(json.dumps(raw, sort_keys=True).encode()).hexdigest()
