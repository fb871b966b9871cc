"""Reads the documents in a column of Parquet files and of the Arrow streams that `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from run_contract.errors import UserError
from snakmodel.prepare.chunks import CHUNK_BYTES, CHUNK_DOCUMENTS, Chunk, Faults, are_utf8, holds_nul, packed
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.kept_columns import KeptColumn, from_table
from snakmodel.shards.arrow_stream import END_OF_STREAM, column_index


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Turn the errors that pyarrow raises about a file into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        kind = path.suffix.removeprefix(".").capitalize()
        raise UserError(f"{path} cannot be read as {kind}: {error}. Fetch the file or write it again") from error


def parquet_column(part: FilePart, key: str, kept: Sequence[KeptColumn], faults: Faults) -> Iterator[Chunk]:
    """Yield the documents of a column, with the columns to keep, from the row groups that begin in the part."""
    path = Path(part.file)
    with _understood(path), pyarrow.parquet.ParquetFile(path) as file:
        index = column_index(file.schema_arrow.empty_table(), key, path)
        names = [key, *(one.name for one in kept if one.name in file.schema_arrow.names)]
        first = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            begin = about.column(0).dictionary_page_offset or about.column(0).data_page_offset
            if part.start <= begin < part.end:
                row = first
                width = about.column(index).total_uncompressed_size // max(1, about.num_rows)
                batch_size = max(1, min(CHUNK_DOCUMENTS, CHUNK_BYTES // max(1, width)))
                for batch in file.iter_batches(batch_size, [group], names):
                    yield from _with_kept(batch, key, kept, row, path, faults)
                    row += batch.num_rows
            first += about.num_rows


def arrow_column(part: FilePart, key: str, kept: Sequence[KeptColumn], faults: Faults) -> Iterator[Chunk]:
    """Yield the documents of a column, with the columns to keep, from the record batches that begin in the part."""
    path = Path(part.file)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise UserError(f"{path} is not a complete Arrow stream, as `datasets` saves it; fetch or save it again")
    with _understood(path), pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        column_index(reader, key, path)
        row = 0
        while (begin := source.tell()) < part.end:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            if part.start <= begin:
                yield from _with_kept(batch, key, kept, row, path, faults)
            row += batch.num_rows


def _with_kept(
    batch: Any, key: str, kept: Sequence[KeptColumn], first: int, path: Path, faults: Faults
) -> Iterator[Chunk]:
    """Yield the documents of a record batch whose first row is row `first` of the file, with the columns to keep."""
    columns = [
        from_table(one, batch.column(one.name), path) if one.name in batch.schema.names else _absent(one, batch, path)
        for one in kept
    ]
    for chunk in _rows(batch.column(key), first, path, faults):
        rows = pa.array(chunk.positions - first)
        yield chunk._replace(kept=tuple(column.take(rows) for column in columns))


def _absent(column: KeptColumn, batch: Any, path: Path) -> Any:
    """Nulls for a column that a file lacks. Raises UserError if it is not optional."""
    if not column.optional:
        names = ", ".join(map(repr, batch.schema.names))
        raise UserError(
            f"{path} has no column {column.name!r}, which data.keep names; its columns are {names}. Write "
            f'"{column.name}?" in data.keep if files may lack it'
        )
    return pa.nulls(batch.num_rows, column.type)


def _rows(values: Any, first: int, path: Path, faults: Faults) -> Iterator[Chunk]:
    for start in range(0, len(values), CHUNK_DOCUMENTS):
        some = values.slice(start, CHUNK_DOCUMENTS)
        positions = np.arange(len(some)) + first + start
        column = some.cast(pa.large_string())
        if not column.null_count and are_utf8(column) and not holds_nul(column):
            yield Chunk(column, positions)
        else:
            yield from packed(_rows_one_by_one(column, first + start, path, faults))


def _rows_one_by_one(column: Any, first: int, path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    for row, raw in enumerate(column.cast(pa.large_binary()).to_pylist(), first):
        if raw is None:
            null = f"{path}: row {row} is null; every document must be a string, or set errors to skip to leave it out"
            faults.leave_out("null", partial(str, null))
        elif (text := faults.decode(raw, partial(_row, path, row))) is not None:
            yield row, text


def _row(path: Path, row: int, at: int) -> str:
    return f"{path}: row {row}, byte {at} of it,"
