from pathlib import Path

import numpy as np
import pytest

from snakmodel.dedup import signature_file
from snakmodel.dedup.minhash.parameters import RECORD
from snakmodel.dedup.signature_file import SignatureFile, SignatureWriter, cut_ranges


def records_of(keys: list[int]) -> np.ndarray:
    records = np.zeros(len(keys), RECORD)
    records["hi"] = np.array(keys, np.uint64)
    records["row"] = np.arange(len(keys))
    return records


def test_ranges_cut_the_whole_key_space() -> None:
    """Keys at both ends and at every border fall into exactly one range, whatever the number of ranges."""
    top = (1 << 64) - 1
    for ranges in (1, 2, 3, 7, 64, 1000):
        borders = [-(-(part << 64) // ranges) for part in range(ranges)]
        keys = sorted({0, top, *borders, *(border - 1 for border in borders[1:])})
        parts = cut_ranges(records_of(keys)[::-1], ranges)
        assert [part["hi"].tolist() for part in parts] == [
            [key for key in keys if key * ranges >> 64 == p] for p in range(ranges)
        ]


def test_equal_keys_stay_in_document_order() -> None:
    """So that the bytes of a file do not depend on the processor that sorted it."""
    keys = [5, 3, 5, 3, 5] * 50
    (part,) = cut_ranges(records_of(keys), 1)
    assert part["row"].tolist() == sorted(range(250), key=lambda row: (keys[row], row))


def test_a_writer_holds_no_more_than_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records beyond RUN go to disk in further runs, and are read back range by range with nothing lost."""
    monkeypatch.setattr(signature_file, "RUN", 100)
    keys = np.random.default_rng(1).integers(0, 1 << 63, 1000).astype(np.uint64) * 2
    records = records_of(keys.tolist())
    with (tmp_path / "x.sig").open("wb") as file:
        writer = SignatureWriter(file, 3)
        for first in range(0, 1000, 30):
            writer.add(records[first : first + 30], np.array([first], np.uint32))
            assert writer._held < 100 + 31
        writer.finish({"documents": 1000})
    found = SignatureFile.open(tmp_path / "x.sig")
    assert writer.total == 1000
    assert found.header["runs"] == 9
    parts = [found.read(part) for part in range(3)]
    assert [len(part) for part in parts] == [found.records(part) for part in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == sorted(records.tolist())
    assert all((part["hi"].astype(object) * 3 >> 64 == number).all() for number, part in enumerate(parts))
    assert found.dropped().tolist() == list(range(0, 1000, 30))


def test_a_file_without_records(tmp_path: Path) -> None:
    """A shard without documents has a file like any other."""
    with (tmp_path / "x.sig").open("wb") as file:
        SignatureWriter(file, 4).finish({"documents": 0})
    found = SignatureFile.open(tmp_path / "x.sig")
    assert [found.records(part) for part in range(4)] == [0] * 4
    assert (len(found.read(2)), len(found.dropped())) == (0, 0)
