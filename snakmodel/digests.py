"""A digest of what a shard reads of a file, the same where the file is only copied, touched or changed elsewhere.

The bytes are those that decide which documents begin in the part and what they are: the range itself, the rest of the
line, paragraph, row group or record batch in which it ends, and whatever is looked at before it to find the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet
import xxhash

from snakmodel.readers import Reading
from snakmodel.sources import TEXT, Part, is_compressed, suffix

Span = tuple[int, int]
"""Where bytes that are read begin and end."""

_BLOCK = 1 << 20
"""Small enough to stay in a core's cache between reading and digesting."""


def part_digest(part: Part, reading: Reading) -> str:
    """The digest of a part, in hexadecimal. Raises OSError, or pyarrow's errors, where the file cannot be read."""
    path = Path(part.file)
    kind = suffix(path.name) or TEXT[0]
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < part.end:
            return f"shorter than {part.end}"
        about: Any = None
        spans: Iterable[Span] = [(0, size)]
        if kind == ".parquet":
            spans, about = _row_groups(path, part, reading.key)
        elif kind == ".arrow":
            spans, about = _record_batches(path, part)
        elif not is_compressed(path):
            spans = _lines(file, part, reading.document if kind in TEXT else "line", size)
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


def _lines(file: BinaryIO, part: Part, document: str, size: int) -> list[Span]:
    """The span of the lines, or paragraphs, that begin in a part of a file of text; or of the whole file."""
    if document == "file" or part.end == 0:
        return [(0, size)] if part.start == 0 else []
    start, stop = max(0, part.start - 1), part.end
    file.seek(part.end - 1)
    last = file.readline()
    stop += len(last) - 1
    if document == "blank-line":
        start = _line_before(file, start)
        begin = _line_before(file, stop - 1)
        file.seek(begin)
        line = file.read(stop - begin)
        while line.strip():
            line = file.readline()
            stop += len(line)
    return [(start, stop)]


def _line_before(file: BinaryIO, position: int) -> int:
    """Where the line begins that holds the byte before `position`, or ends with it."""
    while position > 0:
        begin = max(0, position - _BLOCK)
        file.seek(begin)
        found = file.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0


def _row_groups(path: Path, part: Part, key: str) -> tuple[list[Span], Any]:
    """The bytes of the column in the row groups that begin in a part, and what the footer says of these."""
    spans: list[Span] = []
    about: list[Any] = []
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            if part.start <= _begin(columns[0]) < part.end:
                wanted = [one for one in columns if f"{one.path_in_schema}.".startswith(f"{key}.")] or columns
                spans += [(_begin(one), _begin(one) + one.total_compressed_size) for one in wanted]
                about.append([first, group.num_rows, [[one.physical_type, one.compression] for one in wanted]])
            first += group.num_rows
    return spans, [names, about]


def _begin(column: Any) -> int:
    return int(column.dictionary_page_offset or column.data_page_offset)


def _record_batches(path: Path, part: Part) -> tuple[list[Span], Any]:
    """The bytes of the record batches that begin in a part, the columns, and the number of the first row."""
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
