"""Arrow stream files, one per shard, which every data stage reads and writes.

A file is a stream of record batches; `datasets.Dataset.from_file` opens it. Readers map the file into memory and walk
through it batch by batch, so that no stage holds a corpus in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import checksum

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string())])
"""large_string: a batch may hold a single document of more than 2 GiB."""

NO_SOURCE = "(no source)"
"""The source of documents whose `source` is null."""


@contextmanager
def open_stream(path: Path) -> Iterator[Any]:
    """Yield the `pyarrow.RecordBatchStreamReader` of a file.

    Raises InputsMissing if the file does not exist, and UserError if it is not an Arrow stream or was cut off. (Arrow
    itself takes a stream that ends between two batches for a complete one.)
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
    """The position of a column of strings. Raises UserError if there is no such column, and names those that there are.

    Also raises UserError if several columns have the name, or if it is no column of strings.
    """
    names = reader.schema.names
    if column not in names:
        near = difflib.get_close_matches(column, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(map(repr, names))}{hint}")
    if names.count(column) > 1:
        raise UserError(
            f"{path} has {names.count(column)} columns named {column!r}, and nothing says which is meant; write the "
            "file again with one"
        )
    kind = reader.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}; a column of strings is needed")
    return int(names.index(column))


@dataclass(frozen=True)
class Rows:
    """The documents of a file, or those of a range of its rows."""

    path: Path
    start: int = 0
    stop: int | None = None

    def identity(self) -> str:
        """What identifies these documents: the checksum of the file or, for a range of rows, the path and the rows.

        A range lives no longer than a command, so that its place is enough.
        """
        return checksum(self.path) if self.stop is None else f"{self.path} rows {self.start} to {self.stop}"


def batches(reader: Any, rows: Rows) -> Iterator[Any]:
    """The record batches of a range of rows; none of them is empty."""
    first = 0
    for batch in reader:
        low = max(rows.start - first, 0)
        high = batch.num_rows if rows.stop is None else min(rows.stop - first, batch.num_rows)
        if low < high:
            yield batch.slice(low, high - low)
        first += batch.num_rows
        if rows.stop is not None and first >= rows.stop:
            return


def source_names(batch: Any) -> tuple[list[str], NDArray[np.int64]] | None:
    """The distinct names in the column `source`, and for each document the position of its name among them, (n,).

    None if there is no column of strings with this name: another program may have used the name for anything.
    """
    index = batch.schema.get_field_index("source")
    values = batch.column(index) if index >= 0 else pa.nulls(0)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not any(kind(values.type) for kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return None
    found = pc.fill_null(values.cast(pa.large_binary()), NO_SOURCE.encode()).dictionary_encode()
    names = [name.decode(errors="backslashreplace") for name in found.dictionary.to_pylist()]
    return names, found.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def documents_by_source(batch: Any) -> dict[str, int]:
    """The number of documents of each source in a batch; empty if the batch does not tell their sources."""
    found: dict[str, int] = {}
    if (sources := source_names(batch)) is not None:
        for name, count in zip(sources[0], np.bincount(sources[1]).tolist(), strict=True):
            found[name] = found.get(name, 0) + count
    return found


def columns(rows: Rows, column: str) -> Iterator[Any]:
    """The values of a column of strings, one `pyarrow.Array` per record batch, unchecked. They stay on disk."""
    with open_stream(rows.path) as reader:
        index = column_index(reader, column, rows.path)
        for batch in batches(reader, rows):
            yield batch.column(index)


def arrays(rows: Rows, column: str = "text", most: int = 1 << 14) -> Iterator[Any]:
    """The documents, as `pyarrow.Array`s of at most `most` strings, without nulls and all valid UTF-8.

    Raises UserError that names the first row which is null or not valid UTF-8.
    """
    first = rows.start
    for values in columns(rows, column):
        for start in range(0, len(values), most):
            part = values.slice(start, most)
            check_strings(part, rows.path, column, first)
            yield part
            first += len(part)


def check_strings(values: Any, path: Path, column: str, first: int) -> None:
    """Raise UserError, which names the first bad row, unless all strings are valid UTF-8; `first` is the first row."""
    if values.null_count:
        row = first + values.is_null().index(True).as_py()
        raise UserError(f"{path}: row {row} of column {column!r} is null; every document must be a string")
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        for row, value in enumerate(values, first):
            try:
                value.as_py()
            except UnicodeDecodeError as wrong:
                raise UserError(
                    f"{path}: row {row} of column {column!r} is not valid UTF-8 ({wrong.reason} at byte {wrong.start}; "
                    "a lone surrogate?); write the file again from text that is"
                ) from error
        raise UserError(f"{path}: column {column!r} is damaged near row {first} ({error}); write it again") from error


def texts(path: Path, column: str = "text") -> Iterator[list[str]]:
    """The documents of a file, in lists. Raises UserError on a document that is null or not valid UTF-8."""
    for values in arrays(Rows(path), column):
        yield values.to_pylist()


@contextmanager
def stream_writer(path: Path, schema: Any) -> Iterator[Any]:
    """Open a stream file for writing: `write_batch` of the writer takes record batches of this schema."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield writer


def write_stream(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Write record batches of one schema as a stream file."""
    with stream_writer(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
