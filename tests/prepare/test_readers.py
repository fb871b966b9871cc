"""Documents of every format: the same whatever the cut, and errors that name file, line and remedy."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import strategies

from run_contract.errors import UserError
from snakmodel.prepare import byte_streams
from snakmodel.prepare import json_lines as jsonl
from snakmodel.prepare.byte_streams import TextFile
from snakmodel.prepare.chunks import Faults, is_utf8
from snakmodel.prepare.input_files import FilePart, plan_shards
from snakmodel.prepare.json_lines import json_lines
from snakmodel.prepare.readers import Reading, read
from snakmodel.prepare.shard import prepare
from snakmodel.prepare.shard_writer import WHITE_SPACE, Cleaning, ShardCounts, blank, write_shard
from tests import prepare_reference

DOCUMENTS = ["første", "to\nlinjer\r\nog 🐍", "  med rum ", "\u2028", "sidste \u2028 ord", " ", "", "x" * 1000]
KEPT = [text for text in DOCUMENTS if text.strip()]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def whole(path: Path) -> FilePart:
    return FilePart(str(path), "s", 0, path.stat().st_size)


def texts(part: FilePart, counts: ShardCounts | None = None, **reading: str) -> list[str]:
    return prepare_reference.texts(part, Reading(**reading), counts=counts)


def plan_texts(folder: Path, shards: int) -> list[str]:
    return [text for parts in plan_shards(folder, None, shards, 1) for part in parts for text in texts(part)]


def json_text(items: list[Any]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def in_jsonl(folder: Path) -> None:
    write(folder / "a.jsonl", json_text([{"id": 1, "text": text} for text in DOCUMENTS]))
    write(folder / "b.jsonl.gz", gzip.compress(json_text([{"text": "fra b"}])))


def in_parquet(folder: Path) -> None:
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    write(folder / "b.txt", b"fra b\n")


def in_datasets(folder: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "a", num_shards=2)
    splits = {name: datasets.Dataset.from_dict({"text": [f"fra {name}"]}) for name in ("b",)}
    datasets.DatasetDict(splits).save_to_disk(folder / "c")


@pytest.mark.parametrize("make", [in_jsonl, in_parquet, in_datasets])
def test_any_number_of_shards_gives_the_same_documents(tmp_path: Path, make: Any) -> None:
    """Files that can be cut, and those that cannot, give every document once and in order, however many shards."""
    make(tmp_path)
    for shards in (*range(1, 40), 10**6):
        assert plan_texts(tmp_path, shards) == [*KEPT, "fra b"], shards


def test_row_groups_and_batches_are_shared_out(tmp_path: Path) -> None:
    """A Parquet file and an Arrow dataset of many groups really make many tasks, each with a part of the rows."""
    table = pa.table({"text": [f"nr {i}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", row_group_size=50, compression="none")
    with pa.OSFile(str(tmp_path / "q.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    for name in ("p", "q"):
        sizes = [sum(map(len, map(texts, parts))) for parts in plan_shards(tmp_path, {name: 1.0}, 4, 1)]
        assert sum(sizes) == 1000
        assert min(sizes) >= 50


def test_compressed_files_are_read_whole(tmp_path: Path) -> None:
    """Several gzip members, zero padding after one, several zstd frames and a large window: as if not compressed."""
    raw = "".join(f"linje {i} æ\n" for i in range(50000)).encode()
    pieces = [raw[:100000], raw[100000:100007], raw[100007:]]
    zstd = zstandard.ZstdCompressor(level=3)
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28))
    widest = b"\x28\xb5\x2f\xfd\0\xa8" + (len(pieces[0]) << 3 | 1).to_bytes(3, "little") + pieces[0]  # zstd --long=31
    files = {
        "plain.txt": raw,
        "members.txt.gz": b"".join(map(gzip.compress, pieces)),
        "padded.txt.gz": gzip.compress(pieces[0]) + bytes(700) + gzip.compress(pieces[1] + pieces[2]) + bytes(512),
        "frames.txt.zst": b"".join(map(zstd.compress, pieces)) + zstd.compress(b""),
        "wide.txt.zst": wide.compress(raw),
        "widest.txt.zst": widest + zstd.compress(pieces[1] + pieces[2]),
        "bom.txt.gz": gzip.compress(b"\xef") + gzip.compress(b"\xbb\xbf" + raw),
    }
    expected = raw.decode().splitlines()
    for name, content in files.items():
        assert texts(whole(write(tmp_path / name, content))) == expected, name
    blocks = b"en\nto\n\n \ntre\n\n"
    assert texts(whole(write(tmp_path / "b.txt.zst", zstd.compress(blocks))), document="blank-line") == [
        "en\nto",
        "tre",
    ]
    assert texts(whole(tmp_path / "b.txt.zst"), document="file") == ["en\nto\n\n \ntre"]
    assert texts(whole(write(tmp_path / "empty.txt.gz", gzip.compress(b"")))) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    """Cut off anywhere, a changed byte, foreign bytes after the end, and a file of another kind are all errors."""
    raw = random.Random(1).randbytes(300000).hex().encode()
    packed = gzip.compress(raw) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    middle = len(packed) // 2
    damaged = {
        "cut short": packed[:middle],
        "cut at its end": packed[:-1],
        "changed": packed[:middle] + bytes([packed[middle] ^ 1]) + packed[middle + 1 :],
        "trailing": packed + b"more",
        "other": raw[:5000],
        "zeros": bytes(100),
    }
    for name, content in damaged.items():
        path = write(tmp_path / f"{name}.txt{suffix}", content)
        with pytest.raises(UserError, match=rf"{name}\.txt\{suffix} is damaged, or not what its name says"):
            texts(whole(path))


def bad_lines() -> dict[str, tuple[Any, str]]:
    return {
        '{"text": "a"': ("not JSON", r"line 3 is not JSON: Expecting ',' delimiter"),
        '{"text": "a"} {"text": "b"}': ("not JSON", r"line 3 is not JSON: Extra data"),
        '["text"]': ("not an object", r"line 3 holds a list, not an object with a key 'text'"),
        '{"txt": "a"}': ("no such key", r"line 3 has no key 'text', only \['txt'\]; did you mean data.key: txt\?"),
        '{"text": null}': ("not a string", r"line 3 has null, not a string, under 'text'"),
        '{"text": 5}': ("not a string", r"line 3 has a number, not a string, under 'text'"),
        '{"text": "a\tb"}': ("not JSON", r"line 3 is not JSON: Invalid control character"),
        "[" * 100000: ("not JSON", r"line 3 is not JSON: maximum recursion depth"),
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_json_is_named_by_line_or_skipped(tmp_path: Path, suffix: str) -> None:
    """Under `error` and `replace` the line is named with what is wrong; under `skip` it is left out and counted."""
    pack = gzip.compress if suffix else bytes
    for line, (reason, message) in bad_lines().items():
        content = b'{"text": "en"}\n\n' + line.encode() + b'\n{"text": "to"}\n'
        part = whole(write(tmp_path / f"a.jsonl{suffix}", pack(content)))
        for errors in ("error", "replace"):
            with pytest.raises(UserError, match=rf"a\.jsonl{suffix}: {message}"):
                texts(part, errors=errors)
        counts = ShardCounts()
        assert texts(part, counts, errors="skip") == ["en", "to"]
        assert (counts.skipped, counts.invalid, counts.empty) == (1, {reason: 1}, 0)


def test_characters_that_json_spells_but_are_none(tmp_path: Path) -> None:
    """Lone surrogates and bad bytes in JSON follow the policy; a pair of surrogates is a character."""
    content = b'{"text": "ok \\ud83d\\udc0d"}\n{"text": "a\\ud800b"}\n{"text": "\xff\\u00e6"}\n{"text": "\\udc0d"}\n'
    part = whole(write(tmp_path / "a.jsonl", content))
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 spells half a surrogate pair"):
        texts(part)
    replaced, skipped = ShardCounts(), ShardCounts()
    assert texts(part, replaced, errors="replace") == ["ok 🐍", "a\ufffdb", "\ufffdæ", "\ufffd"]
    assert texts(part, skipped, errors="skip") == ["ok 🐍"]
    assert replaced.invalid == skipped.invalid == {"lone surrogate": 2, "invalid start byte": 1}


def test_objects_that_do_not_keep_to_their_lines(tmp_path: Path) -> None:
    """An object over two lines beside two on one line, which a lenient reader takes for two lines, is an error."""
    content = b'{"text": "a"}\n{"text":\n"b"}{"text": "c"}\n{"text": "d"}\n'
    with pytest.raises(UserError, match="line 2 is not JSON"):
        texts(whole(write(tmp_path / "a.jsonl", content)))


VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)
LINES = strategies.one_of(
    strategies.builds(
        lambda text, more, ascii_: json.dumps({**more, "text": text}, ensure_ascii=ascii_),
        strategies.text(),
        strategies.dictionaries(strategies.text(), VALUES, max_size=2),
        strategies.booleans(),
    ),
    strategies.builds(json.dumps, VALUES),
    strategies.text(alphabet='{}[]":,\\ntex u0d8\r ', max_size=12),
    strategies.sampled_from(['{"text":"a"}{"text":"b"}', '{"text":', '"b"}', '{"text":"a","text":"b"}', "", " ", "{}"]),
)


@hypothesis.given(strategies.lists(LINES, min_size=1, max_size=6), strategies.sampled_from(["\n", "\r\n"]))
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_block_of_json_reads_as_its_lines_one_by_one(lines: list[str], end: str) -> None:
    """Whatever the lines hold, reading a block at once gives what json.loads gives for each line, faults included."""
    block = "".join(line.replace("\n", "") + end for line in lines).encode("utf-8", "replace")

    def found(column: Any) -> tuple[list[str], list[int], Faults]:
        faults = Faults("skip")
        with pytest.MonkeyPatch.context() as patch:
            if column:
                patch.setattr(jsonl, "_column", column)
            chunks = list(json_lines(block, 7, TextFile(Path("a")), "text", faults))
        return (
            [t for c in chunks for t in c.texts.to_pylist()],
            [p for c in chunks for p in c.positions.tolist()],
            faults,
        )

    assert found(None) == found(lambda *_: None)


def test_good_json_takes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary lines, with other keys and blank lines among them, are not read one by one."""
    monkeypatch.setattr(jsonl, "_each", None)
    block = b'{"id": [1, {"text": 2}], "text": "a\\n\\u00e6"}\r\n\n{"text": "b", "n": 1.5e3}\n'
    chunks = list(json_lines(block, 0, TextFile(Path("a")), "text", Faults("error")))
    assert [chunk.texts.to_pylist() for chunk in chunks] == [["a\næ", "b"]]
    assert chunks[0][1].tolist() == [0, 48]


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_columns_that_are_not_text(tmp_path: Path) -> None:
    """A missing column, one of numbers, nulls and bad bytes are named by file and row, or follow the policy."""
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; its columns are 'id', 'txt'; did you mean"):
        texts(whole(parquet(tmp_path / "a.parquet", id=[1], txt=["a"])))
    assert texts(whole(tmp_path / "a.parquet"), key="txt") == ["a"]
    twice = pa.table([pa.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has 2 columns named 'text', and nothing says which is meant"):
        texts(whole(tmp_path / "twice.parquet"))
    others = pa.table([pa.array([1]), pa.array(["a"]), pa.array([2])], names=["id", "text", "id"])
    pyarrow.parquet.write_table(others, tmp_path / "others.parquet")
    assert texts(whole(tmp_path / "others.parquet")) == ["a"]
    with pytest.raises(UserError, match=r"b\.parquet: column 'text' holds int64; a column of strings is needed"):
        texts(whole(parquet(tmp_path / "b.parquet", text=[1])))
    bad = pa.array([b"en", None, b"\xff"]).cast(pa.binary()).view(pa.string())
    part = whole(parquet(tmp_path / "c.parquet", text=bad))
    with pytest.raises(UserError, match=r"c\.parquet: row 1 is null"):
        texts(part)
    counts = ShardCounts()
    assert texts(part, counts, errors="skip") == ["en"]
    assert counts.invalid == {"null": 1, "invalid start byte": 1}


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    """Parquet and Arrow files that are cut short, changed or of another kind are errors with their names."""
    good = parquet(tmp_path / "good.parquet", text=[f"{i}" * 50 for i in range(2000)]).read_bytes()
    middle = len(good) // 2
    for name, content in {
        "cut": good[:-9],
        "other": b"PAR?" * 9,
        "mid": good[:middle] + bytes(400) + good[middle + 400 :],
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.parquet cannot be read as Parquet: "):
            texts(whole(write(tmp_path / f"{name}.parquet", content)))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    arrow = (tmp_path / "d/data-00000-of-00001.arrow").read_bytes()
    with pytest.raises(UserError, match=r"e\.arrow is not a complete Arrow stream"):
        texts(whole(write(tmp_path / "e.arrow", arrow[:-8])))
    with pytest.raises(UserError, match=r"f\.arrow cannot be read as Arrow: "):
        texts(whole(write(tmp_path / "f.arrow", b"\0\0\0\1" * 9 + arrow[-8:])))


@pytest.mark.parametrize("document", ["line", "blank-line"])
def test_blocks_give_what_the_plainest_reader_gives(
    tmp_path: Path, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On random mixtures of line ends, white space and bad bytes, over block borders: equal documents and counts."""
    pieces = [
        "æble",
        "x" * 30,
        "🐍",
        " ",
        "\t",
        "\n",
        "\n",
        "\r\n",
        "\r",
        "\n\n",
        "\u2028",
        "\x85",
        "\xa0",
        "\u3000",
        "\x1c",
        "\ufeff",
    ]
    bad = [b"\0", b"\xff", b"\xc3", b"\xa6", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"]
    random_ = random.Random(document)
    for size in (1, 7, 64, 1 << 21):
        monkeypatch.setattr(byte_streams, "BLOCK", size)
        for _ in range(30):
            mixture = [piece.encode() for piece in pieces] * 3 + (bad if random_.random() < 0.5 else [])
            path = write(tmp_path / "a.txt", b"".join(random_.choices(mixture, k=80)))
            cut = random_.randrange(path.stat().st_size + 1)
            for part in (FilePart(str(path), "s", 0, cut), FilePart(str(path), "s", cut, path.stat().st_size)):
                for errors in ("replace", "skip"):
                    ours, theirs = ShardCounts(), ShardCounts()
                    expected = list(prepare_reference.documents(part, document, errors, theirs))
                    assert texts(part, ours, document=document, errors=errors) == expected
                    ours.empty_files = 0
                    assert ours == theirs


def test_shard_files_have_the_plainest_reader_s_bytes(tmp_path: Path) -> None:
    """The file is the same, byte for byte, as one made of lists of strings: batches do not depend on the blocks."""
    random_ = random.Random(3)
    lines = ["kort"] * 20000 + random_.choices(["kort", "", "æ" * 5000, "\u3000"], k=4000)
    path = write(tmp_path / "a.txt", "\n".join(lines).encode())
    part = whole(path)
    write_shard([part], tmp_path / "ours.arrow", Reading(), Cleaning())
    assert (tmp_path / "ours.arrow").read_bytes() == prepare_reference.shard(part, tmp_path / "theirs.arrow")


def test_utf8_is_judged_as_python_judges_it() -> None:
    """Overlong forms, surrogates, numbers too large and cut sequences: Arrow's check refuses what Python's does."""
    starts = [bytes([a, b, c, 0x80]) for a in range(0xC0, 0x100) for b in range(0x70, 0xC8) for c in (0x41, 0x80, 0xBF)]
    for raw in [*starts, *(start[:size] for start in starts[::7] for size in (1, 2, 3))]:
        try:
            raw.decode()
            good = True
        except UnicodeDecodeError:
            good = False
        assert is_utf8(raw) is good, raw


def test_white_space_is_what_python_takes_for_it() -> None:
    """All characters that str.isspace knows are in the table; documents of them alone, and no others, are blank."""
    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    assert "".join(character for character in every if character.isspace()) == WHITE_SPACE
    found = blank(pa.array(every, pa.large_string()))
    assert [every[index] for index in np.flatnonzero(found)] == list(WHITE_SPACE)


def test_a_long_line_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line far longer than a block is one document, wherever the file is cut."""
    monkeypatch.setattr(byte_streams, "BLOCK", 1 << 10)
    path = write(tmp_path / "a.txt", b"en\n" + b"ord " * 50000 + b"\nto")
    for border in (3, 4, 100000, 200002, 200004):
        parts = [FilePart(str(path), "s", 0, border), FilePart(str(path), "s", border, path.stat().st_size)]
        assert [len(text) for part in parts for text in texts(part)] == [2, 200000, 2]


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Parts far into a huge (sparse) file give their lines and nothing else, with positions to match."""
    far = (1 << 33) + 5
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.seek(far - 1)
        file.write("\nen æ\r\nto\n\ntre".encode())
    part = FilePart(str(path), "s", far, path.stat().st_size)
    assert texts(part) == ["en æ", "to", "tre"]
    assert texts(part, document="blank-line") == ["tre"]  # the line before the part is not blank
    (chunk,) = read(part, Reading(), Faults("error"))
    assert chunk[1].tolist() == [far, far + 7, far + 10, far + 11]
    with path.open("r+b") as file:
        file.truncate(far)
        file.seek(far)
        file.write(b'{"text": "a"}\n')
    json_path = path.rename(tmp_path / "huge.jsonl")
    assert texts(FilePart(str(json_path), "s", far, far + 14)) == ["a"]


def test_only_empty_documents(tmp_path: Path) -> None:
    """A shard of white space only is a shard without documents, and all are counted."""
    path = write(tmp_path / "a.txt", " \n\u3000\n\n\r\n".encode())
    prepare([whole(path)], tmp_path / "o", Reading(), Cleaning())
    counts = json.loads((tmp_path / "o.json").read_text())
    assert (counts["documents"], counts["empty"], counts["sources"]) == (0, 4, {})
    assert len(datasets.Dataset.from_file(str(tmp_path / "o.arrow"))) == 0
