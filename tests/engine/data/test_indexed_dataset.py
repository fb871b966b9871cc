"""The .bin/.idx format against bytes written out by hand, and what the reader refuses."""

from __future__ import annotations

import pickle
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_llm.data import indexed_dataset
from megatron_llm.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from run_contract.errors import InputsMissing, UserError

DOCUMENTS = [[5, 258, 7], [65535], [1, 2]]
BIN = bytes([5, 0, 2, 1, 7, 0]) + bytes([255, 255]) + bytes([1, 0, 2, 0])
IDX = (
    b"MMIDIDX\0\0"
    + bytes([1, 0, 0, 0, 0, 0, 0, 0])  # version
    + bytes([8])  # uint16
    + bytes([3, 0, 0, 0, 0, 0, 0, 0])  # sequences
    + bytes([4, 0, 0, 0, 0, 0, 0, 0])  # length of the document index
    + bytes([3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])  # sizes
    + bytes(8) + bytes([6, 0, 0, 0, 0, 0, 0, 0]) + bytes([8, 0, 0, 0, 0, 0, 0, 0])  # pointers
    + bytes(8) + bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])  # documents
)  # fmt: skip


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> None:
    """One dataset, a document a call."""
    bin_path, idx_path = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    with IndexedDatasetWriter(bin_path, idx_path, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)], dtype=np.int32))


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The prefix of the dataset written out above."""
    (tmp_path / "x.bin").write_bytes(BIN)
    (tmp_path / "x.idx").write_bytes(IDX)
    return tmp_path / "x"


def test_writer_gives_the_golden_bytes(tmp_path: Path) -> None:
    """The writer's files equal the format written out by hand, and leave nothing else behind."""
    write(tmp_path / "y", DOCUMENTS)
    assert (tmp_path / "y.bin").read_bytes() == BIN
    assert (tmp_path / "y.idx").read_bytes() == IDX
    assert len(list(tmp_path.iterdir())) == 2


def test_reader_reads_the_golden_bytes(golden: Path) -> None:
    """Every document and every slice of one comes back, also from a pickled reader."""
    for dataset in (IndexedDataset(golden), pickle.loads(pickle.dumps(IndexedDataset(golden)))):
        assert [dataset.get(i).tolist() for i in range(len(dataset))] == DOCUMENTS
        assert dataset.get(0, 1).tolist() == [258, 7]
        assert dataset.get(0, 1, 1).tolist() == [258]
        assert dataset.tokens.dtype == np.uint16


def test_wide_vocabulary_takes_int32(tmp_path: Path) -> None:
    """65,499 entries fit uint16, from 65,500 on the ids are int32 with code 4."""
    assert token_dtype(65499) == np.uint16
    write(tmp_path / "y", [[70000, 1]], vocab_size=65500)
    assert (tmp_path / "y.bin").read_bytes() == struct.pack("<ii", 70000, 1)
    assert (tmp_path / "y.idx").read_bytes()[17] == 4


def test_empty_dataset_is_valid(tmp_path: Path) -> None:
    """No documents at all: an empty .bin and an index whose document index is [0]."""
    write(tmp_path / "y", [])
    assert (tmp_path / "y.bin").read_bytes() == b""
    assert (tmp_path / "y.idx").read_bytes()[18:] == struct.pack("<QQq", 0, 1, 0)
    assert len(IndexedDataset(tmp_path / "y")) == 0


def test_pointers_pass_two_to_the_31() -> None:
    """Pointers of sizes whose sum exceeds int32 are exact."""
    sizes = np.full(4, 2**30 + 1, dtype=np.int32)
    pointers, end = indexed_dataset.pointers_after(7, sizes, 4)
    assert pointers.tolist() == [7 + 4 * i * (2**30 + 1) for i in range(4)]
    assert end == 7 + 16 * (2**30 + 1)


def test_blocks_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index much longer than the block held in memory is written and read as one."""
    documents = [[i] * (i % 4) for i in range(1, 100)]
    write(tmp_path / "whole", documents)
    monkeypatch.setattr(indexed_dataset, "BLOCK", 8)
    write(tmp_path / "blocks", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"blocks{suffix}").read_bytes()
    dataset = IndexedDataset(tmp_path / "blocks")
    assert [dataset.get(i).tolist() for i in range(99)] == documents


@pytest.mark.parametrize(
    ("suffix", "at", "value", "message"),
    [
        (".idx", 0, b"TNTIDX\0\0", r"x\.idx is not a Megatron index: it starts with b'TNTIDX"),
        (".idx", 9, b"\x02", "version 2"),
        (".idx", 17, b"\x09", "dtype code 9; valid codes are 1, 2, 3, 4, 5, 6, 7, 8"),
        (".idx", 17, b"\x05", r"sequence 1 has size 1 and pointer 6, but its pointer should be 24"),
        (".idx", 18, b"\x04", r"x\.idx has 102 bytes, but its 4 sequences and 4 documents need 114"),
        (".idx", 34, b"\xff\xff\xff\xff", "sequence 0 has size -1"),
        (".idx", 54, b"\x07", "sequence 1 has size 1 and pointer 7, but its pointer should be 6"),
        (".idx", 70, b"\x01", "document index must rise from 0 to 3 sequences; it has 4 entries, .1. to .3."),
        (".idx", 78, b"\x09", "document index must rise"),
        (".idx", 94, b"\x02", "document index must rise"),
    ],
)
def test_a_damaged_index_is_refused(golden: Path, suffix: str, at: int, value: bytes, message: str) -> None:
    """Each field that is wrong gives an error that names the file and what was found."""
    path = golden.with_suffix(suffix)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        IndexedDataset(golden)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file_is_refused(golden: Path, suffix: str) -> None:
    """A .bin or .idx that lost its last bytes is an error that names it and both lengths."""
    path = golden.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"x{suffix} has {path.stat().st_size} bytes"):
        IndexedDataset(golden)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(golden: Path, suffix: str) -> None:
    """Without one of the two the error is InputsMissing with its path."""
    golden.with_suffix(suffix).unlink()
    with pytest.raises(InputsMissing, match=rf"x{suffix} does not exist"):
        IndexedDataset(golden)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """A write that the system refuses becomes a UserError, in the .bin and in the index."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*y\.bin: File too large"):
            write(tmp_path / "y", [[1] * 5000])
        with pytest.raises(UserError, match=r"cannot write .*y\.idx: File too large"):
            write(tmp_path / "y", [[1]] * 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_fingerprint_sees_sizes_and_dtype(tmp_path: Path) -> None:
    """Equal cuts give equal fingerprints, another cut or dtype gives another."""
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1, 2], [3]])
    write(tmp_path / "c", [[1], [2, 3]])
    write(tmp_path / "d", [[1, 2], [3]], vocab_size=70000)
    a, b, c, d = (IndexedDataset(tmp_path / name).fingerprint() for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
