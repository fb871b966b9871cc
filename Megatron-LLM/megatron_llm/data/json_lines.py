"""Parses JSON lines into columns of text: Arrow parses a block at once; if that is not safe, each line is read alone.

Whether a line is accepted never depends on its neighbours. A line is accepted if Python's parser accepts it, or
Arrow's, which has no limits for digits and nesting. So a line that Arrow accepts within a block is also accepted
anywhere else. snakmodel/prepare/json_lines.py, which reads raw files, follows the same rule;
tests/prepare/test_json_lines.py compares the two, with a line in every position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from run_contract.errors import UserError

BOM = b"\xef\xbb\xbf"
"""The byte order mark. It may stand before any line, since a file may have been joined from several."""
SPACE = b" \t\r\n"
DECODER = json.JSONDecoder(parse_int=float)
"""Python's parser, without its limit on the digits of whole numbers."""
KINDS = {dict: "an object", list: "a list", str: "a string", float: "a number", bool: "a truth value"}


def parse(data: bytes | bytearray, keys: Sequence[str], where: str, first: int) -> dict[str, Any]:
    """The strings under the keys as large_string arrays of one length, with one document per line that is not blank.

    Raises UserError, which names the first wrong line by `where` and its number; `first` is the number of the first
    line.
    """
    return parse_lines(data, keys) or parse_line_by_line(data, keys, where, first)


def parse_lines(data: bytes | bytearray, keys: Sequence[str]) -> dict[str, Any] | None:
    """The strings under the keys, or None unless every line clearly is an object with strings under all of them.

    Arrow treats line ends as white space, so an object over two lines, or two objects on one line, must not pass as two
    lines. If every line starts with `{` and ends with `}`, no line end lies within an object, where `}` is never
    followed by `{`.
    """
    characters = np.frombuffer(data, dtype=np.uint8)
    starts, ends = lines(data)
    if not len(starts) or len(data) > 1 << 30 or not is_utf8(data):
        return None
    if (characters[starts] != ord("{")).any() or (characters[ends - 1] != ord("}")).any():
        return None
    try:
        table = arrow_json.read_json(
            pa.BufferReader(data),
            arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            arrow_json.ParseOptions(
                explicit_schema=pa.schema([(key, pa.large_string()) for key in keys]),
                unexpected_field_behavior="ignore",
            ),
        )
        table.validate(full=b"\\u" in data)  # in valid UTF-8 only escapes can make an invalid string
    except pa.ArrowException:
        return None
    if table.num_rows != len(starts) or any(column.null_count for column in table.columns):
        return None
    return {key: table.column(key).chunk(0) for key in keys}


def lines(data: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The offsets (n,) at which the lines that are not empty start and end, without their line ends."""
    characters = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1] + 1])
    ends = ends - ((ends > starts) & (characters[ends - 1] == ord("\r")))
    return starts[ends > starts], ends[ends > starts]


def is_utf8(data: bytes | bytearray) -> bool:
    """Whether bytes are valid UTF-8, without decoding them."""
    borders = pa.py_buffer(np.array([0, len(data)], dtype=np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, borders, pa.py_buffer(data)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def parse_line_by_line(data: bytes | bytearray, keys: Sequence[str], where: str, first: int) -> dict[str, Any]:
    """Parse each line alone. The result is the same, and an error names its line and its kind.

    Raises UserError.
    """
    texts: dict[str, list[str]] = {key: [] for key in keys}
    for number, line in enumerate(bytes(data).split(b"\n"), first):
        if (document := parse_line(line, keys, f"{where} {number}")) is not None:
            for key in keys:
                texts[key].append(text_of(document, key, f"{where} {number}"))
    return {key: pa.array(values, pa.large_string()) for key, values in texts.items()}


def parse_line(line: bytes, keys: Sequence[str], place: str) -> dict[str, Any] | None:
    """The object of one line, or only its strings under the keys; None for a blank line. Raises UserError."""
    bare = line.removeprefix(BOM)
    try:
        text = bare.decode()
        document = DECODER.decode(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        alone = parse_lines(bare.strip(SPACE), keys)
        if alone is None:
            raise UserError(
                f"{place} is not valid JSON: {error}; it starts {line[:40]!r}; correct or remove the line"
            ) from error
        return {key: texts[0].as_py() for key, texts in alone.items()}
    if text.strip() and not isinstance(document, dict):
        raise UserError(
            f'{place} is not a JSON object such as {{"text": "…"}}; it starts {line[:40]!r}; correct or remove the line'
        )
    return document


def text_of(document: dict[str, Any], key: str, place: str) -> str:
    """The text under a key, checked. Raises UserError."""
    text = document.get(key)
    if not isinstance(text, str):
        kind = KINDS.get(type(text), "null")
        found = f"{key!r} is {kind}" if key in document else f"it has no {key!r}, only {sorted(document)}"
        raise UserError(f"{place}: {found}; each document needs a string, and --json_keys names its key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start + 1} of {key!r} is half a surrogate pair, which is no text; correct or "
            "remove it"
        ) from error
    return text
