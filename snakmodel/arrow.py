"""Arrow stream files, one a shard: what every data stage reads and writes.

A file is a stream of record batches (`datasets.Dataset.from_file` opens it). Readers map it and walk it batch by batch,
so no stage holds a corpus in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from snakmodel.publish import InputsMissing, UserError

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string())])
"""large_string: a batch may hold a single document of more than 2 GiB."""


@contextmanager
def open_stream(path: Path) -> Iterator[Any]:
    """Yield the `pyarrow.RecordBatchStreamReader` of a file.

    Raises InputsMissing if the file is absent, UserError if it is not an Arrow stream or was cut off: Arrow itself
    takes a stream that ends between two batches for a complete one.
    """
    if not path.is_file():
        raise InputsMissing(f"{path} does not exist; run the step that writes it first")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(END_OF_STREAM)))
        complete = file.read() == END_OF_STREAM
    if not complete:
        raise UserError(f"{path} ({size} bytes) is not a complete Arrow stream file; run the step that writes it again")
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{path} is not an Arrow stream file ({error}); run the step that writes it again"
            ) from error
        with reader:
            yield reader


def column_index(reader: Any, column: str, path: Path) -> int:
    """The position of a column of strings. Raises UserError naming the columns there are."""
    names = reader.schema.names
    if column not in names:
        near = difflib.get_close_matches(column, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(map(repr, names))}{hint}")
    kind = reader.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}; a column of strings is needed")
    return int(names.index(column))


def texts(path: Path, column: str = "text") -> Iterator[list[str]]:
    """The documents of a file, one list a record batch. Raises UserError on a document that is null."""
    with open_stream(path) as reader:
        index = column_index(reader, column, path)
        first = 0
        for batch in reader:
            values = batch.column(index)
            if values.null_count:
                row = first + values.to_pylist().index(None)
                raise UserError(f"{path}: row {row} of column {column!r} is null; every document must be a string")
            yield values.to_pylist()
            first += batch.num_rows


def write_stream(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Write record batches of one schema as a stream file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
