"""Files that are not what their name says, text in UTF-16, documents with NUL, byte order marks amid a text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from run_contract.errors import UserError
from snakmodel.config.recipe import Data
from snakmodel.prepare import byte_streams
from snakmodel.prepare.hf_dataset import write_datasets
from snakmodel.prepare.input_files import FilePart, plan_shards
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.recognise import ENCODINGS, mismatch
from snakmodel.prepare.shard_writer import Cleaning, ShardCounts
from tests import prepare_reference

LANGUAGES = {
    "Danish": "Første linje på dansk.\r\nAnden æøå linje 🐍\n\nTredje linje, uden slut",
    "ASCII": "one line\nand two\n",
    "Russian": "Первая строка\nи вторая строка\n",
    "Greek": "Πρώτη γραμμή\nκαι δεύτερη\n",
    "Arabic": "السطر الأول\nوالسطر الثاني\n",
    "Chinese": "第一行文字，没有空格。\n第二行文字也没有\n" * 20,
    "Japanese": "\u3000これは一行目です。\n\u3000これは二行目です。\n" * 20,
}
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cut(path: Path, *borders: int) -> list[FilePart]:
    size = path.stat().st_size
    return [FilePart(str(path), "s", start, end) for start, end in pairwise([0, *borders, size])]


def texts(parts: list[FilePart], counts: ShardCounts | None = None, **reading: str) -> list[str]:
    return [text for part in parts for text in prepare_reference.texts(part, Reading(**reading), counts=counts)]


def planned(folder: Path, shards: int, encoding: str) -> list[str]:
    plan = plan_shards(folder, None, shards, 1, encoding=encoding)
    return [text for parts in plan for text in texts(parts, encoding=encoding)]


def complaint(path: Path, **reading: str) -> str:
    with pytest.raises(UserError) as caught:
        texts(cut(path), **reading)
    return str(caught.value)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", MARKS)
def test_utf_16_is_named_with_the_setting_that_reads_it(tmp_path: Path, language: str, kind: str) -> None:
    """With and without a byte order mark; with the setting that the message names, the documents are those of UTF-8."""
    text = LANGUAGES[language]
    expected = texts(cut(write(tmp_path / "utf8.txt", text.encode())))
    for mark in (b"", MARKS[kind]):
        path = write(tmp_path / "raw/a.txt", mark + text.encode(kind))
        said = complaint(path)
        setting = "utf-16" if mark else kind
        assert f"{path} is {kind.upper()}, not text in UTF-8: set data.encoding to {setting} if all" in said
        assert "latin" not in said.lower()
        for encoding in {setting, kind}:
            for shards in (1, 2, 7, 100):
                assert planned(tmp_path / "raw", shards, encoding) == expected
    other = next(one for one in MARKS if one != kind)
    assert f"is {kind.upper()}, not text in {other.upper()}" in complaint(path, encoding=other)


def test_utf_16_in_every_kind_of_text_file(tmp_path: Path) -> None:
    """JSON lines, packed files and documents of several lines are read from UTF-16; columns are as they always are."""
    text = "første\nlinje\n\nanden 🐍\n"
    lines = "".join(json.dumps({"text": one}, ensure_ascii=False) + "\r\n" for one in ("æ", "to\nlinjer"))
    encoded = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    jsonl = write(tmp_path / "a.jsonl", lines.encode("utf-16"))
    packed = write(tmp_path / "a.txt.gz", gzip.compress(encoded))
    plain = write(tmp_path / "a.txt", encoded)
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"]}), table)
    assert texts(cut(jsonl), encoding="utf-16") == ["æ", "to\nlinjer"]
    assert texts(cut(packed), encoding="utf-16") == ["første", "linje", "anden 🐍"]
    assert texts(cut(plain), document="blank-line", encoding="utf-16") == ["første\nlinje", "anden 🐍"]
    assert texts(cut(plain), document="file", encoding="utf-16") == ["første\nlinje\n\nanden 🐍"]
    assert texts(cut(table), encoding="utf-16") == ["a", "b"]
    assert f"{packed} holds what is UTF-16-LE, not text in UTF-8" in complaint(packed)
    assert f"{jsonl} is UTF-16-LE, not text in UTF-8" in complaint(jsonl)


def test_the_command_that_makes_datasets_reads_utf_16(tmp_path: Path) -> None:
    """One file, which is not divided among the processes, gives each document once."""
    write(tmp_path / "raw/news.txt", "".join(f"linje {number}\n" for number in range(1000)).encode("utf-16"))
    (counts,) = write_datasets(
        tmp_path / "raw", ["news"], tmp_path / "o", Reading(encoding="utf-16"), Cleaning()
    ).values()
    assert (counts.documents, counts.byte_order_marks) == (1000, 0)


def test_text_that_is_not_in_the_encoding_of_the_recipe(tmp_path: Path) -> None:
    """UTF-8 where UTF-16 is said, UTF-16 without a mark where one is needed, and half a character are named."""
    path = write(tmp_path / "a.txt", "linje på dansk\n".encode())
    assert "is UTF-8, not text in UTF-16-LE: data.encoding is utf-16-le, for all text" in complaint(
        path, encoding="utf-16-le"
    )
    write(path, "linje\n".encode("utf-16-be"))
    assert "is UTF-16-BE, not text in UTF-16: set data.encoding to utf-16-be" in complaint(path, encoding="utf-16")
    write(path, b"\xe6\xf8\xe5\x80" * 9)
    assert "is without a byte order mark, not text in UTF-16: set" in complaint(path, encoding="utf-16")
    write(path, "linje\n".encode("utf-16") + b"a")
    assert "ends in the middle of a character of utf-16 (truncated data)" in complaint(path, encoding="utf-16")
    write(path, "linje\n".encode("utf-32"))
    assert "is UTF-32, not text in UTF-8: convert it (iconv -f utf-32 -t utf-8)" in complaint(path)
    assert "is UTF-32, not text in UTF-16" in complaint(path, encoding="utf-16")


def test_half_a_surrogate_pair_in_utf_16(tmp_path: Path) -> None:
    """It is no character: the policy applies to its document."""
    content = "en\nto \ud83d her\ntre\n".encode("utf-16", "surrogatepass")
    path = write(tmp_path / "a.txt", content)
    assert "a.txt: byte 6 (line 2), once converted, is not UTF-8" in complaint(path, encoding="utf-16")
    skipped, replaced = ShardCounts(), ShardCounts()
    assert texts(cut(path), skipped, encoding="utf-16", errors="skip") == ["en", "tre"]
    assert texts(cut(path), replaced, encoding="utf-16", errors="replace")[1].strip("\ufffd").endswith(" her")
    assert (skipped.skipped, replaced.replaced) == (1, 1)


PACKERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "ends in .gz"),
    "zstd": (zstandard.ZstdCompressor().compress, "ends in .zst"),
    "bzip2": (bz2.compress, "unpack it"),
    "xz": (lzma.compress, "unpack it"),
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_packed_files_under_the_name_of_text(tmp_path: Path, kind: str, name: str) -> None:
    """They are named, with what to do; under `skip` such a file is left out and counts once, wherever it is cut."""
    pack, remedy = PACKERS[kind]
    content = pack(b"".join(b"linje %d\n" % number for number in range(9000)))
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    for errors in ("error", "replace"):
        said = complaint(path, errors=errors)
        assert f"{path} {'holds what is' if name.endswith('.gz') else 'is'} {kind}, not text in UTF-8: " in said
        assert said.endswith(remedy)
        if not name.endswith(".gz"):  # a later part says the same
            with pytest.raises(UserError, match=f"is {kind}, not text"):
                texts(cut(path, 5)[1:], errors=errors)
    counts = ShardCounts()
    assert texts(cut(path) if name.endswith(".gz") else cut(path, 2, 9), counts, errors="skip") == []
    assert (counts.skipped, counts.invalid) == (1, {kind: 1})


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_in_utf_8_is_never_taken_for_something_else(language: str) -> None:
    """However short it is, and with single NULs in it."""
    for text in (LANGUAGES[language], LANGUAGES[language][:1], LANGUAGES[language][:3]):
        assert mismatch(text.encode(), "utf-8") is None
        assert mismatch(codecs.BOM_UTF8 + text.encode(), "utf-8") is None
    long = LANGUAGES[language] * 20
    for head in (long.replace("\n", "\0\n"), "a\0b\n", "\0" * 100, long + "\0" * 100, "\0", "", "PAR1 er et ord"):
        assert mismatch(head.encode(), "utf-8") is None, head
    for encoding in ("latin1", "cp1252"):  # is not UTF-8, but the documents say so
        assert mismatch(LANGUAGES["Danish"].replace("🐍", "").encode(encoding), "utf-8") is None


def test_documents_with_nul(tmp_path: Path) -> None:
    """A damaged file's zeros, NUL spelled in JSON or held in a column: refused, replaced or left out, and counted."""
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["en", "to\0", "tre"]}), table)
    files = {
        write(tmp_path / "a.txt", b"en\nto\0\ntre\n"): r"a.txt: byte 5 (line 2) is NUL, which text does not hold",
        write(tmp_path / "b.txt.gz", gzip.compress(b"en\nto\0\ntre")): r"b.txt.gz: byte 5 (line 2) is NUL",
        write(
            tmp_path / "a.jsonl", b'{"text": "en"}\n{"text": "to\\u0000"}\n{"text": "tre"}\n'
        ): r"line 2 spells NUL (\u0000)",
        table: "a.parquet: row 1, byte 2 of it, is NUL",
    }
    for path, message in files.items():
        said = complaint(path)
        assert message in said
        assert "errors" in said
        skipped, replaced = ShardCounts(), ShardCounts()
        assert texts(cut(path), skipped, errors="skip") == ["en", "tre"]
        assert texts(cut(path), replaced, errors="replace") == ["en", "to\ufffd", "tre"]
        assert (skipped.skipped, replaced.replaced, skipped.invalid) == (1, 1, {"NUL": 1})
    hole = write(tmp_path / "hole.txt", b"en\n" + bytes(5000) + b"\xff\nto\n")
    counts = ShardCounts()
    assert texts(cut(hole), counts, errors="skip") == ["en", "to"]
    assert counts.skipped == 1


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
@pytest.mark.parametrize("block", [1, 5, 1 << 21])
def test_byte_order_marks_amid_a_text(
    tmp_path: Path, document: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files put together with `cat`: the marks go and are counted, wherever the file is cut; the first is no fault."""
    monkeypatch.setattr(byte_streams, "BLOCK", block)
    pieces = ["en\n\nto\n", "tre uden slut", "fire\n\n", "fem\n", ""]
    path = write(tmp_path / "a.txt", b"".join(codecs.BOM_UTF8 + piece.encode() for piece in pieces))
    without = write(tmp_path / "b.txt", "".join(pieces).encode())
    expected = texts(cut(without), document=document)
    for border in range(path.stat().st_size):
        counts = ShardCounts()
        assert texts(cut(path, border), counts, document=document) == expected, border
        assert counts.byte_order_marks == 4
    assert "4 byte order marks" in str(counts)


def test_byte_order_marks_amid_json_lines(tmp_path: Path) -> None:
    """Between the lines they are removed and counted; within a document they are a character that JSON spells."""
    lines = ['{"text": "a"}\n', '\ufeff{"text": "b\ufeff"}\n', "\ufeff\n", '{"text": "c"}\n']
    path = write(tmp_path / "a.jsonl", ("\ufeff" + "".join(lines)).encode())
    counts = ShardCounts()
    assert texts(cut(path), counts) == ["a", "b\ufeff", "c"]
    assert (counts.byte_order_marks, counts.skipped, counts.empty) == (2, 0, 0)


def test_encodings_are_those_of_the_command_line_and_the_recipe() -> None:
    """One list for both."""
    assert Data.model_fields["encoding"].annotation.__args__ == ENCODINGS  # type: ignore[union-attr]
    assert Data.model_fields["encoding"].default == ENCODINGS[0]
