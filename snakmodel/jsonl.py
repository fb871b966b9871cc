"""The documents of JSON lines: pyarrow reads a block at once; where it cannot be trusted, each line is read alone."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from snakmodel.chunks import Chunk, Faults, is_utf8, packed
from snakmodel.streams import byte_place, line_number, lines, one_by_one

_JSON_BYTES = (1 << 31) - 2
"""What pyarrow's reader takes at once."""
_KEYS_NAMED = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


def json_lines(block: bytes, offset: int, path: Path, key: str, faults: Faults) -> Iterator[Chunk]:
    """The string under `key` of each line's object."""
    starts, sizes, _ = lines(block)
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    column = _column(block, starts, starts + sizes - 1, key)
    if column is None:
        yield from packed(_each(block, offset, path, key, faults))
    elif len(column):
        yield column, starts + offset


def _column(block: bytes, firsts: NDArray[np.int64], lasts: NDArray[np.int64], key: str) -> Any:
    """The strings of a block; None where some line is not, beyond doubt, one object with a string under the key.

    pyarrow's reader takes line ends for white space: one object over two lines, and two on one, must not pass as two
    lines. Between braces a line cannot end within an object, since `}` is never followed by `{` there.
    """
    data = np.frombuffer(block, np.uint8)
    if len(block) > _JSON_BYTES or not is_utf8(block):
        return None
    if (data[firsts] != ord("{")).any() or (data[lasts] != ord("}")).any():
        return None
    if not len(firsts):
        return pa.array([], pa.large_string())
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pyarrow.json.ParseOptions(pa.schema([(key, pa.large_string())]), unexpected_field_behavior="ignore"),
        )
        column = table.column(key).combine_chunks()
        column.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return column if len(column) == len(firsts) and not column.null_count else None


def _each(block: bytes, offset: int, path: Path, key: str, faults: Faults) -> Iterator[tuple[int, str]]:
    for position, raw in one_by_one(block, offset):
        line = faults.decode(raw, partial(byte_place, path, position))
        if line is None or not line.strip():
            continue
        value = _value(line, key, faults, partial(_problem, path, position))
        if value is not None:
            yield position, value


def _value(line: str, key: str, faults: Faults, say: Callable[[str], str]) -> str | None:
    """The string under a key, or None if the line is left out."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason, problem = "not JSON", f"is not JSON: {error}"
    else:
        value = document.get(key) if isinstance(document, dict) else None
        if isinstance(value, str):
            return _characters(value, faults, say)
        if not isinstance(document, dict):
            reason, problem = "not an object", f"holds a {type(document).__name__}, not an object with a key {key!r}"
        elif key in document:
            reason, problem = "not a string", f"has a {type(value).__name__}, not a string, under {key!r}"
        else:
            near = difflib.get_close_matches(key, document, 1)
            hint = f"; did you mean data.key: {near[0]}?" if near else " (data.key names the one with the text)"
            reason, problem = "no such key", f"has no key {key!r}, only {list(document)[:_KEYS_NAMED]}{hint}"
    faults.leave_out(reason, partial(say, problem))
    return None


def _characters(value: str, faults: Faults, say: Callable[[str], str]) -> str | None:
    """A string without lone surrogates, which JSON can spell but which are no characters."""
    if not _SURROGATE.search(value):
        return value
    problem = "spells half a surrogate pair (\\ud800 to \\udfff); errors: replace puts U+FFFD there"
    return _SURROGATE.sub("\ufffd", value) if faults.replace("lone surrogate", partial(say, problem)) else None


def _problem(path: Path, position: int, what: str) -> str:
    line = line_number(path, position)
    return f"{path}: line {line} {what}. Correct the file, or set errors to skip to leave such lines out"
