"""The file of sources: what is valid in it, and what its errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.collect.sources import Source, read_sources
from tests.conftest import PROJECT

GOOD = "url: https://host.invalid/da.txt.gz\n  format: lines\n  licence: unknown\n"


def read(tmp_path: Path, text: str) -> dict[str, Source]:
    """The sources of a file with this text."""
    path = tmp_path / "sources.yaml"
    path.write_text(text)
    return read_sources(path)


def test_the_danish_corpora() -> None:
    """The shipped file is valid, has all ten corpora, and claims no licence that nobody has checked."""
    found = read_sources(PROJECT / "recipes" / "sources" / "danish.yaml")
    assert [*found] == [
        *("bookshop", "opensubtitles", "cc100", "culturax", "dawiki", "ftspeech", "gigaword", "danewsroom", "reddit"),
        "twitter",
    ]
    assert {source.licence for source in found.values()} == {"unknown"}
    assert [name for name, source in found.items() if source.ask] == ["ftspeech", "gigaword", "danewsroom", "twitter"]


def test_the_entry_is_what_was_written(tmp_path: Path) -> None:
    """The entry of the record holds the keys of the file and no defaults; a version is text, whatever YAML reads."""
    found = read(tmp_path, f"a:\n  {GOOD}  version: 2024-01-20\n")["a"]
    assert found.entry() == {
        "url": "https://host.invalid/da.txt.gz",
        "format": "lines",
        "licence": "unknown",
        "version": "2024-01-20",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found NoneType, expected sources"),
        ("a: 3", r"a: found 3, expected keys such as url"),
        (f"a.json:\n  {GOOD}", r"found the source name 'a\.json'"),
        (f"../a:\n  {GOOD}", r"found the source name '../a'; a name begins"),
        (
            "a:\n  url: https://h.invalid/f\n  format: lines\n",
            r"a: licence: missing\. Name the licence, or write `licence",
        ),
        (f"a:\n  {GOOD}  ask: me\n", "a: found url and ask, expected exactly one of url, urls, dataset, ask"),
        ("a:\n  format: lines\n  licence: x\n", "found none of them, expected exactly one"),
        (f"a:\n  {GOOD}  licens: x\n", r"a\.licens: unknown key\. Did you mean licence\?"),
        (f"a:\n  {GOOD}  lang: da\n", "a: lang is not for the format lines, only for tweets; remove it"),
        (f"a:\n  {GOOD}  config: da\n", "config is only for a source with the key dataset, and this one has url"),
        (f"a:\n  {GOOD}  sha256: abc\n", "found 'abc', expected 64 of the characters"),
        (f"a:\n  {GOOD}  max_mb_per_second: 0\n", r"a\.max_mb_per_second: found 0\. Input should be greater than 0"),
        (f"a:\n  {GOOD}  url: x\n", "the key 'url' is there twice, in lines 2 and 5"),
        ("a:\n  url: ftp://h/f\n  format: lines\n  licence: x\n", r"a\.url: found 'ftp://h/f', expected an address"),
        ("a:\n  url: https://h/\n  format: lines\n  licence: x\n", "whose path does not end with a file's name"),
        ("a:\n  url: https://h/a/.%2e\n  format: lines\n  licence: x\n", "does not end with a file's name"),
        (
            "a:\n  urls: [https://h/1/f, https://h/2/f]\n  format: lines\n  licence: x\n",
            "several of them end with the .* f;",
        ),
        (
            f"a:\n  urls: [https://h/f, https://h/g]\n  sha256: {'0' * 64}\n  format: lines\n  licence: x\n",
            "map each file",
        ),
        ("a:\n  ask: me\n  format: lines\n  licence: x\n", "files: missing"),
        (
            "a:\n  ask: me\n  files: [../x]\n  format: lines\n  licence: x\n",
            r"a\.files: found '\.\./x', expected a name",
        ),
        (
            "a:\n  dataset: a/b\n  format: lines\n  licence: x\n",
            "format is lines; a dataset of the Hub is had as parquet",
        ),
        ("a:\n  url: https://h/f\n  format: txt\n  licence: x\n", r"a\.format: found 'txt'\. Input should be 'lines'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the source, the key, what was found and what is valid."""
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "sources.yaml") in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    """A missing file is named together with the flag."""
    with pytest.raises(UserError, match=r"none\.yaml: no such file\. Give an existing one with --sources"):
        read_sources(tmp_path / "none.yaml")
