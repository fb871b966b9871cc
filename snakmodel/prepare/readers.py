"""Reads the documents of a part as Arrow arrays, with the position of each document in its file.

Good data is read fast: a block is checked, cut and copied as a whole. Only a block in which something is wrong is read
document by document, to name the fault or to leave the document out, as the policy says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError
from snakmodel.prepare.byte_streams import (
    BOM,
    END,
    UTF_8,
    TextFile,
    first_line,
    line_blocks,
    lines,
    one_by_one,
    open_bytes,
)
from snakmodel.prepare.chunks import Chunk, Faults, is_utf8, packed, strings
from snakmodel.prepare.columns import arrow_column, parquet_column
from snakmodel.prepare.input_files import COMPRESSED, TEXT, FilePart, divisible, suffix
from snakmodel.prepare.json_lines import json_lines
from snakmodel.prepare.kept_columns import KeptColumn
from snakmodel.prepare.recognise import HEAD, mismatch

DOCUMENT_MODES = ("line", "blank-line", "file")
BACKWARD_BLOCK = 1 << 16
ASCII_SPACE = b" \t\n\r\x0b\x0c"


@dataclass(frozen=True)
class Reading:
    """The settings that say what a document is, and what happens to a document that is not text."""

    document: str = "line"
    """The unit that is a document, in text files only: `line`, `blank-line` (lines up to a blank one) or `file`."""
    errors: str = "error"
    """The policy for what is not text: `error` stops, `skip` leaves the document out, `replace` puts U+FFFD in its
    place."""
    key: str = "text"
    """The JSON key or the column that holds the text."""
    encoding: str = UTF_8
    """The encoding of text and JSON lines: one of ENCODINGS."""
    keep: tuple[KeptColumn, ...] = ()
    """The JSON keys or columns that are kept beside the text."""


def read(part: FilePart, reading: Reading, faults: Faults) -> Iterator[Chunk]:
    """The documents of a part, in order and including blank ones.

    In documents of text files, CRLF becomes LF, and line feeds at both ends are removed; documents of other formats
    stay as they are. Raises InputsMissing if the file is gone, and UserError if it became shorter, cannot be read or
    holds what `reading.errors` forbids.
    """
    path = Path(part.file)
    if not path.is_file():
        raise InputsMissing(f"{path} does not exist; it was there when the run was planned")
    if (size := path.stat().st_size) < part.end:
        raise UserError(f"{path} has {size} bytes, the plan expects {part.end} or more; put the planned text back")
    if part.start == part.end:
        return iter(())
    kind = suffix(path.name) or TEXT[0]
    if kind == ".parquet":
        return parquet_column(part, reading.key, reading.keep, faults)
    if kind == ".arrow":
        return arrow_column(part, reading.key, reading.keep, faults)
    if not kind.startswith(TEXT):
        return _bytes(part, reading, faults, is_text=False)
    return (_without_columns(chunk, reading.keep, path) for chunk in _bytes(part, reading, faults, is_text=True))


def _without_columns(chunk: Chunk, kept: Sequence[KeptColumn], path: Path) -> Chunk:
    """Documents of a text file with nulls in all columns. Raises UserError if one of the columns is not optional."""
    if needed := [one.name for one in kept if not one.optional]:
        raise UserError(
            f'{path} is a text file, which has no column {needed[0]!r}; write "{needed[0]}?" in data.keep if files may '
            "lack it"
        )
    return chunk._replace(kept=tuple(pa.nulls(len(chunk.texts), one.type) for one in kept)) if kept else chunk


def _bytes(part: FilePart, reading: Reading, faults: Faults, *, is_text: bool) -> Iterator[Chunk]:
    """Yield the documents of .txt and .jsonl files."""
    text = TextFile(Path(part.file), reading.encoding)
    mode = reading.document if is_text else "json"
    if (mode == "file" and part.start > 0) or not _is_text(text, part, faults):
        return
    end = part.end if divisible(text.path, reading.encoding) else END
    with text.open() as file:
        position, origin = first_line(file, part.start)
        if mode == "file":
            yield from packed(_decoded([(position, file.read())], text, faults))
        elif mode == "blank-line":
            within = part.start > origin and _follows_text(file, position, origin)
            yield from packed(_decoded(_paragraphs(file, position, end, within), text, faults))
        else:
            for offset, block in line_blocks(file, position, end):
                if mode == "line":
                    yield from _text_lines(block, offset, text, faults)
                else:
                    yield from json_lines(block, offset, text, reading.key, faults, reading.keep)


def _is_text(text: TextFile, part: FilePart, faults: Faults) -> bool:
    """Whether a file may be what its name and the recipe say, judged by its first bytes.

    If it may not, the file is left out as one document, which is counted with its first part, or UserError is raised.
    """
    with open_bytes(text.path) as file:
        found = mismatch(file.read(HEAD), text.encoding)
    if found is None:
        return True
    inside = "holds what is" if text.path.name.endswith(COMPRESSED) else "is"
    message = f"{text.path} {inside} {found[0]}, not text in {text.encoding.upper()}: {found[1]}"
    if part.start == 0 or faults.policy != "skip":
        faults.leave_out(found[0], partial(str, message))
    return False


def _text_lines(block: bytes, offset: int, file: TextFile, faults: Faults) -> Iterator[Chunk]:
    """Yield the documents of a block in which every line is one."""
    marked = BOM[:1] in block and BOM in block  # the first byte is rare and fast to look for
    if marked or b"\0" in block or not is_utf8(block):
        yield from packed(_decoded(one_by_one(block, offset), file, faults))
        return
    starts, sizes, returns = lines(block)
    content = (block.replace(b"\r\n", b"\n") if returns.any() else block).replace(b"\n", b"")
    yield Chunk(strings(np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes))), content), starts + offset)


def _decoded(raw: Iterable[tuple[int, bytes]], file: TextFile, faults: Faults) -> Iterator[tuple[int, str]]:
    for position, content in raw:
        text = faults.decode(content, partial(file.byte, position))
        if text is not None:
            yield position, faults.without_marks(text).replace("\r\n", "\n").strip("\n")


def _paragraphs(file: BinaryIO, position: int, end: int, within: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of the runs of lines between blank lines.

    `within`: the first lines continue a document that belongs to an earlier range, and are passed over.
    """
    run: list[bytes] = []
    first = position
    for offset, block in line_blocks(file, position, end):
        starts, sizes, _ = lines(block)
        text = ~_blank_lines(block, starts, sizes)
        if run and not text[0]:
            yield first, b"".join(run)
            run = []
        if within:
            within = bool(text.all())
            text[: len(text) if within else int(text.argmin())] = False
        edges = np.flatnonzero(np.diff(text, prepend=False, append=False)).tolist()
        borders = [*starts.tolist(), len(block)]
        for begin, stop in zip(edges[::2], edges[1::2], strict=True):
            first = first if run else offset + borders[begin]
            run.append(block[borders[begin] : borders[stop]])
            if stop < len(starts):
                yield first, b"".join(run)
                run = []
    while run and (line := file.readline()).strip():
        run.append(line)
    if run:
        yield first, b"".join(run)


def _blank_lines(block: bytes, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A mask of the lines that hold nothing but ASCII white space, (n,)."""
    found: NDArray[np.bool_] = sizes == 0
    firsts = np.frombuffer(block, np.uint8)[np.minimum(starts, len(block) - 1)]
    for index in np.flatnonzero(~found & np.isin(firsts, np.frombuffer(ASCII_SPACE, np.uint8))):
        found[index] = not block[starts[index] : starts[index] + sizes[index]].strip()
    return found


def _follows_text(file: BinaryIO, position: int, origin: int) -> bool:
    """Whether the line that ends just before `position` holds more than white space. Leaves the file at `position`."""
    end, text = position - 1, False
    while end > origin and not text:
        begin = max(origin, end - BACKWARD_BLOCK)
        file.seek(begin)
        _, feed, line = file.read(end - begin).rpartition(b"\n")
        text = bool(line.strip())
        if feed:
            break
        end = begin
    file.seek(position)
    return text
