"""Signature files: the keys that link a shard's documents, sorted and cut into ranges of the key space.

A file is written run by run, so that a writer holds at most `RUN` records, and is read range by range. Its layout,
little-endian: the magic; for each run P segments of records (one per range, sorted by key) and one segment of dropped
rows; an index with an entry of type SEGMENT for each segment; a JSON header; the length of the header and the xxh3-64
of index and header, uint64; the magic again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError
from snakmodel.dedup.minhash.parameters import RECORD

Numbers = NDArray[np.int64]

MAGIC = b"SNAKSIG2"
SEGMENT = np.dtype([("offset", "<u8"), ("length", "<u8"), ("checksum", "<u8")])
"""The place and length of a segment, in bytes, and its xxh3-64."""
ROW = np.dtype("<u4")
RUN = 1 << 21
"""The number of records that are sorted at a time. They take 42 MB, or about 150 MB with what sorting takes."""
_TAIL = 16 + len(MAGIC)


@dataclass(frozen=True)
class SignatureFile:
    """An opened signature file."""

    path: Path
    header: dict[str, Any]
    """The header: parameters, fingerprint, ranges, runs, documents, short_documents, dropped, and input, which names
    the texts."""
    index: NDArray[np.void]
    """The index, (runs, ranges + 1) of SEGMENT."""
    digest: str
    """The xxh3-64 of index and header, in hexadecimal. It stands for the content, whose checksums the index holds."""

    @classmethod
    def open(cls, path: Path) -> SignatureFile:
        """Read the header and the index. Raises UserError if the file is of another kind, damaged or cut off."""
        with path.open("rb") as file:
            start, size = file.read(len(MAGIC)), file.seek(0, 2)
            try:
                file.seek(size - _TAIL)
                tail = file.read(_TAIL)
                length, digest = (int(value) for value in np.frombuffer(tail[:16], "<u8"))
                file.seek(size - _TAIL - length)
                header = file.read(length)
                meta = json.loads(header)
                entries = meta["runs"] * (meta["ranges"] + 1)
                file.seek(size - _TAIL - length - entries * SEGMENT.itemsize)
                table = file.read(entries * SEGMENT.itemsize)
                intact = start == MAGIC == tail[16:] and xxhash.xxh3_64_intdigest(table + header) == digest
                index = np.frombuffer(table, SEGMENT).reshape(meta["runs"], meta["ranges"] + 1)
                expected = len(MAGIC) + int(index["length"].sum()) + len(table) + length + _TAIL
            except (OSError, ValueError, KeyError, TypeError):
                intact = False
        if not intact or size != expected:
            raise UserError(f"{path} is not a signature file, or is cut off or damaged; run dedup signatures again")
        return cls(path, meta, index, f"{digest:016x}")

    def records(self, part: int) -> int:
        """The number of records in a range."""
        return int(self.index["length"][:, part].sum()) // RECORD.itemsize

    def read(self, part: int) -> NDArray[np.void]:
        """The records of a range, one sorted run after the other. Raises UserError if a checksum does not match."""
        return self._read(part, RECORD)

    def dropped(self) -> NDArray[Any]:
        """The rows of the dropped short documents, ascending. Raises UserError if a checksum does not match."""
        return self._read(self.header["ranges"], ROW)

    def _read(self, column: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        parts = []
        with self.path.open("rb") as file:
            for run, entry in enumerate(self.index[:, column]):
                file.seek(int(entry["offset"]))
                content = file.read(int(entry["length"]))
                if xxhash.xxh3_64_intdigest(content) != entry["checksum"]:
                    raise UserError(f"{self.path}: range {column} of run {run} is damaged; run dedup signatures again")
                parts.append(np.frombuffer(content, dtype))
        return np.concatenate([np.empty(0, dtype), *parts]) if len(parts) != 1 else parts[0]


class SignatureWriter:
    """Takes records in the order of documents, and writes them run by run; `finish` completes the file."""

    def __init__(self, file: BinaryIO, ranges: int) -> None:
        self.file = file
        self.ranges = ranges
        self.total = 0
        self._offset = file.write(MAGIC)
        self._index: list[tuple[int, int, int]] = []
        self._records: list[NDArray[np.void]] = []
        self._rows: list[NDArray[Any]] = []
        self._held = 0

    def add(self, records: NDArray[np.void], dropped: NDArray[Any]) -> None:
        """Add records, and the rows of documents that are to be dropped."""
        self._records.append(records)
        self._rows.append(dropped.astype(ROW))
        self._held += len(records) + len(dropped)
        if self._held >= RUN:
            self._write_run()

    def _write_run(self) -> None:
        records = np.concatenate([np.empty(0, RECORD), *self._records])
        rows = np.concatenate([np.empty(0, ROW), *self._rows])
        self.total += len(records)
        self._records, self._rows, self._held = [], [], 0
        for segment in [*cut_ranges(records, self.ranges), rows]:
            content = segment.view(np.uint8).data
            self._index.append((self._offset, segment.nbytes, xxhash.xxh3_64_intdigest(content)))
            self._offset += self.file.write(content)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the records that are still held, the index, and a header with the entries of `about`."""
        if self._held:
            self._write_run()
        table = np.array(self._index, SEGMENT).tobytes()
        runs = len(self._index) // (self.ranges + 1)
        header = json.dumps({**about, "ranges": self.ranges, "runs": runs}, sort_keys=True).encode()
        digest = xxhash.xxh3_64_intdigest(table + header)
        self.file.write(table + header + np.array([len(header), digest], "<u8").tobytes() + MAGIC)


def cut_ranges(records: NDArray[np.void], ranges: int) -> list[NDArray[np.void]]:
    """Sort records by the upper half of the key, and cut them into ranges at p·2⁶⁴/P for p = 1 … P-1.

    Records with the same upper half stay in the order of documents.
    """
    records = records[np.argsort(records["hi"], kind="stable")]
    borders = np.array([-(-(part << 64) // ranges) for part in range(1, ranges)], np.uint64)
    return np.split(records, np.searchsorted(records["hi"], borders))


@dataclass(frozen=True)
class Corpus:
    """The signature files of all shards, checked against each other; those of earlier runs come first."""

    files: tuple[SignatureFile, ...]
    bases: Numbers
    """The number of each shard's first document, (S + 1,); the last entry is the number of all documents."""
    digest: str
    """A digest that identifies the texts, the parameters, and how they are cut into shards and ranges."""
    earlier: int = 0
    """The number of shards of earlier runs."""

    @classmethod
    def open(cls, folder: Path, shards: int, earlier: Sequence[SignatureFile] = ()) -> Corpus:
        """Open the signature files of all shards, and put them after those of earlier runs.

        Raises InputsMissing if a shard is absent, UserError if there are too many files or they have different
        parameters.
        """
        own = [SignatureFile.open(path) for path in numbered(folder, "shard", ".sig", shards, "--shards")]
        first = own[0]
        for file in own:
            for key in ("parameters", "ranges"):
                if file.header[key] != first.header[key]:
                    raise UserError(
                        f"{first.path} and {file.path} were made with different {key}: {first.header[key]} and "
                        f"{file.header[key]}; run dedup signatures again for all shards with the same flags"
                    )
        refuse_others(earlier, first.header, "--against")
        files = (*earlier, *own)
        bases = np.cumsum([0, *(file.header["documents"] for file in files)], dtype=np.int64)
        digest = xxhash.xxh3_128_hexdigest(json.dumps([file.header for file in files], sort_keys=True).encode())
        return cls(files, bases, digest, len(earlier))

    @property
    def own(self) -> tuple[SignatureFile, ...]:
        """The signature files of this run, without those of earlier runs."""
        return self.files[self.earlier :]

    @property
    def first(self) -> int:
        """The number of this run's first document, which is the number of all documents of earlier runs."""
        return int(self.bases[self.earlier])

    @property
    def own_bases(self) -> Numbers:
        """The number of each of this run's shards' first document, if only this run's documents are numbered."""
        return self.bases[self.earlier :] - self.first

    @property
    def ranges(self) -> int:
        """The number of ranges into which the files are cut."""
        return int(self.files[0].header["ranges"])


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The parameters and the number of ranges in which two headers differ, with both values; empty if they agree."""
    pairs = [{**header["parameters"], "ranges": header["ranges"]} for header in (one, other)]
    names = [name for name in {**pairs[0], **pairs[1]} if pairs[0].get(name) != pairs[1].get(name)]
    return ", ".join(f"{name}: {pairs[0].get(name)} and {pairs[1].get(name)}" for name in names)


def refuse_others(files: Sequence[SignatureFile], header: Mapping[str, Any], key: str) -> None:
    """Raise UserError if a signature file of an earlier run was made with other parameters than those in a header.

    `key` is the flag or the key of the recipe that names the earlier run.
    """
    for file in files:
        if found := difference(file.header, header):
            raise UserError(
                f"{key}: {file.path} was made with different parameters than this run's signatures. Different are, "
                f"there and here, {found}. Give this run the same, or do the earlier run again with these"
            )


def numbered(folder: Path, stem: str, suffix: str, count: int, flag: str) -> list[Path]:
    """The paths stem-00000 … in a folder. Raises InputsMissing if one is absent, UserError if there are others."""
    if count < 1:
        raise UserError(f"{flag} {count}: must be 1 or more")
    paths = [folder / f"{stem}-{number:05d}{suffix}" for number in range(count)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise InputsMissing(f"{folder} lacks {len(missing)} of {count} files, the first is {missing[0]}")
    if foreign := sorted({path.name for path in folder.glob(f"{stem}-*{suffix}")} - {path.name for path in paths}):
        raise UserError(
            f"{folder} holds {foreign[0]} although {flag} is {count}: it is of another run; remove the folder"
        )
    return paths


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Save an array under exactly this name (`np.save` would add a suffix to a path)."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    """An array and the JSON object beside it. Raises InputsMissing if one is absent, UserError if one is damaged."""
    about = path.with_suffix(".json")
    if missing := [str(file) for file in (path, about) if not file.is_file()]:
        raise InputsMissing(f"{' and '.join(missing)} missing; run the step that writes it first")
    try:
        return np.load(path, allow_pickle=False), json.loads(about.read_text(encoding="utf-8"))
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} or the .json beside it is damaged ({error}); run the step that writes it again"
        ) from error
