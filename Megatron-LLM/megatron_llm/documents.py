"""Files of documents -> blocks of some MB -> columns of text, in order, with the place of every mistake.

Blocks are cut by one thread, which only reads; `columns` parses and checks a block, on any thread. JSON lines are
parsed by Arrow; a block that it does not take, or reads otherwise than one object a line, is parsed line by line.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from megatron_llm.files import InputsMissing, UserError

BLOCK_BYTES = 1 << 22
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".arrow")
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
SOURCE = "source"
"""The column of an Arrow file that names each document's source."""
ONE_SOURCE = "all"
"""The source of documents in a file that names none."""
NO_SOURCE = "(no source)"
"""The source of documents whose own is null."""


@dataclass(frozen=True)
class Block:
    """Some consecutive documents of one file."""

    where: str
    """The file and what it counts in, for messages: `corpus.jsonl, line`."""
    first: int
    """Number of the first document in its file, from 1."""
    content: Any
    """Whole lines (bytes), or an Arrow record batch."""


@dataclass(frozen=True)
class Columns:
    """The documents of a block: texts of one length for each key, no nulls, valid UTF-8."""

    texts: dict[str, Any]
    """Key -> large_string array."""
    sources: Any
    """Dictionary-encoded strings, one a document."""


def find_inputs(pattern: str) -> list[Path]:
    """The input files, by name; InputsMissing when there is none."""
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207 takes absolute patterns
    paths = [Path(name) for name in names]
    if not paths:
        raise InputsMissing(f"--input {pattern}: no such file, and no file matches it")
    for path in paths:
        if not path.name.endswith(SUFFIXES) or not path.is_file():
            raise UserError(
                f"--input {path}: not a file of documents; valid are {', '.join(SUFFIXES)}. "
                "Write plain text as JSON lines first"
            )
    return paths


def read_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    """The documents of one file. Raises UserError when it is not whole."""
    return read_arrow(path, keys) if path.suffix == ".arrow" else read_lines(path)


def read_lines(path: Path) -> Iterator[Block]:
    """Lines of JSON, unparsed; a line ends at the newline byte and nowhere else."""
    first, rest = 1, b""
    try:
        with pa.input_stream(str(path), compression="detect") as file:
            while data := file.read(BLOCK_BYTES):
                end = data.rfind(b"\n") + 1
                if end:
                    block = rest + data[:end]
                    yield Block(f"{path}, line", first, block)
                    first += block.count(b"\n")
                    rest = b""
                rest += data[end:]
    except OSError as error:
        raise UserError(f"{path} cannot be read after line {first - 1}: {error}; write it again") from error
    if rest:
        yield Block(f"{path}, line", first, rest)


def read_arrow(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    """Rows of an Arrow stream, memory-mapped: small batches put together, large ones sliced."""
    first = 1
    try:
        check_whole(path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            check_columns(path, reader.schema, keys)
            names = [*keys, *([SOURCE] if SOURCE not in keys and names_sources(path, reader.schema) else [])]
            for batch in regrouped(reader, names):
                yield Block(f"{path}, row", first, batch)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Arrow stream after row {first - 1}: {error}; write it again") from error


def check_whole(path: Path) -> None:
    """A stream that was cut between two batches reads without an error; its end marker is missing."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("its end marker is missing")


def check_columns(path: Path, schema: Any, names: Sequence[str]) -> None:
    """Raise UserError unless the columns are there and hold strings."""
    for name in names:
        if name not in schema.names:
            raise UserError(f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}")
        kind = schema.field(name).type
        if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string)):
            raise UserError(f"{path}: column {name!r} holds {kind}; a column of strings is needed")


def names_sources(path: Path, schema: Any) -> bool:
    """Whether there is one column of strings by which documents are counted; what else it holds is nobody's concern."""
    index = schema.get_field_index(SOURCE)
    if index < 0:
        return False
    kind = schema.field(index).type
    strings = kind.value_type if pa.types.is_dictionary(kind) else kind
    named = any(is_kind(strings) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    if not named:
        print(f"note: {path}: {SOURCE!r} holds {kind}, so documents are not counted by source", file=sys.stderr)
    return named


def regrouped(batches: Any, names: Sequence[str]) -> Iterator[Any]:
    """Record batches of large_string columns with about BLOCK_BYTES of text each, or a single longer document."""
    schema = pa.schema([(name, pa.large_string()) for name in names])
    waiting: list[Any] = []
    size = 0
    for batch in batches:
        table = pa.Table.from_batches([batch.select(list(names))]).cast(schema)
        for piece in table.to_batches():
            for part in sliced(piece):
                waiting.append(part)
                size += sum(int(offsets(column)[-1] - offsets(column)[0]) for column in part.columns)
                if size >= BLOCK_BYTES:
                    yield pa.concat_batches(waiting)
                    waiting, size = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def sliced(batch: Any) -> Iterator[Any]:
    """A batch cut at the documents in which its first column passes another BLOCK_BYTES."""
    ends = offsets(batch.column(0))
    marks = np.arange(ends[0], ends[-1], BLOCK_BYTES)[1:]
    borders = np.unique(np.concatenate([[0], np.searchsorted(ends, marks), [len(batch)]]))
    return (batch.slice(a, b - a) for a, b in zip(borders.tolist(), borders[1:].tolist(), strict=False))


def offsets(texts: Any) -> NDArray[np.int64]:
    """Where the texts of a large_string array of n start and end in its bytes, (n + 1,) int64."""
    if not len(texts):
        return np.zeros(1, dtype=np.int64)
    return np.frombuffer(texts.buffers()[1], dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]


def columns(block: Block, keys: Sequence[str]) -> Columns:
    """Parse and check a block. Raises UserError that names the line or row of the first mistake."""
    if isinstance(block.content, bytes):
        texts = parse_lines(block.content, keys) or parse_line_by_line(block, keys)
        count = len(texts[keys[0]])
        return Columns(texts, named(None, count))
    found = dict(zip(block.content.schema.names, block.content.columns, strict=True))
    for name in keys:
        column = found[name]
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{block.where} {block.first + row}: {name!r} is None; each document needs a string")
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"{block.where}s from {block.first} on, {name!r}: {error}; write the file again") from error
    return Columns({key: found[key] for key in keys}, named(found.get(SOURCE), len(block.content)))


def named(column: Any, count: int) -> Any:
    """The sources of so many documents, dictionary-encoded strings, given their column of large_string, if any.

    A null is a document without a source; bytes that are no UTF-8 are escaped.
    """
    if column is None:
        return pa.DictionaryArray.from_arrays(np.zeros(count, dtype=np.int32), pa.array([ONE_SOURCE]))
    found = pc.fill_null(column.cast(pa.large_binary()), NO_SOURCE.encode()).dictionary_encode()
    names = [name.decode(errors="backslashreplace") for name in found.dictionary.to_pylist()]
    distinct = {name: place for place, name in enumerate(dict.fromkeys(names))}
    codes = np.array([distinct[name] for name in names], dtype=np.int32)[found.indices.to_numpy()]
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(distinct)))


def parse_lines(data: bytes, keys: Sequence[str]) -> dict[str, Any] | None:
    """The strings under the keys, or None when some line is not plainly an object with strings under all of them."""
    characters = np.frombuffer(data, dtype=np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(characters[:-1] == ord("\n")) + 1])
    if len(data) > 1 << 30 or (characters[starts] != ord("{")).any():
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
        table.validate(full=True)
    except pa.ArrowException:
        return None
    if table.num_rows != len(starts) or any(column.null_count for column in table.columns):
        return None
    return {key: table.column(key).chunk(0) for key in keys}


def parse_line_by_line(block: Block, keys: Sequence[str]) -> dict[str, Any]:
    """The same by Python's parser, which says where and what a mistake is."""
    lines = block.content.removesuffix(b"\n").split(b"\n")
    texts: dict[str, list[str]] = {key: [] for key in keys}
    for number, line in enumerate(lines, block.first):
        document = parse(line, f"{block.where} {number}")
        for key in keys:
            texts[key].append(text_of(document, key, f"{block.where} {number}"))
    return {key: pa.array(values, pa.large_string()) for key, values in texts.items()}


def parse(line: bytes, place: str) -> dict[str, Any]:
    """One line of JSON lines."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON: {error}; it starts {line[:40]!r}") from error
    if not isinstance(document, dict):
        raise UserError(f'{place} is not a JSON object such as {{"text": "…"}}; it starts {line[:40]!r}')
    return document


def text_of(document: dict[str, Any], key: str, place: str) -> str:
    """The text under a key, checked."""
    text = document.get(key)
    if not isinstance(text, str):
        found = f"{key!r} is {text!r:.40}" if key in document else f"there is no {key!r}, only {sorted(document)}"
        raise UserError(f"{place}: {found}; each document needs a string, and --json_keys names its key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: character {error.start + 1} of {key!r} is half a surrogate pair; mend it") from error
    return text
