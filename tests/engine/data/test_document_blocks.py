"""Reading documents: blocks of every kind of file, and the place of every mistake."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from megatron_llm.data import document_blocks
from megatron_llm.data.document_blocks import Block, Columns, columns, find_inputs, read_blocks, read_lines
from megatron_llm.data.json_lines import parse_lines
from run_contract.errors import InputsMissing, UserError

TEXTS = [f"Nummer {i}\u2028 æ\u0085 " * (i % 9) for i in range(500)]


def read(path: Path, key: str = "text") -> list[Columns]:
    """All blocks of a file."""
    return [columns(block, [key]) for block in read_blocks(path, [key])]


def texts(found: list[Columns]) -> list[str]:
    """The documents of all blocks."""
    return [text for one in found for text in one.texts["text"].to_pylist()]


def write_arrow(path: Path, table: Any, rows: int) -> Path:
    """An Arrow stream in batches of some rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_blocks, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("end", ["\n", ""])
def test_json_lines_come_back_in_order_whatever_the_blocks(tmp_path: Path, end: str) -> None:
    """Lines longer and shorter than a block, a last one without its line end, and a compressed file."""
    lines = "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in [*TEXTS, "x" * 5000]) + end
    (tmp_path / "x.jsonl").write_text(lines, "utf-8")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("x.jsonl", "x.jsonl.gz"):
        found = read(tmp_path / name)
        assert len(found) > 20
        assert texts(found) == [*TEXTS, "x" * 5000]
        assert {source for one in found for source in one.sources.to_pylist()} == {"all"}


@pytest.mark.parametrize("rows", [1, 7, 10_000])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_arrow_batches_are_put_together_and_cut(tmp_path: Path, rows: int, kind: Any) -> None:
    """Batches much smaller and larger than a block give the same documents and sources, in blocks of about its size."""
    sources = ["a", "b", "c"] * 200
    table = pa.table({"text": pa.array(TEXTS, kind), "source": pa.array(sources[:500], pa.string())})
    found = read(write_arrow(tmp_path / "x.arrow", table, rows))
    assert texts(found) == TEXTS
    assert [source for one in found for source in one.sources.to_pylist()] == sources[:500]
    assert 10 < len(found) < 100


def test_one_document_longer_than_a_block(tmp_path: Path) -> None:
    """It is a block of its own size, not cut."""
    table = pa.table({"text": ["a", "x" * 5000, "b", "", "c" * 999]})
    assert texts(read(write_arrow(tmp_path / "x.arrow", table, 10))) == ["a", "x" * 5000, "b", "", "c" * 999]


def test_no_documents(tmp_path: Path) -> None:
    """An empty file, one of blank lines and a stream without rows have no documents."""
    for content in (b"", b"\n", b"\r\n \n" * 1000):
        (tmp_path / "x.jsonl").write_bytes(content)
        assert read(tmp_path / "x.jsonl") == []
    assert texts(read(write_arrow(tmp_path / "x.arrow", pa.table({"text": pa.array([], pa.string())}), 10))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "x, line 12 is not valid JSON"),
        (b'{"text": "\xff"}\n', "x, line 11 is not valid JSON"),
        (b'{"text": "a\tb"}\n', "x, line 11 is not valid JSON"),
        (b'{"text": "a"}{"text": "b"}\n', "x, line 11 is not valid JSON"),
        (b'{"text":\n"a"}\n', "x, line 11 is not valid JSON"),
        (b"{'text': 'a'}\n", "x, line 11 is not valid JSON"),
        (b'["a"]\n', "x, line 11 is not a JSON object"),
        (b'{"text": "a"}\n{"body": "a", "id": 1}\n', r"x, line 12: it has no 'text', only \['body', 'id'\]"),
        (b'{"text": null}\n', "x, line 11: 'text' is null"),
        (b'{"text": 5}\n', "x, line 11: 'text' is a number"),
        (b'{"text": ["a"]}\n', "x, line 11: 'text' is a list"),
        (b'{"text": "ab\\ud800"}\n', "x, line 11: character 3 of 'text' is half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(content: bytes, message: str) -> None:
    """By its file and number, whatever the fast parser thinks of it."""
    with pytest.raises(UserError, match=message):
        columns(Block("x, line", 11, content), ["text"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a", "text": "b"}\n', ["b"]),
        (b'{"n": 1e999, "text": "a"}\n', ["a"]),
        (b'\n{"text": "a"}\n\n \r\n', ["a"]),
        (b' {"text": "a"}\r\n{"text": "b"}', ["a", "b"]),
        (b'{"te\\u0078t": "\\u0000\\ud83d\\ude00"}\n', ["\x00😀"]),
        (b'{"text": "a", "x": 1}\n{"x": [{"text": "no"}], "text": "b"}\n', ["a", "b"]),
    ],
)
def test_what_only_one_parser_takes_is_read_right(content: bytes, expected: list[str]) -> None:
    """Keys twice, numbers too large, blank lines, white space before one, escapes, other values of changing kinds."""
    assert columns(Block("x, line", 1, content), ["text"]).texts["text"].to_pylist() == expected


def test_plain_lines_take_the_fast_parser() -> None:
    """Arrow parses what is one object a line, and leaves everything else to Python."""
    found = parse_lines(b'{"text": "a", "title": "b"}\n{"title": "c", "text": ""}\n', ["text", "title"])
    assert found is not None
    assert {key: values.to_pylist() for key, values in found.items()} == {"text": ["a", ""], "title": ["b", "c"]}
    assert parse_lines(b'{"text": null}\n', ["text"]) is None


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    """A missing column, one of numbers, a null and bytes that are no UTF-8."""
    with pytest.raises(UserError, match=r"x\.arrow has no column 'text'; its columns: body"):
        read(write_arrow(tmp_path / "x.arrow", pa.table({"body": ["a"]}), 10))
    twice = pa.table([pa.array(["a"])] * 2, names=["text", "text"])
    with pytest.raises(UserError, match=r"x\.arrow has 2 columns named 'text', and nothing says which is meant"):
        read(write_arrow(tmp_path / "x.arrow", twice, 10))
    with pytest.raises(UserError, match="column 'text' holds int64; name a column of strings"):
        read(write_arrow(tmp_path / "x.arrow", pa.table({"text": [1]}), 10))
    with pytest.raises(UserError, match=r"x\.arrow, row 3: 'text' is None"):
        read(write_arrow(tmp_path / "x.arrow", pa.table({"text": ["a", "a", None]}), 1))
    bad = pa.LargeStringArray.from_buffers(1, pa.py_buffer(bytes(8) + b"\x01" + bytes(7)), pa.py_buffer(b"\xff"))
    with pytest.raises(UserError, match=r"x\.arrow, rows from 1 on, 'text': .*UTF8"):
        read(write_arrow(tmp_path / "x.arrow", pa.table({"text": bad}), 10))


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    """One cut off in the middle, and one that is not compressed at all."""
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    for content in (whole[: len(whole) // 2], b'{"text": "a"}\n'):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read after line"):
            read(tmp_path / "x.jsonl.gz")


def test_packed_files_are_read_whole(tmp_path: Path) -> None:
    """Members of a .gz with padding, frames of a .zst, and the largest window there is (zstd --long=31)."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    halves = "".join(lines[:200]).encode(), "".join(lines[200:]).encode()
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    wide = b"\x28\xb5\x2f\xfd\0\xa8" + (len(halves[0]) << 3 | 1).to_bytes(3, "little") + halves[0]  # one raw block
    contents = {
        "members.jsonl.gz": gzip.compress(halves[0]) + bytes(700) + gzip.compress(halves[1]) + bytes(9),
        "frames.jsonl.zst": pack(halves[0]) + pack(b"") + pack(halves[1]),
        "wide.jsonl.zst": wide + pack(halves[1]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert texts(read(tmp_path / name)) == TEXTS, name
    for name, content in contents.items():
        cut = content.rstrip(b"\0")[:-1]
        for wrong in (cut, content + b"more", b"", bytes(100)):
            (tmp_path / name).write_bytes(wrong)
            with pytest.raises(UserError, match=rf"{name} cannot be read after line \d+: "):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "gzip data; rename it so that its name ends in .gz"),
        (zstandard.ZstdCompressor().compress(b'{"text": "a"}'), "zstd data; rename it"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16; convert it"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    """By what the file begins with."""
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jsonl is {message}"):
        read(tmp_path / "x.jsonl")


def test_one_line_over_many_pieces_is_read_in_linear_time(tmp_path: Path) -> None:
    """It takes about as much of the processor as the same pieces of many lines: they are not copied again and again.

    Copying what there is with each of the 16,000 pieces would take hundreds of times as much.
    """
    seconds = {}
    for name, piece in (("many", b"x" * 999 + b"\n"), ("one", b"x" * 1000)):
        (tmp_path / name).write_bytes(piece * 16_000)
        started = time.process_time()
        size = sum(len(block.content) for block in read_lines(tmp_path / name))
        seconds[name] = time.process_time() - started
        assert size == 16_000_000
    assert seconds["one"] < 10 * seconds["many"]


def test_inputs_are_found_by_name(tmp_path: Path) -> None:
    """A glob in the order of names; a missing file is InputsMissing, a folder an error."""
    for name in ("b.jsonl", "a.arrow", "c.txt"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in find_inputs(f"{tmp_path}/[ab].*")] == ["a.arrow", "b.jsonl"]
    with pytest.raises(InputsMissing, match="no such file, and no file matches it"):
        find_inputs(f"{tmp_path}/d*")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"/c: not a file; give JSON lines or an Arrow stream, or a pattern"):
        find_inputs(f"{tmp_path}/c*")


@pytest.mark.parametrize("name", ["danish_pretraining_data", "data.txt", "data.ndjson", "part-00000.of-4"])
def test_json_lines_are_read_whatever_their_name_is(tmp_path: Path, name: str) -> None:
    """The name of a file of JSON lines does not matter; what is not JSON is named with its line."""
    (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (path,) = find_inputs(str(tmp_path / name))
    assert texts(read(path)) == TEXTS
    path.write_text("plain text\n")
    with pytest.raises(UserError, match=rf"{name}, line 1 is not valid JSON.*; it starts b'plain text'"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.arrow"])
def test_files_that_can_never_be_empty(tmp_path: Path, name: str) -> None:
    """0 bytes of a format with a header are a lost file, not an empty one; an empty .jsonl has no documents."""
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: 0 bytes, which is no valid {Path(name).suffix} file"):
        find_inputs(f"{tmp_path}/*")
    (tmp_path / name).unlink()
    (tmp_path / "a.jsonl").touch()
    assert find_inputs(f"{tmp_path}/*") == [tmp_path / "a.jsonl"]
