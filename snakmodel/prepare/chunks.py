"""The form in which the readers of raw files return documents, Arrow arrays, and the policy for what is not text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError

ERROR_POLICIES = ("error", "replace", "skip")
CHUNK_DOCUMENTS = 1 << 14
CHUNK_BYTES = 1 << 22
REPLACEMENT = "\ufffd"
BOM = "\ufeff"
"""The byte order mark. At the beginning of a file it says how the text is encoded, and it is not part of the text."""
_GO_ON = "set errors to replace or skip to go on without such characters or documents"


class Chunk(NamedTuple):
    """Some documents of a file, in order."""

    texts: Any
    """A `pyarrow.LargeStringArray`, (n,)."""
    positions: NDArray[np.int64]
    """The position of each document in its file, (n,): a byte or a row."""
    kept: tuple[Any, ...] = ()
    """A `pyarrow.Array` of n values for each column that is kept beside the text."""


@dataclass
class Faults:
    """The policy for documents that are not text, and counts of what was done about them."""

    policy: str
    replaced: int = 0
    skipped: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    """The numbers of replaced and skipped documents, by the first fault that was found in them."""
    byte_order_marks: int = 0
    """The number of byte order marks that were removed although they did not begin a file. They stem from files that
    were joined together with their marks."""

    def leave_out(self, reason: str, message: Callable[[], str]) -> None:
        """Count a document that is left out because it cannot be used. Raises UserError unless the policy is `skip`."""
        if self.policy != "skip":
            raise UserError(message())
        self.invalid[reason] = self.invalid.get(reason, 0) + 1
        self.skipped += 1

    def replace(self, reason: str, message: Callable[[], str]) -> bool:
        """Whether to replace what is not a character. If not, the document is left out, or UserError is raised."""
        if self.policy != "replace":
            self.leave_out(reason, message)
            return False
        self.invalid[reason] = self.invalid.get(reason, 0) + 1
        self.replaced += 1
        return True

    def decode(self, raw: bytes, where: Callable[[int], str]) -> str | None:
        """The text of a document, or None if it is left out. `where` says in words where one of its bytes is."""
        problem, at = "is NUL, which text does not hold; mend the file", raw.find(0)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at, reason = error.start, error.reason
            problem = f"is not UTF-8: {reason}, 0x{raw[at]:02x}; convert the file (iconv -f ITS_ENCODING -t utf-8)"
        else:
            reason = "NUL"
            if at < 0:
                return text
        if not self.replace(reason, lambda: f"{where(at)} {problem}, or {_GO_ON}"):
            return None
        return raw.decode("utf-8", errors="replace").replace("\0", REPLACEMENT)

    def without_nul(self, text: str, message: Callable[[], str]) -> str | None:
        """A document without NUL characters (they are replaced), or None if it is left out."""
        if "\0" not in text:
            return text
        return text.replace("\0", REPLACEMENT) if self.replace("NUL", message) else None

    def without_marks(self, text: str) -> str:
        """A document without the byte order marks of files that were joined together. The marks are counted."""
        self.byte_order_marks += text.count(BOM)
        return text.replace(BOM, "")


def packed(documents: Iterable[tuple[int, str]]) -> Iterator[Chunk]:
    """Gather pairs (position, document) that come one by one into chunks of bounded size."""
    texts: list[str] = []
    positions: list[int] = []
    size = 0
    for position, text in documents:
        texts.append(text)
        positions.append(position)
        size += len(text)
        if len(texts) >= CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield Chunk(pa.array(texts, pa.large_string()), np.array(positions, np.int64))
            texts, positions, size = [], [], 0
    if texts:
        yield Chunk(pa.array(texts, pa.large_string()), np.array(positions, np.int64))


def is_utf8(block: bytes) -> bool:
    """Whether a block is valid UTF-8, without decoding it."""
    return are_utf8(strings(np.array([0, len(block)], np.int64), block))


def are_utf8(texts: Any) -> bool:
    """Whether all strings of an Arrow array are valid UTF-8."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def holds_nul(texts: Any) -> bool:
    """Whether any string of a LargeStringArray holds the NUL character."""
    borders, content = texts.buffers()[1:]
    if not len(texts) or content is None:
        return False
    first, last = np.frombuffer(borders, np.int64)[[texts.offset, texts.offset + len(texts)]]
    return bool(last > first and np.frombuffer(content, np.uint8)[first:last].min() == 0)


def strings(offsets: NDArray[np.int64], content: bytes) -> Any:
    """A LargeStringArray whose string i is content[offsets[i] : offsets[i + 1]], without a copy."""
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers)
