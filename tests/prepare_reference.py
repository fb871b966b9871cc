"""The plainest way to read text: line by line, decoded one by one. prepare must give the same documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from run_contract.errors import UserError
from snakmodel.prepare import shard_writer
from snakmodel.prepare.byte_streams import BOM
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.readers import BACKWARD_BLOCK, Reading
from snakmodel.prepare.shard_writer import BATCH_CHARACTERS, BATCH_DOCUMENTS, Cleaning, ShardCounts
from snakmodel.shards.arrow_stream import SCHEMA, write_stream


def raw_documents(part: FilePart, document: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document whose first byte lies in the part, line ends included, the BOM left out."""
    with Path(part.file).open("rb") as file:
        origin = len(BOM) if file.read(len(BOM)) == BOM else 0
        if document == "file":
            if part.start == 0 < part.end:
                yield file.seek(origin), file.read()
            return
        position = _seek_line(file, max(part.start, origin), origin)
        if document == "line":
            yield from _lines(file, position, part.end)
        else:
            within = _follows_text(file, position, origin)
            file.seek(position)
            yield from _blocks(file, position, part.end, within)


def _seek_line(file: BinaryIO, start: int, origin: int) -> int:
    """Move to the first line that begins at `start` or later, and give its offset."""
    if start == origin:
        return file.seek(origin)
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _lines(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, bytes]]:
    while position < end and (line := file.readline()):
        yield position, line
        position += len(line)


def _blocks(file: BinaryIO, position: int, end: int, within: bool) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank ones; `within`: the first lines continue a document that an earlier range owns."""
    lines: list[bytes] = []
    first = position
    while (lines or position < end) and (line := file.readline()):
        if not line.strip():
            if lines:
                yield first, b"".join(lines)
            lines, within = [], False
        elif not within:
            first = first if lines else position
            lines.append(line)
        position += len(line)
    if lines:
        yield first, b"".join(lines)


def _follows_text(file: BinaryIO, position: int, origin: int) -> bool:
    """Whether the line that ends just before `position` holds more than white space."""
    end = position - 1
    while end > origin:
        begin = max(origin, end - BACKWARD_BLOCK)
        file.seek(begin)
        _, feed, line = file.read(end - begin).rpartition(b"\n")
        if line.strip():
            return True
        if feed:
            return False
        end = begin
    return False


def documents(part: FilePart, document: str, errors: str, counts: ShardCounts) -> Iterator[str]:
    """The documents of a part, decoded, CRLF made LF, without line feeds at their ends; empty ones are left out."""
    path = Path(part.file)
    for offset, raw in raw_documents(part, document):
        text = _decode(raw, path, offset, errors, counts)
        if text is None:
            continue
        counts.byte_order_marks += text.count("\ufeff")
        text = text.replace("\ufeff", "").replace("\r\n", "\n").strip("\n")
        if text and not text.isspace():
            yield text
        else:
            counts.empty += 1


def _decode(raw: bytes, path: Path, offset: int, errors: str, counts: ShardCounts) -> str | None:
    try:
        text = raw.decode("utf-8")
        if "\0" not in text:
            return text
        fault, at = "NUL", raw.index(b"\0")
    except UnicodeDecodeError as error:
        fault, at = error.reason, error.start
    if errors == "error":
        raise UserError(f"{path}: byte {offset + at}")
    counts.invalid[fault] = counts.invalid.get(fault, 0) + 1
    if errors == "skip":
        counts.skipped += 1
        return None
    counts.replaced += 1
    return raw.decode("utf-8", errors="replace").replace("\0", "\ufffd")


def shard(part: FilePart, path: Path) -> bytes:
    """The bytes of a shard file of the part's lines, put together from lists of strings."""
    batches: list[list[str]] = [[]]
    characters = 0
    for text in documents(part, "line", "error", ShardCounts()):
        batches[-1].append(text)
        characters += len(text)
        if len(batches[-1]) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            batches.append([])
            characters = 0
    columns = (
        [pa.array(texts, pa.large_string()), pa.array(["s"] * len(texts), pa.string())] for texts in batches if texts
    )
    write_stream(path, SCHEMA, (pa.record_batch(one, schema=SCHEMA) for one in columns))
    return path.read_bytes()


def texts(
    part: FilePart, reading: Reading | None = None, cleaning: Cleaning | None = None, counts: ShardCounts | None = None
) -> list[str]:
    """The documents that prepare keeps of a part. The counts of what it leaves out are added to `counts`."""
    found = []
    for (array,), left_out in shard_writer.documents(part, reading or Reading(), cleaning or Cleaning()):
        found += array.to_pylist()
        if counts is not None:
            counts.add(left_out)
    return found
