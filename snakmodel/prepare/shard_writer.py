"""Writes a shard: the documents of its parts, without blank ones, in the wanted share, cleaned and in batches.

Everything works on whole Arrow arrays; `ShardCounts` holds what was kept and what was left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from snakmodel.prepare.chunks import Faults
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.readers import Reading, read
from snakmodel.shards.arrow_stream import SCHEMA, stream_writer
from snakmodel.shards.counts import Amounts

BATCH_CHARACTERS = 1 << 22
BATCH_DOCUMENTS = 1 << 14
NO_DOCUMENTS = pa.nulls(0, pa.large_string())
WHITE_SPACE = "".join(chr(point) for point in range(0x3001) if chr(point).isspace())
"""All characters of Unicode that are white space (str.isspace)."""


@dataclass(frozen=True)
class Cleaning:
    """The cleaning of documents that the user asks for."""

    trim: bool = False
    """Whether white space is removed from both ends."""
    nfc: bool = False
    """Whether characters are composed (Unicode normal form C)."""
    min_characters: int = 0
    """The number of characters below which a document is left out, after the cleaning above."""


@dataclass
class ShardCounts(Amounts):
    """Counts of what one shard took in, and of what it left out."""

    empty: int = 0
    """The number of documents of nothing but white space, which are left out."""
    empty_files: int = 0
    beyond_share: int = 0
    """The number of documents left out because only a share of their source is taken."""
    trimmed: int = 0
    composed: int = 0
    short: int = 0
    """The number of documents left out because they are shorter than `min_characters`."""
    replaced: int = 0
    """The number of documents in which something that is not a character became U+FFFD."""
    skipped: int = 0
    """The number of documents left out because they are not text."""
    invalid: dict[str, int] = field(default_factory=dict)
    """The numbers of replaced and skipped documents, by the first fault that was found in them."""
    byte_order_marks: int = 0
    """The number of byte order marks that were removed although they did not begin a file. They stem from files that
    were joined together with their marks."""

    def __str__(self) -> str:
        """A line for users: what was kept, and all that was left out or changed."""
        rare = ("empty_files", "beyond_share", "trimmed", "composed", "short", "replaced", "skipped")
        shown = ((name.replace("_", " "), getattr(self, name)) for name in (*rare, "byte_order_marks"))
        others = "".join(f", {value} {name}" for name, value in shown if value)
        return f"{self.documents} documents, {self.bytes} bytes, {self.empty} empty ones left out{others}"

    def keep(self, source: str, documents: int, characters: int, size: int) -> None:
        """Add documents of a source to the counts of what is kept; `size` is in bytes."""
        amounts = {"documents": documents, "characters": characters, "bytes": size}
        self.add(ShardCounts(documents, characters, size, {source: amounts}))


def documents(part: FilePart, reading: Reading, cleaning: Cleaning) -> Iterator[tuple[Any, ShardCounts]]:
    """Yield arrays of the documents of a part that are kept, in order; see `read` for the errors raised.

    Each comes with the counts of what was changed and left out since the array before it. An array may be empty.
    """
    faults = Faults(reading.errors)
    for texts, positions in read(part, reading, faults):
        kept = ~blank(texts)
        counts = ShardCounts(empty=len(texts) - int(kept.sum()))
        if part.share < 1:
            chosen = kept & in_share(positions, part.share, part.salt)
            counts.beyond_share = int(kept.sum()) - int(chosen.sum())
            kept = chosen
        texts, cleaned = clean(_only(texts, kept), cleaning)
        counts.add(cleaned)
        yield texts, counts
    yield (
        NO_DOCUMENTS,
        ShardCounts(
            empty_files=int(part.end == 0),
            replaced=faults.replaced,
            skipped=faults.skipped,
            invalid=faults.invalid,
            byte_order_marks=faults.byte_order_marks,
        ),
    )


def _only(texts: Any, kept: NDArray[np.bool_]) -> Any:
    if kept.all():
        return texts
    bits = pa.py_buffer(np.packbits(kept, bitorder="little"))
    return texts.filter(pa.Array.from_buffers(pa.bool_(), len(kept), [None, bits]))


def _borders(texts: Any) -> NDArray[np.int64]:
    """The positions at which the strings of a LargeStringArray begin in its content, and the last end, (n + 1,)."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _lengths(texts: Any) -> NDArray[np.int64]:
    """The number of characters of each string, (n,).

    It reads Arrow's buffers, because Arrow's own conversions from and to Python and NumPy import pandas, which takes a
    while.
    """
    found = pc.utf8_length(texts)
    return np.frombuffer(found.buffers()[1], np.int64)[found.offset : found.offset + len(found)]


_FIRST_OF_SPACE, _LAST_OF_SPACE = np.zeros(256, bool), np.zeros(256, bool)
for _character in WHITE_SPACE:
    _FIRST_OF_SPACE[_character.encode()[0]] = _LAST_OF_SPACE[_character.encode()[-1]] = True


def blank(texts: Any) -> NDArray[np.bool_]:
    """A mask of the strings of a LargeStringArray that hold nothing but white space (str.isspace), (n,)."""
    borders = _borders(texts)
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    found: NDArray[np.bool_] = borders[1:] == borders[:-1]
    if not len(content):
        return found
    firsts = content[np.minimum(borders[:-1], len(content) - 1)]
    suspect = ~found & _FIRST_OF_SPACE[firsts] & _LAST_OF_SPACE[content[borders[1:] - 1]]
    for index in np.flatnonzero(suspect):
        found[index] = content[borders[index] : borders[index + 1]].tobytes().decode().isspace()
    return found


def in_share(positions: NDArray[np.int64], share: float, salt: int) -> NDArray[np.bool_]:
    """A mask of the documents that belong to a share of their source, (n,).

    A hash of salt and position decides (the finaliser of SplitMix64).
    """
    mixed = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    chosen: NDArray[np.bool_] = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11) < np.uint64(share * (1 << 53))
    return chosen


def clean(texts: Any, cleaning: Cleaning) -> tuple[Any, ShardCounts]:
    """The documents after the cleaning that the user asks for, and the counts of what it changed."""
    counts = ShardCounts()
    if cleaning.trim:
        trimmed = pc.utf8_trim(texts, characters=WHITE_SPACE)
        counts.trimmed = _different(texts, trimmed)
        texts = trimmed
    if cleaning.nfc:
        composed = pc.utf8_normalize(texts, "NFC")
        counts.composed = _different(texts, composed)
        texts = composed
    if cleaning.min_characters:
        long = _lengths(texts) >= cleaning.min_characters
        counts.short = len(texts) - int(long.sum())
        texts = _only(texts, long)
    return texts, counts


def _different(before: Any, after: Any) -> int:
    return pc.sum(pc.not_equal(before, after)).as_py() or 0


def batches(parts: Sequence[FilePart], reading: Reading, cleaning: Cleaning) -> Iterator[tuple[Any, ShardCounts]]:
    """Yield record batches of bounded size, each with documents of one part.

    Each comes with its counts, and with those of what was changed and left out on the way to it. Only the last batch of
    a part may be empty.
    """
    for part in parts:
        for texts, characters, counts in regrouped(documents(part, reading, cleaning)):
            if len(texts):
                borders = _borders(texts)
                counts.keep(part.source, len(texts), characters, int(borders[-1] - borders[0]))
            sources = _repeated(part.source.encode(), len(texts))
            yield pa.RecordBatch.from_arrays([texts, sources], schema=SCHEMA), counts


def _repeated(value: bytes, times: int) -> Any:
    offsets = np.arange(times + 1, dtype=np.int32) * np.int32(len(value))
    return pa.Array.from_buffers(pa.string(), times, [None, pa.py_buffer(offsets), pa.py_buffer(value * times)])


def regrouped(chunks: Iterable[tuple[Any, ShardCounts]]) -> Iterator[tuple[Any, int, ShardCounts]]:
    """Regroup arrays of documents with their counts, and yield (array, number of characters, sum of counts).

    Each array ends with the document that brings it to BATCH_CHARACTERS, or with the BATCH_DOCUMENTS-th document. So
    the batches depend on the documents only, and not on how they were read. The last array may be empty.
    """
    group: list[Any] = [NO_DOCUMENTS]
    characters = number = 0
    sum_of_counts = ShardCounts()
    for texts, counts in chunks:
        sum_of_counts.add(counts)
        sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(_lengths(texts))))
        start = 0
        while start < len(texts):
            enough = int(np.searchsorted(sums, sums[start] + BATCH_CHARACTERS - characters))
            end = min(enough, start + BATCH_DOCUMENTS - number, len(texts))
            group.append(texts.slice(start, end - start))
            characters, number = characters + int(sums[end] - sums[start]), number + end - start
            if characters >= BATCH_CHARACTERS or number >= BATCH_DOCUMENTS:
                yield pa.concat_arrays(group), characters, sum_of_counts
                group, characters, number, sum_of_counts = [NO_DOCUMENTS], 0, 0, ShardCounts()
            start = end
    yield pa.concat_arrays(group), characters, sum_of_counts


def write_shard(parts: Sequence[FilePart], path: Path, reading: Reading, cleaning: Cleaning) -> ShardCounts:
    """Write the documents of some parts as an Arrow stream file, and return the counts."""
    total = ShardCounts()
    with stream_writer(path, SCHEMA) as writer:
        for batch, counts in batches(parts, reading, cleaning):
            if batch.num_rows:
                writer.write_batch(batch)
            total.add(counts)
    return total
