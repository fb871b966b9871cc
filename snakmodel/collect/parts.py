"""Writes documents as compressed parts of about equal size, with the same bytes each time."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from run_contract.publish import remove, rename

PART_BYTES = 1 << 28
"""Bytes of text in a part. A compressed file is read by a single task, so that parts are what tasks share."""
_LEAST = 8
"""A part that ends with an input has at least this fraction of PART_BYTES."""
_BUFFER = 1 << 20
_LEVEL = 4
"""The level of compression: three times as fast as 6, for files that are 6 per cent larger."""


@dataclass(frozen=True)
class Part:
    """A finished file of the source's folder."""

    file: str
    """Its path below the folder."""
    bytes: int
    sha256: str
    documents: int


def sha256(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file, in hexadecimal. `alive` is called now and then."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            alive()
    return digest.hexdigest()


class PartWriter:
    """Writes lines into parts, and begins another one when a part is full.

    Where a part ends depends on the lines and the borders of the inputs only, and not on interruptions.
    """

    def __init__(self, folder: Path, suffix: str, parts: list[Part], part_bytes: int) -> None:
        self.parts = parts
        """The finished parts; the next one follows them."""
        self._folder, self._suffix, self._part_bytes = folder, suffix, part_bytes
        self._file: BinaryIO | None = None
        self._gzip: gzip.GzipFile | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = self._size = self._documents = 0

    def add(self, text: str, columns: dict[str, Any] | None) -> None:
        """Write a document: as a line of text or, if there are columns, as a line of JSON."""
        if columns is None:
            line = text.encode() + b"\n"
        else:
            line = json.dumps({"text": text, **columns}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._pending.append(line)
        self._pending_bytes += len(line)
        self._documents += 1
        if self._pending_bytes >= _BUFFER:
            self._flush()
        if self._size + self._pending_bytes >= self._part_bytes:
            self.close()

    def end_of_input(self) -> bool:
        """Finish the part at the end of an input if it is large enough; returns whether all is in finished parts."""
        if (self._size + self._pending_bytes) * _LEAST >= self._part_bytes:
            self.close()
        return not self._documents

    def close(self) -> None:
        """Finish the part that is being written, if there is one."""
        if not self._documents:
            return
        self._flush()
        assert self._gzip is not None
        assert self._file is not None
        self._gzip.close()
        self._file.close()
        name = f"{len(self.parts):05d}{self._suffix}.gz"
        rename(self._temporary, self._folder / name)
        path = self._folder / name
        self.parts.append(Part(name, path.stat().st_size, sha256(path), self._documents))
        self._file = self._gzip = None
        self._size = self._documents = 0

    def abandon(self) -> None:
        """Remove the part that is being written."""
        if self._file is not None:
            self._file.close()
        remove(self._temporary)

    @property
    def _temporary(self) -> Path:
        return self._folder / ".part"

    def _flush(self) -> None:
        if self._gzip is None:
            self._file = self._temporary.open("wb")
            self._gzip = gzip.GzipFile("", "wb", _LEVEL, self._file, mtime=0)
        self._gzip.write(b"".join(self._pending))
        self._size += self._pending_bytes
        self._pending, self._pending_bytes = [], 0


def as_json(parts: list[Part]) -> list[dict[str, Any]]:
    """The parts as JSON values."""
    return [asdict(part) for part in parts]
