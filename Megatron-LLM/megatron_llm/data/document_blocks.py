"""Reads files of documents: files -> blocks of some MB -> columns of text, in order, with the position of every error.

One thread cuts the blocks and does nothing but read; `columns` parses and checks a block, on any thread. JSON lines are
parsed by data/json_lines.py.
"""

from __future__ import annotations

import glob
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard
from numpy.typing import NDArray

from megatron_llm.data import json_lines
from run_contract.errors import InputsMissing, UserError

BLOCK_BYTES = 1 << 23
PACKED_BYTES = 1 << 17
NOT_TEXT = {
    b"\x1f\x8b": "gzip data; rename it so that its name ends in .gz",
    b"\x28\xb5\x2f\xfd": "zstd data; rename it so that its name ends in .zst",
    b"\xff\xfe": "UTF-16; convert it (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f utf-16 -t utf-8)",
}
"""The first bytes of files that are not text -> what they are, and what to do about it."""
ZSTD_WINDOW = 1 << 31
"""The largest window of zstd (--long=31). Reading a file that was made with it takes this much memory."""
NEVER_EMPTY = (".gz", ".zst", ".arrow")
"""Suffixes of formats in which a valid file never has 0 bytes."""
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
SOURCE = "source"
"""The column of an Arrow file that names each document's source."""
ONE_SOURCE = "all"
"""The source of documents in a file that names none."""
NO_SOURCE = "(no source)"
"""The source of documents whose source is null."""


@dataclass(frozen=True)
class Block:
    """A block of consecutive documents of one file."""

    where: str
    """The file and the unit of `first`, for messages: `corpus.jsonl, line`."""
    first: int
    """Number of the block's first line or row in the file, counted from 1."""
    content: Any
    """The block's content: whole lines (bytes or bytearray), or an Arrow record batch."""


@dataclass(frozen=True)
class Columns:
    """The documents of a block: one array of texts per key, all of one length, without nulls and in valid UTF-8."""

    texts: dict[str, Any]
    """Key -> large_string array."""
    sources: Any
    """The source of each document, as dictionary-encoded strings."""


def find_inputs(pattern: str) -> list[Path]:
    """The input files in order of their names. Raises InputsMissing when there is none, and UserError.

    A file whose name does not end in .arrow is read as JSON lines, since their names need not end in .jsonl; the
    published file of documents has a different name too.
    """
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207 takes absolute patterns
    paths = [Path(name) for name in names]
    if not paths:
        raise InputsMissing(f"--input {pattern}: no such file, and no file matches it")
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"--input {path}: not a file; give JSON lines or an Arrow stream, or a pattern of such files"
            )
        if path.name.endswith(NEVER_EMPTY) and not path.stat().st_size:
            raise UserError(f"--input {path}: 0 bytes, which is no valid {path.suffix} file; fetch or pack it again")
    return paths


def read_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    """Yield the documents of one file as blocks. Raises UserError when the file is not complete."""
    return read_arrow(path, keys) if path.suffix == ".arrow" else read_lines(path)


def read_lines(path: Path) -> Iterator[Block]:
    """Yield blocks of unparsed JSON lines; blocks of blank lines only are left out.

    Only the newline byte ends a line.
    """
    first = 1
    try:
        for block in whole_lines(path):
            if not block.isspace():
                yield Block(f"{path}, line", first, block)
            first += block.count(b"\n")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} cannot be read after line {first - 1}: {error}; write it again") from error


def whole_lines(path: Path) -> Iterator[bytearray]:
    """Yield the content of a file in blocks that end with a line, or with the file.

    A block grows in place, so that a long line is not copied again for each of its pieces.
    """
    block = bytearray()
    for piece in read_pieces(path):
        searched = len(block)
        block += piece
        del piece
        if len(block) >= BLOCK_BYTES and (end := block.rfind(b"\n", searched) + 1):
            rest = block[end:]
            del block[end:]
            yield block
            block = rest
    if block:
        yield block


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces, decompressed if its name ends in .gz or .zst.

    Raises UserError if the first bytes show that it is not text.
    """
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from unpacked(file, lambda: zlib.decompressobj(31))
        elif path.suffix == ".zst":
            yield from unpacked(file, zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj)
        else:
            head = file.peek(4)
            if found := next((found for magic, found in NOT_TEXT.items() if head.startswith(magic)), None):
                raise UserError(f"{path} is {found}")
            yield from iter(lambda: file.read(BLOCK_BYTES), b"")


def unpacked(file: BinaryIO, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the decompressed content of all members of a .gz file, or all frames of a .zst file.

    Raises EOFError if the file ends inside one of them, which the readers of both libraries may take for a proper end.
    """
    frame, packed = begin(), b""
    while packed := packed or file.read(PACKED_BYTES):
        if frame is None:
            packed = packed.lstrip(b"\0")  # gzip allows padding after a member
            frame = begin() if packed else None
            continue
        content = frame.decompress(packed)
        yield from (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))
        packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of its data")


def read_arrow(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    """Yield the rows of a memory-mapped Arrow stream as blocks: small batches are joined, large ones are sliced."""
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
    """Raise ArrowInvalid if the end marker is missing: a stream cut between two batches would be read without an
    error."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("its end marker is missing")


def check_columns(path: Path, schema: Any, names: Sequence[str]) -> None:
    """Raise UserError unless the columns are there and hold strings."""
    for name in names:
        if name not in schema.names:
            raise UserError(
                f"{path} has no column {name!r}; its columns: {', '.join(schema.names)}; name one of them with "
                "--json_keys"
            )
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path} has {schema.names.count(name)} columns named {name!r}, and nothing says which is meant; write "
                "the file again with one"
            )
        kind = schema.field(name).type
        if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string)):
            raise UserError(f"{path}: column {name!r} holds {kind}; name a column of strings with --json_keys")


def names_sources(path: Path, schema: Any) -> bool:
    """Whether the file has a column of strings that names the source of each document.

    A column of the same name with other content is left alone; a note says that documents are not counted by source.
    """
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
    """Yield record batches of large_string columns with about BLOCK_BYTES of text each, or with one longer document."""
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
    """Slices of a batch, which is cut at each document in which the first column's text passes a multiple of
    BLOCK_BYTES."""
    ends = offsets(batch.column(0))
    marks = np.arange(ends[0], ends[-1], BLOCK_BYTES)[1:]
    borders = np.unique(np.concatenate([[0], np.searchsorted(ends, marks), [len(batch)]]))
    return (batch.slice(a, b - a) for a, b in zip(borders.tolist(), borders[1:].tolist(), strict=False))


def offsets(texts: Any) -> NDArray[np.int64]:
    """The byte offsets at which the n texts of a large_string array start and end, (n + 1,) int64."""
    if not len(texts):
        return np.zeros(1, dtype=np.int64)
    return np.frombuffer(texts.buffers()[1], dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]


def columns(block: Block, keys: Sequence[str]) -> Columns:
    """Parse and check a block. Raises UserError, which names the line or row of the first error."""
    if isinstance(block.content, (bytes, bytearray)):
        texts = json_lines.parse(block.content, keys, block.where, block.first)
        count = len(texts[keys[0]])
        return Columns(texts, named(None, count))
    found = dict(zip(block.content.schema.names, block.content.columns, strict=True))
    for name in keys:
        column = found[name]
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(
                f"{block.where} {block.first + row}: {name!r} is None, but each document needs a string; remove the "
                "row, or fill it"
            )
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(f"{block.where}s from {block.first} on, {name!r}: {error}; write the file again") from error
    return Columns({key: found[key] for key in keys}, named(found.get(SOURCE), len(block.content)))


def named(column: Any, count: int) -> Any:
    """The sources of `count` documents as dictionary-encoded strings, from their large_string column, if there is one.

    A null means that a document has no source; bytes that are not valid UTF-8 are escaped.
    """
    if column is None:
        return pa.DictionaryArray.from_arrays(np.zeros(count, dtype=np.int32), pa.array([ONE_SOURCE]))
    found = pc.fill_null(column.cast(pa.large_binary()), NO_SOURCE.encode()).dictionary_encode()
    names = [name.decode(errors="backslashreplace") for name in found.dictionary.to_pylist()]
    distinct = {name: place for place, name in enumerate(dict.fromkeys(names))}
    codes = np.array([distinct[name] for name in names], dtype=np.int32)[found.indices.to_numpy()]
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(distinct)))
