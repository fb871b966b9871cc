"""Reads the bytes of a raw file, compressed or not, in blocks of whole lines."""

from __future__ import annotations

import codecs
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from run_contract.errors import UserError

UTF_8 = "utf-8"
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 21
END = sys.maxsize
"""The end of a byte range that reaches to the end of a compressed or converted file, however long its content is."""
_READ = 1 << 17
_ZSTD_WINDOW = 1 << 31
"""The largest window of zstd (--long=31), in bytes: a file that was made with it needs this much memory."""


class _Unpacked(io.RawIOBase):
    """The content of a compressed file as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return the number of bytes; it is less than the buffer's size only at the end."""
        filled = 0
        while filled < len(buffer):
            if not self._block and (block := next(self._blocks, None)) is not None:
                self._block = memoryview(block)
            elif not self._block:
                break
            size = min(len(buffer) - filled, len(self._block))
            buffer[filled : filled + size] = self._block[:size]
            self._block = self._block[size:]
            filled += size
        return filled


def _unpack(file: BinaryIO, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of all members of a .gz file or all frames of a .zst file.

    Raises EOFError if the file ends within a member or frame, which the file readers of both libraries may take for a
    proper end.
    """
    frame, packed, first = begin(), b"", True
    while packed := packed or file.read(_READ):
        if frame is None:
            packed = packed.lstrip(b"\0")  # gzip allows zeros after a member
            frame = begin() if packed else None
            continue
        yield frame.decompress(packed)
        packed, first = b"", False
        if frame.eof:
            packed, frame = frame.unused_data, None
    if frame is not None and not first:
        raise EOFError("the file ends in the middle of its data")


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Open the uncompressed content of a file.

    Raises UserError if the content cannot be unpacked, and OSError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                yield io.BufferedReader(_Unpacked(_unpack(file, lambda: zlib.decompressobj(31))), _READ)
            elif path.suffix == ".zst":
                zstd = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
                yield io.BufferedReader(_Unpacked(_unpack(file, zstd.decompressobj)), _READ)
            else:
                yield file
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(
            f"{path} is damaged, or not what its name says: {error}. Fetch or pack it again (gzip -t, zstd -t test it)"
        ) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True)
class TextFile:
    """A raw file of lines whose content is read as UTF-8: unpacked, and converted if the file has another encoding."""

    path: Path
    encoding: str = UTF_8

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Open the content. Raises UserError if it cannot be unpacked or converted, OSError if it cannot be read."""
        with open_bytes(self.path) as file:
            yield file if self.encoding == UTF_8 else io.BufferedReader(_Unpacked(self._converted(file)), _READ)

    def _converted(self, file: BinaryIO) -> Iterator[bytes]:
        """The content converted to UTF-8. Half a surrogate pair becomes three bytes that are not valid UTF-8."""
        decoder = codecs.getincrementaldecoder(self.encoding)("surrogatepass")
        try:
            while block := file.read(_READ):
                yield decoder.decode(block).encode("utf-8", "surrogatepass")
            yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} ends in the middle of a character of {self.encoding} ({error.reason}); fetch it again, "
                "or correct data.encoding"
            ) from error

    def line(self, offset: int) -> int:
        """The number, counted from 1, of the line that holds the byte at `offset` of the content."""
        line = 1
        with self.open() as file:
            while offset and (block := file.read(min(offset, BLOCK))):
                line, offset = line + block.count(b"\n"), offset - len(block)
        return line

    def byte(self, position: int, at: int) -> str:
        """The place of byte `at` of a piece of content that begins at `position`, in words for users."""
        converted = "" if self.encoding == UTF_8 else ", once converted,"
        return f"{self.path}: byte {position + at} (line {self.line(position + at)}){converted}"


def first_line(file: io.BufferedReader, start: int) -> tuple[int, int]:
    """Move to the first line that begins at `start` or later.

    Returns the offset of that line and the offset of the file's first byte after a byte order mark. For a compressed
    file, `start` has to be the beginning, because it is not possible to seek in it.
    """
    origin = len(BOM) if file.peek(len(BOM)).startswith(BOM) else 0
    file.read(origin)
    if start <= origin:
        return origin, origin
    file.seek(start - 1)
    return start - 1 + len(file.readline()), origin


def line_blocks(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of blocks of whole lines; the lines are those that begin before `end`.

    A block exceeds BLOCK only by the rest of its last line.
    """
    while position < end and (block := file.read(min(BLOCK, end - position))):
        if not block.endswith(b"\n") and (rest := file.readline()):
            block += rest
        yield position, block
        position += len(block)


def lines(block: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """For each line of a block: its start, its size without the line end, and whether it ends in CRLF, not LF."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    returns = (ends > starts) & (data[ends - 1] == ord("\r"))
    returns[-1] &= block.endswith(b"\n")
    return starts, ends - starts - returns, returns


def one_by_one(block: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of each line, including its end."""
    for line in io.BytesIO(block):
        yield offset, line
        offset += len(line)
