"""Token ids on disk: PREFIX.bin (the ids), PREFIX.idx (sizes, pointers, documents), PREFIX.json (the manifest).

preprocess_data.py writes one such triple per shard, merge_datasets.py joins them, and data/gpt_dataset.py reads the
result memory-mapped. The .bin and .idx files equal Megatron's mmap indexed dataset byte for byte. All offsets are
int64.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_llm.data.manifest import beside
from run_contract.errors import InputsMissing, UserError, kind_of

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
"""Header of a .idx file: magic, version, dtype code, number of sequences, length of the document index."""
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f8", 8: "<u2"}
BLOCK = 1 << 20
"""Number of index entries that are held in memory at once."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of the ids in .bin: uint16 below 65,500 vocabulary entries, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedDataset:
    """A checked, memory-mapped dataset: `dataset.get(i)` returns sequence i.

    Raises InputsMissing when the .bin or .idx is absent, and UserError when one of them violates the format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self.idx, self.bin = beside(self.prefix, ".idx"), beside(self.prefix, ".bin")
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise InputsMissing(f"{path} does not exist: give the prefix that .bin and .idx follow")
        self._read_header()
        self._check_pointers()
        self._check_documents()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)  # a memory map would be pickled as a copy of the whole file

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Tokens [offset, offset + length) of sequence i, in the file's dtype; without a length, to the sequence's
        end."""
        start = int(self.pointers[i]) // self.dtype.itemsize
        stop = int(self.sizes[i]) if length is None else offset + length
        return self.tokens[start + offset : start + stop]

    def fingerprint(self) -> str:
        """An xxh3-128 digest of the header and the sizes: cheap, and different for any other division into
        documents."""
        digest = xxhash.xxh3_128(self.header)
        for block in blocks(self.sizes):
            digest.update(block.tobytes())
        return digest.hexdigest()

    def _read_header(self) -> None:
        with self.idx.open("rb") as file:
            self.header = file.read(HEADER.size)
        if len(self.header) < HEADER.size or not self.header.startswith(MAGIC):
            raise UserError(
                f"{self.idx} is not a Megatron index: it starts with {self.header[:9]!r}, not with {MAGIC!r}; give the "
                "prefix of a tokenised dataset"
            )
        _, version, code, sequences, documents = HEADER.unpack(self.header)
        if version != 1:
            raise UserError(
                f"{self.idx} has version {version}, but only version 1 can be read; tokenise the data again"
            )
        if code not in DTYPES:
            raise UserError(
                f"{self.idx} has dtype code {code}; valid codes are {', '.join(map(str, DTYPES))}; tokenise the data "
                "again"
            )
        found, expected = self.idx.stat().st_size, HEADER.size + 12 * sequences + 8 * documents
        if found != expected:
            raise UserError(
                f"{self.idx} has {found} bytes, but its {sequences} sequences and {documents} documents need "
                f"{expected}; write the dataset again"
            )
        self.dtype = np.dtype(DTYPES[code])
        self.sizes: NDArray[np.int32] = mapped(self.idx, "<i4", HEADER.size, sequences)
        self.pointers: NDArray[np.int64] = mapped(self.idx, "<i8", HEADER.size + 4 * sequences, sequences)
        self.documents: NDArray[np.int64] = mapped(self.idx, "<i8", HEADER.size + 12 * sequences, documents)

    def _check_pointers(self) -> None:
        """Check that sizes are not negative, that pointers follow from them, and that the .bin has the right length."""
        end = first = 0
        for sizes, pointers in zip(blocks(self.sizes), blocks(self.pointers), strict=True):
            expected, end = pointers_after(end, sizes, self.dtype.itemsize)
            bad = np.flatnonzero((sizes < 0) | (pointers != expected))
            if len(bad):
                i = int(bad[0])
                raise UserError(
                    f"{self.idx}: sequence {first + i} has size {sizes[i]} and pointer {pointers[i]}, but its pointer "
                    f"should be {expected[i]}; write the dataset again"
                )
            first += len(sizes)
        found = self.bin.stat().st_size
        if found != end:
            raise UserError(
                f"{self.bin} has {found} bytes, but its .idx says {end}: the two files do not belong together; write "
                "or copy both again"
            )
        self.tokens: NDArray[Any] = mapped(self.bin, self.dtype.str, 0, end // self.dtype.itemsize)

    def _check_documents(self) -> None:
        """Check that the document index rises from 0 to the number of sequences and never falls."""
        ends = self.documents
        if not len(ends) or ends[0] != 0 or ends[-1] != len(self) or bool((ends[1:] < ends[:-1]).any()):
            raise UserError(
                f"{self.idx}: the document index must rise from 0 to {len(self)} sequences; it has {len(ends)} "
                f"entries, {ends[:1].tolist()} to {ends[-1:].tolist()}; write the dataset again"
            )


class IndexedDatasetWriter:
    """Writes one .bin and one .idx file as a stream; the memory used does not grow with the number of documents.

    To be used as a context manager inside `publishing(...)`. The .idx file is written when the body ends without an
    error. Raises UserError when the disk is full.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype[Any]) -> None:
        self.bin_path, self.idx_path, self.dtype = bin_path, idx_path, dtype
        self.sequences = self.tokens = 0

    def __enter__(self) -> IndexedDatasetWriter:
        folder = self.bin_path.parent
        with disk_errors(self.bin_path):
            self._bin = self.bin_path.open("wb", buffering=0)
            self._sizes: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)
            self._ends: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._bin, self._sizes, self._ends:
            if kind is None:
                with disk_errors(self.idx_path):
                    self._write_index()

    def add(self, tokens: NDArray[Any], sizes: NDArray[np.int32]) -> None:
        """Append documents of one sequence each: their ids back to back, (sum of sizes,), and their sizes, (n,)."""
        self._append_index(sizes, np.arange(1, len(sizes) + 1, dtype="<i8"))
        with disk_errors(self.bin_path):
            write_all(self._bin, tokens.astype(self.dtype, copy=False))

    def append(self, dataset: IndexedDataset) -> None:
        """Append all sequences and documents of another dataset of the same dtype."""
        offset = self.sequences
        for sizes in blocks(dataset.sizes):
            self._append_index(sizes, np.empty(0, dtype="<i8"))
        for ends in blocks(dataset.documents[1:]):
            self._append_ends(ends + offset)
        with disk_errors(self.bin_path), dataset.bin.open("rb") as source:
            copy_file(source.fileno(), self._bin.fileno(), dataset.bin.stat().st_size)

    def _append_index(self, sizes: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        with disk_errors(self.idx_path):
            write_all(self._sizes, sizes.astype("<i4", copy=False))
        self._append_ends(ends + self.sequences)
        self.sequences += len(sizes)
        self.tokens += int(sizes.sum(dtype=np.int64))

    def _append_ends(self, ends: NDArray[np.int64]) -> None:
        with disk_errors(self.idx_path):
            write_all(self._ends, ends.astype("<i8", copy=False))

    def _write_index(self) -> None:
        code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        documents = self._ends.tell() // 8 + 1
        with self.idx_path.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, self.sequences, documents))
            for block in spilled(self._sizes, "<i4"):
                file.write(block.tobytes())
            end = 0
            for block in spilled(self._sizes, "<i4"):
                pointers, end = pointers_after(end, block, self.dtype.itemsize)
                file.write(pointers.tobytes())
            file.write(bytes(8))
            for block in spilled(self._ends, "<i8"):
                file.write(block.tobytes())


def mapped(path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """A read-only memory map of `count` entries; an empty array when there are none, since mmap refuses an empty
    range."""
    if not count:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The array in pieces of BLOCK entries."""
    return (array[start : start + BLOCK] for start in range(0, len(array), BLOCK))


def spilled(file: IO[bytes], dtype: str) -> Iterator[NDArray[Any]]:
    """Yield the content of a temporary file from its beginning, in blocks."""
    file.seek(0)
    while block := file.read(8 * BLOCK):
        yield np.frombuffer(block, dtype=dtype)


def pointers_after(end: int, sizes: NDArray[np.int32], itemsize: int) -> tuple[NDArray[np.int64], int]:
    """Byte offsets (n,) int64 of sequences that follow byte `end`, and the byte after the last of them."""
    ends = end + np.cumsum(sizes, dtype=np.int64) * itemsize
    pointers = np.concatenate([np.array([end], dtype="<i8"), ends[:-1]])[: len(sizes)]
    return pointers, int(ends[-1]) if len(sizes) else end


def write_all(file: IO[bytes], array: NDArray[Any]) -> None:
    """Write all bytes of an array to an unbuffered file, which may accept only a part of them per call."""
    view = array.view(np.uint8).data
    while view:
        view = view[file.write(view) :]


def copy_file(source: int, target: int, size: int) -> None:
    """Copy `size` bytes between file descriptors, inside the kernel if the file system can, otherwise through
    memory."""
    left = size
    while left:
        try:
            count = os.copy_file_range(source, target, min(left, 1 << 30))
        except OSError:  # other file systems, old kernels; a real error occurs again in the plain copy
            count = 0
        count = count or os.write(target, os.read(source, min(left, 1 << 24)))
        if not count:
            raise UserError(
                f"a token file became {left} bytes shorter while it was read; wait until nothing writes to it any "
                "more, and run this again"
            )
        left -= count


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write that a user can correct into an error that names the file: NoRoom if the disk is full."""
    try:
        yield
    except OSError as error:
        kind = kind_of(error)
        if kind is None:
            raise
        raise kind(f"cannot write {path}: {error.strerror}; free space or raise the quota, then run again") from error
