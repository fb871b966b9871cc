"""Reads the items of evaluation files: the text of each, with its number in the file.

A file is .jsonl, .jsonl.gz or .parquet, and an item is a line or a row. Its text is all strings in its fields, joined
by spaces in the order in which they stand there; lists and objects are searched for strings, while numbers and truth
values are left out.
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from run_contract.errors import InputsMissing, UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Evaluation:
    """The items of an evaluation file."""

    name: str
    """The file's name, with as many folders before it as tell it from the other files."""
    numbers: list[int]
    """The number of each item: its line or row, counted from 1."""
    texts: list[str]
    """The text of each item."""


def read(paths: Sequence[Path], fields: Sequence[str] = ()) -> list[Evaluation]:
    """The items of some files, by these fields or, if there are none, by all fields.

    Raises InputsMissing if a file does not exist, and UserError if a file is of another kind, damaged or empty, if none
    of the files has a field, or a file has none of the fields.
    """
    found, known = [], dict[str, None]()
    for path, name in zip(paths, names(paths), strict=True):
        numbers, texts, here = list[int](), list[str](), dict[str, None]()
        for number, item in _items(path):
            here.update(dict.fromkeys(item))
            numbers.append(number)
            texts.append(" ".join(part for key in fields or item for part in strings(item.get(key))))
        if not numbers:
            raise UserError(f"{path} holds no items; give a file with an item per line or row, or leave it out")
        if fields and not set(fields) & set(here):
            raise UserError(f"{path} has none of the fields {', '.join(fields)}; {_named(fields[0], here)}")
        known.update(here)
        found.append(Evaluation(name, numbers, texts))
    for field in fields:
        if field not in known:
            raise UserError(f"--fields {field}: no evaluation file has this field; {_named(field, known)}")
    return found


def _named(field: str, known: Iterable[str]) -> str:
    """The valid fields, and the nearest one, as the end of a message."""
    near = difflib.get_close_matches(field, list(known), 1)
    return f"the fields are {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that differ from each other. Raises UserError if a path is given twice."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    twice = next(path for place, path in enumerate(paths) if parts[place] in parts[:place])
    raise UserError(f"--against names {twice} twice; name each evaluation file once")


def strings(value: Any) -> Iterator[str]:
    """The strings in a value of JSON, at any depth, from left to right."""
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings(part)


def _items(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path}: evaluation files are {', '.join(ENDINGS)}; write the items in one of these formats")
    if not path.is_file():
        raise InputsMissing(f"--against {path} does not exist; name the evaluation files")
    try:
        yield from _rows(path) if path.name.endswith(".parquet") else _lines(path)
    except (pa.ArrowException, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or not what its name says: {error}. Fetch it again") from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a Parquet file."""
    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines; blank lines count, but are no items."""
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                item = json.loads(text) if text else {}
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}: line {number} is not JSON in UTF-8: {error}. Correct the line; each holds one item"
                ) from error
            if not isinstance(item, dict):
                raise UserError(
                    f"{path}: line {number} holds {json.dumps(item):.60}; each line must be an object with the item's "
                    "fields"
                )
            if text:
                yield number, item
