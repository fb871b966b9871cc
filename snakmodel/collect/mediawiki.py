"""Reads the articles of a dump of MediaWiki, as text without markup.

The XML is read as a stream by Expat, so that only one page is in memory. The markup is parsed by mwparserfromhell.
What is no prose is dropped: templates, tables, references, files, categories, galleries, and links to other wikis.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any
from xml.parsers import expat

from run_contract.errors import UserError

INSTALL = "pip install 'snakmodel-toolkit[collect]'"
_READ = 1 << 16
_DROPPED_TAGS = ("ref", "references", "table", "gallery", "math", "timeline", "syntaxhighlight", "source", "score")
_MEDIA = (-2, 6, 14)
"""The namespaces of media, files and categories, whose links are no prose."""
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;:]*\)")
"""What a template leaves that was all that is in brackets."""
_SPACES = re.compile(r"  +")
_MAGIC_WORD = re.compile(r"__[^\W\d_]+__")
_INTERWIKI = re.compile(r"[a-z]{2,3}(-[a-z]+)*:")
_MOST_CHARACTERS = 1 << 27
"""The number of characters of an element from which it is no page; MediaWiki allows 2 MiB."""


@dataclass
class _Page:
    """What is read of a page."""

    title: str = ""
    namespace: str = ""
    redirect: bool = False
    text: str = ""
    date: str = ""


@dataclass
class _Dump:
    """The handlers of Expat: they gather the pages that are complete, and the names of namespaces."""

    where: str
    pages: list[_Page] = field(default_factory=list)
    media: set[str] = field(default_factory=lambda: {"file", "image", "category", "media"})
    """The names, in lower case, of the namespaces whose links are dropped."""
    base: str = ""
    _path: list[str] = field(default_factory=list)
    _page: _Page = field(default_factory=_Page)
    _text: list[str] = field(default_factory=list)
    _size: int = 0
    _namespace: str = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        if not self._path and tag != "mediawiki":
            raise _no_dump(self.where, f"its first element is <{tag}>")
        self._path.append(tag)
        self._text, self._size = [], 0
        if tag == "page":
            self._page = _Page()
        elif tag == "redirect":
            self._page.redirect = True
        elif tag == "namespace":
            self._namespace = attributes.get("key", "")

    def data(self, text: str) -> None:
        """Some characters of an element."""
        self._text.append(text)
        self._size += len(text)
        if self._size > _MOST_CHARACTERS:
            raise _no_dump(self.where, f"a <{self._path[-1]}> in it has more than {_MOST_CHARACTERS:,} characters")

    def end(self, tag: str) -> None:
        """An element ends."""
        text, self._text = "".join(self._text), []
        path = self._path[1:]
        self._path.pop()
        match path:
            case ["siteinfo", "base"]:
                self.base = text
            case ["siteinfo", "namespaces", "namespace"] if self._namespace in map(str, _MEDIA):
                self.media.add(text.lower())
            case ["page", "title"]:
                self._page.title = text
            case ["page", "ns"]:
                self._page.namespace = text
            case ["page", "revision", "timestamp"]:
                self._page.date = text
            case ["page", "revision", "text"]:
                self._page.text = text
            case ["page"]:
                self.pages.append(self._page)

    def doctype(self, *_: Any) -> None:
        """A document type, which may define entities that grow without limits; MediaWiki writes none."""
        raise _no_dump(self.where, "it has a document type")


def pages(content: BufferedReader, where: str, left_out: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the text of each article, and its title, address and date.

    Redirects, pages of other namespaces and pages without text are counted in `left_out`. Raises UserError if the
    content is not a whole dump, or mwparserfromhell is missing.
    """
    parser = _markup_parser()
    xml = expat.ParserCreate()
    dump = _Dump(where)
    xml.buffer_text = True
    xml.StartElementHandler, xml.EndElementHandler = dump.start, dump.end
    xml.CharacterDataHandler, xml.StartDoctypeDeclHandler = dump.data, dump.doctype
    more = True
    while more:
        block = content.read(_READ)
        more = bool(block)
        try:
            xml.Parse(block, not more)
        except expat.ExpatError as error:
            raise _no_dump(where, f"{error}, counted from 1 and 0") from error
        for page in dump.pages:
            reason = "another namespace" if page.namespace != "0" else "a redirect" if page.redirect else None
            if reason:
                left_out[reason] += 1
                continue
            try:
                text = prose(parser.parse(page.text), dump.media)
            except (parser.parser.ParserError, RecursionError):
                left_out["markup that cannot be parsed"] += 1
                continue
            yield text, {"title": page.title, "url": _address(dump.base, page.title), "date": page.date}
        dump.pages.clear()


def prose(code: Any, media: set[str]) -> str:
    """The text of parsed markup (`mwparserfromhell.wikicode.Wikicode`), without lines that are empty.

    `media` are the names of the namespaces whose links are dropped.
    """
    text = _MAGIC_WORD.sub("", _text(code, media))
    text = _SPACES.sub(" ", _EMPTY_BRACKETS.sub("", text))
    return "\n".join(stripped for line in text.split("\n") if (stripped := line.strip()))


def _text(code: Any, media: set[str]) -> str:
    """The text of parsed markup with everything in it that is kept.

    The library's own `strip_code` keeps captions and references, and removing them first takes time that grows with the
    square of their number.
    """
    return "".join(_of_node(node, media) for node in code.nodes) if code is not None else ""


def _of_node(node: Any, media: set[str]) -> str:
    match type(node).__name__:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Heading" | "ExternalLink":
            return _text(node.title, media)
        case "Wikilink":
            return _of_link(node, media)
        case "Tag":
            name = str(node.tag).strip().lower()
            return "\n" if name == "br" else "" if name in _DROPPED_TAGS else _text(node.contents, media)
    return ""  # templates, their arguments, comments


def _of_link(link: Any, media: set[str]) -> str:
    target = str(link.title).strip()
    prefix = target.split(":", 1)[0].strip().lower() if ":" in target else ""
    if prefix in media or (_INTERWIKI.match(target) and link.text is None):
        return ""
    return _text(link.title if link.text is None else link.text, media).removeprefix(":")


def _address(base: str, title: str) -> str | None:
    """The address of an article, next to that of the wiki's main page."""
    return f"{base.rsplit('/', 1)[0]}/{title.replace(' ', '_')}" if "/" in base else None


def _markup_parser() -> Any:
    try:
        return importlib.import_module("mwparserfromhell")
    except ImportError as error:
        raise UserError(
            f"the format mediawiki needs the package mwparserfromhell, which is not installed. Type: {INSTALL}"
        ) from error


def _no_dump(where: str, reason: str) -> UserError:
    return UserError(
        f"{where}: is not a whole dump of MediaWiki, as {reason}. Give the address of a file such as "
        "…-pages-articles.xml.bz2, or correct `format` of the source; if the file is damaged, delete it"
    )
