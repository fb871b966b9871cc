"""The documents that a content holds, in each format: a text, and what is known about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from io import BufferedReader
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.collect.mediawiki import pages
from snakmodel.collect.sources import Source
from snakmodel.collect.unpack import contents, understood

Document = tuple[str, dict[str, Any]]
"""A text, and the values of the columns beside it."""
_MOST_LINE = 1 << 28
"""The number of bytes from which a line is taken for what is not a text at all."""
_CONVOKIT_MEMBERS = ["utterances.jsonl"]


def lines(content: BufferedReader, where: str, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """A document per line."""
    for raw in _raw_lines(content, where):
        text = _decoded(raw, left_out)
        if text is not None:
            yield text, {}


def jsonl(content: BufferedReader, where: str, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """A document per JSON object; the source says which key holds the text, and which others are kept."""
    for record in _objects(content, where, left_out):
        if isinstance(text := record.get(source.key), str):
            yield text, {key: record.get(key) for key in source.columns}
        else:
            left_out[f"no text under the key {source.key}"] += 1


def convokit(content: BufferedReader, where: str, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """A document per utterance of a corpus of ConvoKit, with its identifier and its date."""
    for record in _objects(content, where, left_out):
        if isinstance(text := record.get(source.key), str):
            yield text, {"id": record.get("id"), "date": _date(record.get("timestamp"))}
        else:
            left_out[f"no text under the key {source.key}"] += 1


def tweets(content: BufferedReader, where: str, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """A document per tweet, on one line, with its identifier, its date and its language."""
    for record in _objects(content, where, left_out):
        user = record.get("user")
        lang = record.get("lang") or (user.get("lang") if isinstance(user, dict) else None)
        if "delete" in record:
            left_out["a deletion"] += 1
        elif not isinstance(text := record.get("text"), str):
            left_out["no text under the key text"] += 1
        elif source.lang and lang != source.lang:
            left_out["another language"] += 1
        else:
            one_line = text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
            yield one_line, {"id": record.get("id_str"), "date": record.get("created_at"), "lang": lang}


def mediawiki(content: BufferedReader, where: str, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """A document per article of a dump of MediaWiki."""
    return pages(content, where, left_out)


Reader = Callable[[BufferedReader, str, Source, Counter[str]], Iterator[Document]]
READERS: dict[str, Reader] = {
    "lines": lines,
    "jsonl": jsonl,
    "convokit": convokit,
    "mediawiki": mediawiki,
    "tweets": tweets,
}
"""Maps a format to its reader: of a content, its name for messages, the source, and the counts of what is left out."""


def documents(path: Path, source: Source, left_out: Counter[str]) -> Iterator[Document]:
    """The documents of a file that the source keeps; those that are left out are counted by reason.

    Raises UserError if the file is damaged, or is not what the source says it is.
    """
    if source.format == "convokit" and not source.members:
        source = source.model_copy(update={"members": _CONVOKIT_MEMBERS})
    with understood(path):
        for name, content in contents(path, source):
            where = str(path) if name == path.name else f"{path}: {name}"
            yield from _kept(READERS[source.format](content, where, source, left_out), source, left_out)


def _kept(found: Iterator[Document], source: Source, left_out: Counter[str]) -> Iterator[Document]:
    gone = frozenset(source.leave_out)
    for text, columns in found:
        stripped = text.strip()
        if not stripped:
            left_out["empty"] += 1
        elif stripped in gone:
            left_out["stands for a text that is gone"] += 1
        elif len(stripped) < source.min_characters:
            left_out["too short"] += 1
        elif "\0" in text:
            left_out["holds a NUL character"] += 1
        elif not text.isascii() and not _is_unicode(text):
            left_out["not valid Unicode"] += 1
        else:
            yield text, columns


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raw_lines(content: BufferedReader, where: str) -> Iterator[bytes]:
    """Yield the lines of a content without their ends. Raises UserError if one is longer than any text."""
    number = 0
    while raw := content.readline(_MOST_LINE):
        number += 1
        if len(raw) == _MOST_LINE:
            raise UserError(
                f"{where}: line {number:,} is longer than {_MOST_LINE:,} bytes, so this is hardly a file of lines; "
                "correct `format` or `members` of the source"
            )
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        yield raw.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(raw: bytes, left_out: Counter[str]) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        left_out["not UTF-8"] += 1
        return None


def _objects(content: BufferedReader, where: str, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a content, one per line; lines that hold none are counted."""
    for raw in _raw_lines(content, where):
        text = _decoded(raw, left_out)
        if text is None or not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            left_out["not JSON"] += 1
            continue
        if isinstance(record, dict):
            yield record
        else:
            left_out["not a JSON object"] += 1


def _date(seconds: Any) -> str | None:
    """A time stamp, in seconds since 1970 as a number or digits, in ISO format; None if it is none."""
    try:
        return datetime.fromtimestamp(int(seconds), timezone.utc).isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
