"""Which files and which documents are taken: selection, shares, cleaning, and what is said about the rest."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.prepare.input_files import FilePart, input_files, plan_shards, selection, source_names
from snakmodel.prepare.shard_writer import Cleaning, ShardCounts, in_share
from tests import prepare_reference

LINES = [f"linje {number}" for number in range(4000)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def taken(
    folder: Path, shares: dict[str, float] | None, shards: int = 1, seed: int = 1, counts: ShardCounts | None = None
) -> Any:
    found = [
        (part.source, text)
        for parts in plan_shards(folder, shares, shards, 1, seed)
        for part in parts
        for text in prepare_reference.texts(part, counts=counts)
    ]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sources with the same 4000 lines, of different formats."""
    text = "\n".join(LINES).encode()
    write(tmp_path / "news/a.txt", text)
    write(tmp_path / "tales/b.jsonl", "\n".join(json.dumps({"text": line}) for line in LINES).encode())
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": LINES}).save_to_disk(tmp_path / "forum")
    return tmp_path


def test_a_share_is_the_same_however_the_files_are_cut(folder: Path) -> None:
    """A quarter of one source, half of another: about so many, in order, the same for any number of shards."""
    shares = {"news": 0.25, "tales": 0.5, "forum": 0.9}
    counts = ShardCounts()
    whole = taken(folder, shares, counts=counts)
    numbers = {name: sum(source == name for source, _ in whole) for name in shares}
    for name, share in shares.items():
        assert abs(numbers[name] / len(LINES) - share) < 0.03
    assert counts.beyond_share + len(whole) == 3 * len(LINES)
    for shards in (2, 7, 40):
        assert taken(folder, shares, shards) == whole


def test_a_larger_share_holds_the_smaller_one(folder: Path) -> None:
    """More of a source means the same documents and others; another seed means other ones; 1 means all."""
    some, more = ([text for _, text in taken(folder, {"news": share})] for share in (0.2, 0.4))
    assert set(some) < set(more)
    assert [text for _, text in taken(folder, {"news": 1.0})] == LINES
    other = [text for _, text in taken(folder, {"news": 0.2}, seed=2)]
    assert len(set(some) & set(other)) < len(some) // 2


def test_shares_of_many_small_files(tmp_path: Path) -> None:
    """Documents at the same place in different files are chosen apart, and moving the folder changes nothing."""
    for number in range(2000):
        write(tmp_path / f"one/s/{number}.txt", b"x%d" % number)
    chosen = taken(tmp_path / "one", {"s": 0.3})
    assert 500 < len(chosen) < 700
    (tmp_path / "one").rename(tmp_path / "two")
    assert taken(tmp_path / "two", {"s": 0.3}) == chosen


def test_shares_are_spread_evenly() -> None:
    """The choice does not follow the position: each tenth of the file, odd and even rows, give the same share."""
    chosen = in_share(np.arange(200_000), 0.37, 12345)
    assert np.abs(chosen.reshape(10, -1).mean(1) - 0.37).max() < 0.015
    assert np.abs(chosen.reshape(-1, 2).mean(0) - 0.37).max() < 0.01
    assert in_share(np.arange(1000), 1e-9, 5).sum() == 0


def test_names_without_their_endings(tmp_path: Path) -> None:
    """A file directly in the folder is named with or without its ending, compressed or not; `all` is everything."""
    for name in ("news.jsonl.gz", "old.txt.zst", "wiki.danish", "sub/x.parquet"):
        write(tmp_path / "raw" / name, b"x")
    raw = tmp_path / "raw"
    names = ["news", "old", "wiki", "sub"]
    assert source_names(raw) == names
    assert [one.source for one in input_files(raw, dict.fromkeys(names, 1.0))] == names
    assert [one.source for one in input_files(raw, {"news.jsonl.gz": 1.0})] == ["news"]
    everything = input_files(raw, None)
    assert [one.path.name for one in everything] == ["news.jsonl.gz", "old.txt.zst", "wiki.danish", "x.parquet"]
    assert input_files(raw, {"all": 1.0}) == everything
    assert [one.source for one in input_files(raw, {"sub": 0.5, "all": 1.0})] == ["sub"]
    assert input_files(raw, {"news.jsonl.gz": 0.5})[0].share == 0.5
    write(raw / "all/y.txt", b"y")
    assert [one.path.name for one in input_files(raw, {"all": 1.0})] == ["y.txt"]
    assert len(input_files(raw, None)) == len(everything) + 1


def test_all_stands_for_every_source(tmp_path: Path) -> None:
    """With a share of its own too; a file called all.txt is one source among others where nothing is selected."""
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, b"x\n")
    assert [(one.path.name, one.share) for one in input_files(tmp_path, {"all": 0.5})] == [
        ("a.txt", 0.5),
        ("b.txt", 0.5),
    ]
    write(tmp_path / "all.txt", b"x\n")
    assert [one.path.name for one in input_files(tmp_path, None)] == ["a.txt", "all.txt", "b.txt"]


def test_an_estimate_of_the_text(tmp_path: Path) -> None:
    """Compressed files count three times, and every file by its share: what the disk forecast works with."""
    for name in ("a.txt", "b.txt.gz", "c.parquet"):
        write(tmp_path / name, b"x" * 100)
    assert [one.text_bytes() for one in input_files(tmp_path, {"a": 0.5, "b": 1.0, "c": 0.5})] == [50, 300, 150]


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    """Whatever lies below the folder and is not read is named with the reason, and the sum is given."""
    for name in ("a/x.txt", "a/notes.md", "a/.hidden", "a/README.md", "a/LICENSE", "b/y.txt", "b/z.pdf"):
        write(tmp_path / name, b"x")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "c")
    write(tmp_path / "papers/one.pdf", b"x")
    write(tmp_path / ".git/config", b"x")
    write(tmp_path / "list.csv", b"x")
    found = selection(tmp_path, {"a": 1.0})
    assert found.skipped == {
        "hidden, as its name starts with a dot": [".git", "a/.hidden"],
        "no kind of text that is known": ["list.csv", "a/notes.md", "b/z.pdf", "papers/one.pdf"],
        "a description of the data": ["a/LICENSE", "a/README.md"],
        "a record that `datasets` keeps": ["c/dataset_info.json", "c/state.json"],
        "not among the sources that are selected": ["b/y.txt", "c/data-00000-of-00001.arrow"],
    }
    assert f"{tmp_path}: not read, as a description of the data: 2: a/LICENSE, a/README.md" in found.notes()
    assert found.sums() == f"{tmp_path}: 1 file(s) of 1 bytes are read, 12 other(s) not"
    every = selection(tmp_path, None)
    assert [one.path.name for one in every.files] == ["x.txt", "y.txt", "data-00000-of-00001.arrow"]
    assert "not among the sources that are selected" not in every.skipped


def test_links_are_followed(tmp_path: Path) -> None:
    """Files and folders behind links, to any depth, are read; a link back to a folder above is named, not entered."""
    write(tmp_path / "elsewhere/deep/x.txt", b"x")
    write(tmp_path / "raw/news/sub/a.txt", b"a")
    (tmp_path / "raw/news/sub/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw/news/b.txt").symlink_to(tmp_path / "raw/news/sub/a.txt")
    (tmp_path / "raw/news/sub/back").symlink_to(tmp_path / "raw")
    os.mkfifo(tmp_path / "raw/pipe.txt")
    found = selection(tmp_path / "raw", None)
    assert [one.path.name for one in found.files] == ["b.txt", "a.txt", "x.txt"]
    assert found.skipped == {
        "neither a file nor a folder": ["pipe.txt"],
        "a link to a folder that it lies in": ["news/sub/back"],
    }


@pytest.mark.parametrize("name", ["lost.txt", "lost", "news/lost.txt", "news/deep/lost", "news/notes.md"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    """Wherever it lies, unless its source is not selected."""
    write(tmp_path / "news/deep/a.txt", b"a")
    write(tmp_path / "tales/b.txt", b"b")
    (tmp_path / name).symlink_to("/mnt/gone")
    with pytest.raises(UserError, match=rf"{tmp_path / name}: a link to /mnt/gone, which cannot be opened: No such"):
        plan_shards(tmp_path, None, 1, 1)
    assert [one.path.name for one in selection(tmp_path, {"tales": 1.0}).files] == ["b.txt"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sub-folder without permission is named, not taken for empty; so is the data folder itself."""
    write(tmp_path / "news/closed/a.txt", b"a")
    write(tmp_path / "news/b.txt", b"b")
    scandir, closed = os.scandir, {tmp_path / "news/closed"}

    def refusing(path: Path) -> Any:
        if path in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr("snakmodel.prepare.folders.os.scandir", refusing)
    with pytest.raises(UserError, match=r"news/closed: the folder cannot be listed: Permission denied\. Restore"):
        plan_shards(tmp_path, None, 1, 1)
    closed.add(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}: the folder cannot be listed: Permission denied"):
        plan_shards(tmp_path, None, 1, 1)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.txt.gz", "a.jsonl.zst"])
def test_files_that_can_never_be_empty(tmp_path: Path, name: str) -> None:
    """0 bytes of a format with a header are a lost file, not an empty one."""
    write(tmp_path / "news/b.txt", b"b")
    write(tmp_path / "news" / name, b"")
    with pytest.raises(UserError, match=rf"{name}: 0 bytes, which is no valid {name[1:]} file"):
        plan_shards(tmp_path, None, 1, 1)


def test_empty_text_is_named(tmp_path: Path) -> None:
    """Where all that is selected is empty, the files are named."""
    for name in ("a.txt", "b.jsonl"):
        write(tmp_path / "news" / name, b"")
    with pytest.raises(UserError, match=r"all 2 input files .* are empty \(news/a\.txt, news/b\.jsonl\)"):
        plan_shards(tmp_path, None, 1, 1)


def test_a_dataset_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    """A file that the dataset's record lists and that is not there is said, also where none is left."""
    write(tmp_path / "news/b.txt", b"b")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "forum", num_shards=2)
    for lost in ("data-00001-of-00002.arrow", "data-00000-of-00002.arrow"):
        (tmp_path / "forum" / lost).unlink()
        with pytest.raises(UserError, match=rf"forum/state\.json: it lists \d file\(s\) that are not there: .*{lost}"):
            plan_shards(tmp_path, None, 1, 1)


def test_a_dataset_is_what_its_record_lists(tmp_path: Path) -> None:
    """Results of map and filter that `datasets` keeps in the same folder are not taken for data, and are named."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    data = tmp_path / "d/data-00000-of-00001.arrow"
    write(tmp_path / "d/cache-1234.arrow", data.read_bytes())
    write(tmp_path / "d/data-00001-of-00002.arrow", data.read_bytes())
    assert taken(tmp_path, None) == [("d", "a")]
    assert selection(tmp_path, None).skipped["no data file of its dataset"] == [
        "d/cache-1234.arrow",
        "d/data-00001-of-00002.arrow",
    ]
    write(tmp_path / "d/state.json", b"{")
    with pytest.raises(UserError, match=r"d/state\.json does not list the data files"):
        plan_shards(tmp_path, None, 1, 1)


def test_compressed_files_stay_whole_in_the_plan(tmp_path: Path) -> None:
    """A .gz goes to the shard in which it begins; shards that would be empty are not made."""
    write(tmp_path / "a.txt.gz", b"x" * 100)
    write(tmp_path / "b.txt", b"y" * 50)
    plan = plan_shards(tmp_path, None, 10, 1)
    borders = [[(part.start, part.end) for part in parts] for parts in plan]
    assert borders == [[(0, 100)], [(0, 5)], [(5, 20)], [(20, 35)], [(35, 50)]]


def test_cleaning_is_counted(tmp_path: Path) -> None:
    """Trimming, composing and the least length each change what they say, in that order, and are counted."""
    path = write(tmp_path / "a.txt", " æ\u3000\nra\u030ad\n\u00a0ab \nabc\n\u1680\n".encode())
    part = FilePart(str(path), "s", 0, path.stat().st_size)

    def cleaned(cleaning: Cleaning) -> tuple[list[str], ShardCounts]:
        counts = ShardCounts()
        return prepare_reference.texts(part, cleaning=cleaning, counts=counts), counts

    plain, counts = cleaned(Cleaning())
    assert plain == [" æ\u3000", "ra\u030ad", "\u00a0ab ", "abc"]
    assert counts == ShardCounts(empty=1)
    every, counts = cleaned(Cleaning(trim=True, nfc=True, min_characters=3))
    assert every == ["råd", "abc"]
    assert counts == replace(ShardCounts(empty=1), trimmed=2, composed=1, short=2)
    assert str(counts) == "0 documents, 0 bytes, 1 empty ones left out, 2 trimmed, 1 composed, 2 short"
    assert cleaned(Cleaning(min_characters=99))[0] == []
    assert cleaned(Cleaning(min_characters=3))[0] == plain


def test_every_kind_of_white_space_is_trimmed(tmp_path: Path) -> None:
    """Trimming takes what str.strip takes, no more and no less."""
    words = [f"{chr(point)}x{chr(point)}" for point in range(1, 0x3100) if chr(point) not in "\n\r"]
    path = tmp_path / "a.arrow"
    table = pa.table({"text": words})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    part = FilePart(str(path), "s", 0, path.stat().st_size)
    assert prepare_reference.texts(part, cleaning=Cleaning(trim=True)) == [word.strip() for word in words]
