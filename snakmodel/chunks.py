"""What the readers of raw files give: documents as Arrow arrays, and a policy for what is not text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from snakmodel.publish import UserError

ERROR_POLICIES = ("error", "replace", "skip")
CHUNK_DOCUMENTS = 1 << 14
CHUNK_BYTES = 1 << 22

Chunk = tuple[Any, NDArray[np.int64]]
"""A pyarrow.LargeStringArray of documents, and the position of each in its file: a byte or a row."""


@dataclass
class Faults:
    """What was done about documents that were not text."""

    policy: str
    replaced: int = 0
    skipped: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    """Replaced and skipped documents by the first fault found in them."""

    def leave_out(self, reason: str, message: Callable[[], str]) -> None:
        """Count a document that cannot be used. Raises UserError unless the policy is to skip such ones."""
        if self.policy != "skip":
            raise UserError(message())
        self.invalid[reason] = self.invalid.get(reason, 0) + 1
        self.skipped += 1

    def replace(self, reason: str, message: Callable[[], str]) -> bool:
        """Whether to replace what is not a character; if not, the document is left out or UserError raised."""
        if self.policy != "replace":
            self.leave_out(reason, message)
            return False
        self.invalid[reason] = self.invalid.get(reason, 0) + 1
        self.replaced += 1
        return True

    def decode(self, raw: bytes, where: Callable[[int], str]) -> str | None:
        """The text of a document, or None if it is left out. `where` tells where a byte of it is."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at, reason = error.start, error.reason

        def message() -> str:
            return (
                f"{where(at)} is not UTF-8: {reason}, 0x{raw[at]:02x}; convert the file (for example "
                "iconv -f latin1 -t utf-8), or set errors to replace or skip to go on without such bytes or documents"
            )

        return raw.decode("utf-8", errors="replace") if self.replace(reason, message) else None


def packed(documents: Iterable[tuple[int, str]]) -> Iterator[Chunk]:
    """Chunks of bounded size of (position, document) that come one by one."""
    texts: list[str] = []
    positions: list[int] = []
    size = 0
    for position, text in documents:
        texts.append(text)
        positions.append(position)
        size += len(text)
        if len(texts) >= CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield pa.array(texts, pa.large_string()), np.array(positions, np.int64)
            texts, positions, size = [], [], 0
    if texts:
        yield pa.array(texts, pa.large_string()), np.array(positions, np.int64)


def is_utf8(block: bytes) -> bool:
    """Whether a block is valid UTF-8, without decoding it."""
    try:
        strings(np.array([0, len(block)], np.int64), block).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def strings(offsets: NDArray[np.int64], content: bytes) -> Any:
    """A LargeStringArray over a buffer."""
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers)
