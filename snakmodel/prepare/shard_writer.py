"""Writes a shard: the documents of its parts, without blank ones, in the wanted share, cleaned and in batches.

Everything works on whole Arrow arrays; `ShardCounts` holds what was kept and what was left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from run_contract.output import printable
from snakmodel.prepare.chunks import Chunk, Faults
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.kept_columns import KeptColumn
from snakmodel.prepare.readers import Reading, read
from snakmodel.shards.arrow_stream import SCHEMA, stream_writer
from snakmodel.shards.condition import Condition
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


@dataclass(frozen=True)
class Columns:
    """The columns of a shard beside `text` and `source`, and the condition on them."""

    kept: tuple[KeptColumn, ...]
    folder: Path
    """The folder below which the files have their names in the column `id`."""
    where: Condition | None = None
    """The condition that the kept documents fulfil."""

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of the shards."""
        return schema_of(self.kept)


def schema_of(kept: Sequence[KeptColumn] | None) -> Any:
    """The `pyarrow.Schema` of shards that keep these columns; None stands for no columns, and no `id` either."""
    if kept is None:
        return SCHEMA
    return pa.schema([*SCHEMA, pa.field("id", pa.string()), *(one.field for one in kept)])


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
    unwanted: int = 0
    """The number of documents left out because the condition on the columns does not hold for them."""
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
        rare = ("empty_files", "beyond_share", "trimmed", "composed", "short", "unwanted", "replaced", "skipped")
        shown = ((name.replace("_", " "), getattr(self, name)) for name in (*rare, "byte_order_marks"))
        others = "".join(f", {value} {name}" for name, value in shown if value)
        return f"{self.documents} documents, {self.bytes} bytes, {self.empty} empty ones left out{others}"

    def keep(self, source: str, documents: int, characters: int, size: int) -> None:
        """Add documents of a source to the counts of what is kept; `size` is in bytes."""
        amounts = {"documents": documents, "characters": characters, "bytes": size}
        self.add(ShardCounts(documents, characters, size, {source: amounts}))


class Documents(NamedTuple):
    """Some documents of a part that are kept, and the counts of what was changed and left out since those before."""

    columns: list[Any]
    """The texts, a `pyarrow.LargeStringArray` of n strings, which may be 0, and an array of n for each other column."""
    counts: ShardCounts


def documents(
    part: FilePart, reading: Reading, cleaning: Cleaning, columns: Columns | None = None
) -> Iterator[Documents]:
    """Yield the documents of a part that are kept, in order; see `read` for the errors raised."""
    faults = Faults(reading.errors)
    name = columns and _name(Path(part.file), columns.folder)
    for chunk in read(part, reading, faults):
        kept = ~blank(chunk.texts)
        counts = ShardCounts(empty=len(kept) - int(kept.sum()))
        if part.share < 1:
            chosen = kept & in_share(chunk.positions, part.share, part.salt)
            counts.beyond_share = int(kept.sum()) - int(chosen.sum())
            kept = chosen
        if columns and columns.where:
            chosen = kept & columns.where.mask(_named(part, chunk, columns))
            counts.unwanted = int(kept.sum()) - int(chosen.sum())
            kept = chosen
        others = [_ids(name, chunk.positions), *chunk.kept] if name else []
        found, cleaned = clean([_only(one, kept) for one in (chunk.texts, *others)], cleaning)
        counts.add(cleaned)
        yield Documents(found, counts)
    yield Documents(
        _no_documents(columns),
        ShardCounts(
            empty_files=int(part.end == 0),
            replaced=faults.replaced,
            skipped=faults.skipped,
            invalid=faults.invalid,
            byte_order_marks=faults.byte_order_marks,
        ),
    )


def _no_documents(columns: Columns | None) -> list[Any]:
    """The columns of no documents, in the form of `Documents.columns`."""
    return (
        [NO_DOCUMENTS, *(pa.nulls(0, one.type) for one in columns.schema if one.name not in SCHEMA.names)]
        if columns
        else [NO_DOCUMENTS]
    )


def _named(part: FilePart, chunk: Chunk, columns: Columns) -> dict[str, Any]:
    """The columns of a chunk that a condition may name."""
    values = {one.name: array for one, array in zip(columns.kept, chunk.kept, strict=True)}
    return {"source": _repeated(part.source.encode(), len(chunk.texts)), **values}


def _name(file: Path, folder: Path) -> str:
    """The name of a file in the column `id`: its path below the data folder, in characters that Arrow can hold."""
    return printable(file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name)


def _ids(name: str, positions: NDArray[np.int64]) -> Any:
    """The column `id` of the documents at these positions of a file."""
    return pa.array([f"{name}:{position}" for position in positions.tolist()], pa.string())


def _only(values: Any, kept: NDArray[np.bool_]) -> Any:
    if kept.all():
        return values
    bits = pa.py_buffer(np.packbits(kept, bitorder="little"))
    return values.filter(pa.Array.from_buffers(pa.bool_(), len(kept), [None, bits]))


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


def clean(columns: Sequence[Any], cleaning: Cleaning) -> tuple[list[Any], ShardCounts]:
    """The documents after the cleaning that the user asks for, and the counts of what it changed.

    `columns` are the texts and further arrays of the same length, as in `Documents`.
    """
    texts, *others = columns
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
        texts, others = _only(texts, long), [_only(one, long) for one in others]
    return [texts, *others], counts


def _different(before: Any, after: Any) -> int:
    return pc.sum(pc.not_equal(before, after)).as_py() or 0


def batches(
    parts: Sequence[FilePart], reading: Reading, cleaning: Cleaning, columns: Columns | None = None
) -> Iterator[tuple[Any, ShardCounts]]:
    """Yield record batches of bounded size, each with documents of one part.

    Each comes with its counts, and with those of what was changed and left out on the way to it. Only the last batch of
    a part may be empty.
    """
    schema = columns.schema if columns else SCHEMA
    for part in parts:
        for (texts, *others), characters, counts in regrouped(
            documents(part, reading, cleaning, columns), _no_documents(columns)
        ):
            if len(texts):
                borders = _borders(texts)
                counts.keep(part.source, len(texts), characters, int(borders[-1] - borders[0]))
            sources = _repeated(part.source.encode(), len(texts))
            yield pa.RecordBatch.from_arrays([texts, sources, *others], schema=schema), counts


def _repeated(value: bytes, times: int) -> Any:
    offsets = np.arange(times + 1, dtype=np.int32) * np.int32(len(value))
    return pa.Array.from_buffers(pa.string(), times, [None, pa.py_buffer(offsets), pa.py_buffer(value * times)])


def regrouped(
    found: Iterable[tuple[list[Any], ShardCounts]], none: Sequence[Any] = (NO_DOCUMENTS,)
) -> Iterator[tuple[list[Any], int, ShardCounts]]:
    """Regroup documents with their counts, and yield (columns, number of characters, sum of counts).

    Each group ends with the document that brings it to BATCH_CHARACTERS, or with the BATCH_DOCUMENTS-th document. So
    the batches depend on the documents only, and not on how they were read. The last group may be empty. `none` holds
    the columns of no documents.
    """
    group = [none]
    characters = number = 0
    sum_of_counts = ShardCounts()
    for columns, counts in found:
        sum_of_counts.add(counts)
        texts = columns[0]
        sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(_lengths(texts))))
        start = 0
        while start < len(texts):
            enough = int(np.searchsorted(sums, sums[start] + BATCH_CHARACTERS - characters))
            end = min(enough, start + BATCH_DOCUMENTS - number, len(texts))
            group.append([one.slice(start, end - start) for one in columns])
            characters, number = characters + int(sums[end] - sums[start]), number + end - start
            if characters >= BATCH_CHARACTERS or number >= BATCH_DOCUMENTS:
                yield _joined(group), characters, sum_of_counts
                group, characters, number, sum_of_counts = [none], 0, 0, ShardCounts()
            start = end
    yield _joined(group), characters, sum_of_counts


def _joined(group: Sequence[Sequence[Any]]) -> list[Any]:
    """The columns of several groups of documents, one after the other."""
    return [pa.concat_arrays(column) for column in zip(*group, strict=True)]


def write_shard(
    parts: Sequence[FilePart], path: Path, reading: Reading, cleaning: Cleaning, columns: Columns | None = None
) -> ShardCounts:
    """Write the documents of some parts as an Arrow stream file, and return the counts.

    With `columns`, the file has these too.
    """
    total = ShardCounts()
    with stream_writer(path, columns.schema if columns else SCHEMA) as writer:
        for batch, counts in batches(parts, reading, cleaning, columns):
            if batch.num_rows:
                writer.write_batch(batch)
            total.add(counts)
    return total
