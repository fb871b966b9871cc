"""The documents of each format."""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.collect import documents as module
from snakmodel.collect.documents import documents
from snakmodel.collect.sources import Source


def read(path: Path, form: str, **keys: Any) -> tuple[list[Any], dict[str, int]]:
    """The documents of a file, and the counts of what was left out."""
    left_out: Counter[str] = Counter()
    source = Source(url="https://host.invalid/f", format=form, licence="unknown", **keys)
    return list(documents(path, source, left_out)), dict(left_out)


def json_lines(*records: Any) -> bytes:
    """Records as lines; a string is taken as it is."""
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records).encode()


def test_lines(tmp_path: Path) -> None:
    """A line is a document, without its end and the file's byte order mark; what is no text is counted."""
    content = b"\xef\xbb\xbfHej\r\n\n  ab \n\xff\xfe\nen\0to\n\xc3\xa6\xc3\xb8\xe2\x80\xa8\xc3\xa5\nsidste"
    (tmp_path / "f").write_bytes(gzip.compress(content))
    found, left_out = read(tmp_path / "f", "lines", min_characters=3)
    assert [text for text, _ in found] == ["Hej", "æø\u2028å", "sidste"]
    assert left_out == {"empty": 1, "too short": 1, "not UTF-8": 1, "holds a NUL character": 1}


def test_jsonl(tmp_path: Path) -> None:
    """The published filter of DaNewsroom: at least three characters, and no text that stands for one that is gone."""
    rows = [
        {"text": "En nyhed", "title": "t", "url": "u", "other": 1},
        {"text": "[deleted]"},
        {"text": " removed\n"},
        {"text": "[removed]"},
        {"text": "ab"},
        {"text": None},
        {"body": "x"},
        [1],
        '{"text": "cut',
        "",
        '{"text": "\\ud800 half"}',
        {"text": "to\nlinjer"},
    ]
    (tmp_path / "f.jsonl").write_bytes(json_lines(*rows))
    gone = ["[deleted]", "[removed]", "removed"]
    found, left_out = read(tmp_path / "f.jsonl", "jsonl", min_characters=3, leave_out=gone, columns=["title", "url"])
    assert found == [("En nyhed", {"title": "t", "url": "u"}), ("to\nlinjer", {"title": None, "url": None})]
    assert left_out == {
        "stands for a text that is gone": 3,
        "too short": 1,
        "no text under the key text": 2,
        "not a JSON object": 1,
        "not JSON": 1,
        "not valid Unicode": 1,
    }


def test_convokit(tmp_path: Path) -> None:
    """The utterances of a zipped corpus, beside which there are other files."""
    rows = json_lines(
        {"id": "a1", "speaker": "s", "timestamp": 1356998400, "text": "Hej alle", "meta": {}},
        {"id": "a2", "timestamp": "1356998460", "text": "Hej"},
        {"id": "a3", "timestamp": None, "text": "Davs"},
    )
    with zipfile.ZipFile(tmp_path / "f.corpus.zip", "w") as archive:
        archive.writestr("Denmark/speakers.json", "{}")
        archive.writestr("Denmark/utterances.jsonl", rows)
    assert read(tmp_path / "f.corpus.zip", "convokit")[0] == [
        ("Hej alle", {"id": "a1", "date": "2013-01-01T00:00:00+00:00"}),
        ("Hej", {"id": "a2", "date": "2013-01-01T00:01:00+00:00"}),
        ("Davs", {"id": "a3", "date": None}),
    ]


def test_tweets(tmp_path: Path) -> None:
    """Tweets of a language, by their own or, where that is missing, their user's; a tweet is one line."""
    when = "Mon Jan 01 00:00:00 +0000 2018"
    rows = json_lines(
        {"delete": {"status": {"id": 1}}},
        {"text": "to\nlinjer\r\nher", "lang": "da", "id_str": "7", "created_at": when, "user": {"lang": "en"}},
        {"text": "ældre", "id_str": "8", "user": {"lang": "da", "screen_name": "x"}},
        {"text": "english", "lang": "en", "user": {"lang": "da"}},
        {"text": "no user", "user": None},
        {"limit": {"track": 5}},
    )
    (tmp_path / "00.json.bz2").write_bytes(bz2.compress(rows))
    found, left_out = read(tmp_path / "00.json.bz2", "tweets", lang="da")
    assert found == [
        ("to linjer her", {"id": "7", "date": when, "lang": "da"}),
        ("ældre", {"id": "8", "date": None, "lang": "da"}),
    ]
    assert left_out == {"a deletion": 1, "another language": 2, "no text under the key text": 1}
    assert len(read(tmp_path / "00.json.bz2", "tweets")[0]) == 4


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no text must not fill the memory as a single line."""
    monkeypatch.setattr(module, "_MOST_LINE", 1000)
    (tmp_path / "f").write_bytes(b"a\n" + b"x" * 1000)
    with pytest.raises(UserError, match=r"f: line 2 is longer than 1,000 bytes, .* correct `format`"):
        read(tmp_path / "f", "lines")
