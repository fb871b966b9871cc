"""Computes a digest of what a shard reads of a file.

The digest stays the same if the file is only copied, touched or changed elsewhere. It covers the bytes of the lines,
paragraphs, row groups or record batches that begin in the part, up to their ends, and the position at which the first
of them begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet
import xxhash

from snakmodel.prepare.byte_streams import BOM
from snakmodel.prepare.input_files import TEXT, FilePart, is_compressed, suffix
from snakmodel.prepare.readers import Reading

Span = tuple[int, int]
"""The positions at which bytes that are read begin and end."""

_BLOCK = 1 << 20
"""The size of a block in bytes. It is small enough that a block stays in a core's cache between reading and
digesting."""


def part_digest(part: FilePart, reading: Reading) -> str:
    """The digest of a part in hexadecimal, or words saying that the file is shorter than the part.

    Raises OSError, or an error of pyarrow, if the file cannot be read.
    """
    path = Path(part.file)
    kind = suffix(path.name) or TEXT[0]
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < part.end:
            return f"shorter than {part.end}"
        about: Any = None
        spans: list[Span] = [(0, size)]
        if kind == ".parquet":
            spans, about = _row_groups(path, part, (reading.key, *(one.name for one in reading.keep)))
        elif kind == ".arrow":
            spans, about = _record_batches(path, part)
        elif not is_compressed(path):
            spans, about = _lines(file, part, reading.document if kind in TEXT else "line", size)
        digest = xxhash.xxh3_128(json.dumps([about, [stop == size for _, stop in spans]]).encode())
        for start, stop in spans:
            for block in _blocks(file, start, stop):
                digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO, start: int, stop: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_BLOCK))
    file.seek(start)
    while start < stop and (size := file.readinto(buffer[: stop - start])):  # type: ignore[attr-defined]
        yield buffer[:size]
        start += size


def _lines(file: BinaryIO, part: FilePart, document: str, size: int) -> tuple[list[Span], Any]:
    """The span of the lines or paragraphs that begin in a part of a text file, and what is known of the text before.

    The latter is the position of the first line and, for paragraphs, whether the line before it holds text.
    """
    if document == "file" or part.end == 0:
        return [(0, size)] if part.start == 0 else [], None
    first = 0
    if part.start > len(BOM):
        file.seek(part.start - 1)
        first = part.start - 1 + len(file.readline())
    if first >= part.end:
        return [], first
    file.seek(part.end - 1)
    stop = part.end - 1 + len(file.readline())
    if document == "line":
        return [(first, stop)], first
    within = _line_before(file, first).strip() != b""
    line = _line_before(file, stop)
    file.seek(stop)
    while line.strip():
        line = file.readline()
        stop += len(line)
    return [(first, stop)], [first, within]


def _line_before(file: BinaryIO, end: int) -> bytes:
    """The line that ends at a position; empty at the start of the file."""
    begin = max(0, end - 1)
    while begin > 0:
        size = min(_BLOCK, begin)
        file.seek(begin - size)
        found = file.read(size).rfind(b"\n") + 1
        begin -= size - found
        if found:
            break
    file.seek(begin)
    return file.read(end - begin)


def _row_groups(path: Path, part: FilePart, keys: Sequence[str]) -> tuple[list[Span], Any]:
    """The spans of these columns' bytes in the row groups that begin in a part, and what the footer says about them."""
    spans: list[Span] = []
    about: list[Any] = []
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            if part.start <= _begin(columns[0]) < part.end:
                roots = tuple(f"{key}." for key in keys)
                wanted = [one for one in columns if f"{one.path_in_schema}.".startswith(roots)] or columns
                spans += [(_begin(one), _begin(one) + one.total_compressed_size) for one in wanted]
                about.append([first, group.num_rows, [[one.physical_type, one.compression] for one in wanted]])
            first += group.num_rows
    return spans, [names, about]


def _begin(column: Any) -> int:
    return int(column.dictionary_page_offset or column.data_page_offset)


def _record_batches(path: Path, part: FilePart) -> tuple[list[Span], Any]:
    """The span of the record batches that begin in a part, and what is known about them.

    The latter is the names and types of the columns, and the number of the first row.
    """
    begin = stop = part.start
    row = first = 0
    found = False
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        while (position := source.tell()) < part.end:
            try:
                rows = reader.read_next_batch().num_rows
            except StopIteration:
                break
            if part.start <= position:
                begin, first, found = (begin, first, True) if found else (position, row, True)
                stop = source.tell()
            row += rows
        columns = [[field.name, str(field.type)] for field in reader.schema]
    return [(begin, stop)] if found else [], [columns, first]
