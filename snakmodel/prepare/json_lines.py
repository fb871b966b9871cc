"""Reads the documents of JSON lines: pyarrow reads a whole block; where it cannot be trusted, each line is read alone.

The verdict about a line does not depend on its neighbours: a line is accepted if Python's parser accepts it, or if
pyarrow's does, which has no limits for digits and nesting. Therefore, what pyarrow accepts in a block is accepted at
any place. The tokenizer's reader, megatron_llm/data/json_lines.py, keeps the same rule;
tests/prepare/test_json_lines.py compares the two readers, and all positions of a line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from snakmodel.prepare.byte_streams import TextFile, lines, one_by_one
from snakmodel.prepare.chunks import BOM, REPLACEMENT, Chunk, Faults, are_utf8, holds_nul, is_utf8, packed
from snakmodel.prepare.kept_columns import KeptColumn, Misfit, from_json

_JSON_BYTES = (1 << 31) - 2
"""The largest number of bytes that pyarrow's reader accepts at once."""
_KEYS_NAMED = 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(parse_int=float)
"""Python's parser, without its limit for the digits of whole numbers."""
_KINDS = {dict: "an object", list: "a list", str: "a string", float: "a number", bool: "a truth value"}


def json_lines(
    block: bytes, offset: int, file: TextFile, key: str, faults: Faults, kept: Sequence[KeptColumn] = ()
) -> Iterator[Chunk]:
    """Yield the string under `key`, and what is to be kept, of the object in each line of a block.

    The block begins at `offset` of the file.
    """
    for chunk in _documents(block, offset, file, key, faults):
        yield _with_kept(chunk, block, offset, file, kept, faults) if kept else chunk


def _with_kept(
    chunk: Chunk, block: bytes, offset: int, file: TextFile, kept: Sequence[KeptColumn], faults: Faults
) -> Chunk:
    """The documents with the columns to keep, without those of which a value does not fit its column."""
    rows: list[int] = []
    values: list[list[Any]] = [[] for _ in kept]
    for row, position in enumerate(chunk.positions.tolist()):
        start = position - offset
        line = block[start : block.find(b"\n", start) + 1 or len(block)].decode("utf-8", "replace")
        try:
            document = json.loads(line.removeprefix(BOM))
            found = [from_json(column, document) for column in kept]
        except Misfit as error:
            faults.leave_out("column that does not fit", partial(_problem, file, position, str(error)))
        except (ValueError, RecursionError) as error:
            faults.leave_out(
                "column that cannot be read",
                partial(_problem, file, position, f"holds values that cannot be kept in columns: {error}"),
            )
        else:
            rows.append(row)
            for column_values, value in zip(values, found, strict=True):
                column_values.append(value)
    arrays = tuple(pa.array(column_values, one.type) for column_values, one in zip(values, kept, strict=True))
    if len(rows) == len(chunk.positions):
        return chunk._replace(kept=arrays)
    return Chunk(chunk.texts.take(pa.array(rows, pa.int64())), chunk.positions[rows], arrays)


def _documents(block: bytes, offset: int, file: TextFile, key: str, faults: Faults) -> Iterator[Chunk]:
    starts, sizes, _ = lines(block)
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    column = _column(block, starts, starts + sizes - 1, key)
    if column is None:
        yield from packed(_each(block, offset, file, key, faults))
    elif len(column):
        yield Chunk(column, starts + offset)


def _column(block: bytes, firsts: NDArray[np.int64], lasts: NDArray[np.int64], key: str) -> Any:
    """The strings of a block, or None unless every line is, beyond doubt, one object with a string under the key.

    pyarrow's reader takes line ends for white space, so one object over two lines, and two objects on one line, must
    not pass for two lines. If every line begins and ends with a brace, a line cannot end within an object, because in
    JSON `}` is never followed by `{` inside an object.
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
    except pa.ArrowInvalid:
        return None
    whole = len(column) == len(firsts) and not column.null_count and are_utf8(column) and not holds_nul(column)
    return column if whole else None


def _each(block: bytes, offset: int, file: TextFile, key: str, faults: Faults) -> Iterator[tuple[int, str]]:
    for position, raw in one_by_one(block, offset):
        line = faults.decode(raw, partial(file.byte, position))
        if line is None:
            continue
        bare = line.removeprefix(BOM)
        faults.byte_order_marks += len(line) - len(bare)
        if bare.strip() and (value := _value(bare, key, faults, partial(_problem, file, position))) is not None:
            yield position, value


def _value(line: str, key: str, faults: Faults, say: Callable[[str], str]) -> str | None:
    """The string under a key, or None if the line is left out."""
    try:
        document = _parsed(line, key)
    except ValueError as error:
        reason, problem = "not JSON", f"is not JSON: {error}"
    else:
        value = document.get(key) if isinstance(document, dict) else None
        if isinstance(value, str):
            return _characters(value, faults, say)
        if not isinstance(document, dict):
            reason, problem = "not an object", f"holds {_kind(document)}, not an object with a key {key!r}"
        elif key in document:
            reason, problem = "not a string", f"has {_kind(value)}, not a string, under {key!r}"
        else:
            near = difflib.get_close_matches(key, document, 1)
            hint = f"; did you mean data.key: {near[0]}?" if near else " (data.key names the one with the text)"
            reason, problem = "no such key", f"has no key {key!r}, only {list(document)[:_KEYS_NAMED]}{hint}"
    faults.leave_out(reason, partial(say, problem))
    return None


def _parsed(line: str, key: str) -> Any:
    """The value of a line; if only pyarrow accepts the line, an object with just the value under the key.

    Raises ValueError if neither parser accepts it.
    """
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        block = line.strip(_SPACE).encode()
        column = _column(block, np.zeros(1, np.int64), np.array([len(block) - 1]), key)
        if column is None:
            raise ValueError(error) from error
        return {key: column[0].as_py()}


def _kind(value: object) -> str:
    """The name of a value's type in JSON, with its article."""
    return "null" if value is None else _KINDS[type(value)]


def _characters(value: str, faults: Faults, say: Callable[[str], str]) -> str | None:
    """A string without lone surrogates and NUL, or None if it is left out.

    JSON can spell these, but they are not characters of a text.
    """
    if not _SURROGATE.search(value):
        nul = r"spells NUL (\u0000), which text does not hold; errors: replace puts U+FFFD there"
        return faults.without_nul(value, partial(say, nul))
    problem = "spells half a surrogate pair (\\ud800 to \\udfff); errors: replace puts U+FFFD there"
    if not faults.replace("lone surrogate", partial(say, problem)):
        return None
    return _SURROGATE.sub(REPLACEMENT, value).replace("\0", REPLACEMENT)


def _problem(file: TextFile, position: int, what: str) -> str:
    remedy = "Correct the file, or set errors to skip to leave such lines out"
    return f"{file.path}: line {file.line(position)} {what}. {remedy}"
