"""Dumps of MediaWiki: which pages become documents, and what is left of the markup."""

from __future__ import annotations

import bz2
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from run_contract.errors import UserError
from snakmodel.collect.documents import documents
from snakmodel.collect.mediawiki import prose
from snakmodel.collect.sources import Source

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="da">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <base>https://da.wikipedia.org/wiki/Forside</base>
    <namespaces>
      <namespace key="-2" case="first-letter">Media</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Fil</namespace>
      <namespace key="14" case="first-letter">Kategori</namespace>
    </namespaces>
  </siteinfo>
"""
MARKUP = """{{Infoboks land|navn=Danmark|flag={{flag|Danmark}}}}
'''Danmark''' ({{lang|x}}, {{lyd|y}}) er et [[land]]
i [[Europa|det nordlige Europa]].<ref name="a">En ''kilde''</ref><ref name="b" />

[[Fil:Kort.png|thumb|200px|Et [[kort]] over landet]]
== Historie ==
* Landet &amp; folket har {{formatnum:5}} ''lange'' traditioner.&nbsp;&lt;b&gt;

{| class="wikitable"
! år !! tal
|-
| 1 || [[to]]
|}
<!-- en kommentar -->
<gallery>
Fil:y.jpg|billede
</gallery>
Se [https://dst.dk Danmarks Statistik]. __NOTOC__
[[Kategori:Lande]]
[[en:Denmark]]
"""
PROSE = """Danmark er et land
i det nordlige Europa.
Historie
Landet & folket har lange traditioner.\u00a0<b>
Se Danmarks Statistik."""


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    """A page as a dump has it."""
    to = f'<redirect title="{redirect}" />' if redirect else ""
    return f"""  <page>
    <title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{to}
    <revision><id>2</id><timestamp>2024-01-01T00:00:00Z</timestamp>
      <contributor><username>x</username><id>3</id></contributor>
      <text bytes="9" xml:space="preserve">{escape(text)}</text><sha1>z</sha1></revision>
  </page>
"""


def read(tmp_path: Path, xml: str) -> tuple[list[Any], dict[str, int]]:
    """The documents of a packed dump, and the counts of what was left out."""
    (tmp_path / "dump.xml.bz2").write_bytes(bz2.compress(xml.encode()))
    left_out: Counter[str] = Counter()
    source = Source(url="https://host.invalid/dump.xml.bz2", format="mediawiki", licence="unknown")
    return list(documents(tmp_path / "dump.xml.bz2", source, left_out)), dict(left_out)


def test_pages(tmp_path: Path) -> None:
    """An article is one document without markup; other pages are counted."""
    pages = [
        page("Danmark", MARKUP),
        page("Diskussion:Danmark", "hej", 1),
        page("DK", "#OMDIRIGERING [[Danmark]]", redirect="Danmark"),
        page("Skabelon alene", "{{Stub}}"),
        page("A & B", "Kort tekst"),
    ]
    found, left_out = read(tmp_path, HEAD + "".join(pages) + "</mediawiki>\n")
    date, base = "2024-01-01T00:00:00Z", "https://da.wikipedia.org/wiki/"
    assert found == [
        (PROSE, {"title": "Danmark", "url": f"{base}Danmark", "date": date}),
        ("Kort tekst", {"title": "A & B", "url": f"{base}A_&_B", "date": date}),
    ]
    assert left_out == {"another namespace": 1, "a redirect": 1, "empty": 1}


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("[[:Kategori:Lande]] og [[Kategori:Lande|x]] og [[de:Land|Land]]", "Kategori:Lande og og Land"),
        ("en<br>to<br />tre<hr>", "en\nto\ntre"),
        ("<div style='x'>i <small>''en'' boks</small></div><nowiki>[[x]]</nowiki>", "i en boks[[x]]"),
        ("[[Fil:a.jpg|thumb|a [[b|c]] <ref>d</ref>]]{{a|b={{c}}}}{{{d|e}}}slut", "slut"),
        ("''åben [[link og {{skabelon", "''åben [[link og {{skabelon"),
        ("1. {{dato}} (født {{år}}) &aelig;&#248;", "1. (født ) æø"),
    ],
)
def test_markup(tmp_path: Path, markup: str, text: str) -> None:
    """What each kind of markup leaves."""
    assert [found for found, _ in read(tmp_path, HEAD + page("a", markup) + "</mediawiki>")[0]] == [text]


def test_large_pages_take_time_in_proportion(tmp_path: Path) -> None:
    """Each node of the markup is visited once, even if there are thousands."""
    mwparserfromhell = pytest.importorskip("mwparserfromhell")
    row = "* [[Land|lande]]<ref>kilde {{a|b}}</ref> [[Fil:x.jpg|thumb|hej]]\n"
    visits: Counter[int] = Counter()

    def count(frame: Any, event: str, _: object) -> None:
        visits[rows] += event == "call" and frame.f_code.co_name == "_of_node"

    for rows in (20, 200):
        code = mwparserfromhell.parse(row * rows)
        sys.setprofile(count)
        try:
            prose(code, {"fil"})
        finally:
            sys.setprofile(None)
    assert 0 < visits[200] <= 10 * visits[20]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<html><body/></html>", "its first element is <html>"),
        ('<?xml version="1.0"?><rss></rss>', "its first element is <rss>"),
        (HEAD + page("a", "b"), "no element found: line"),
        ("plain text", "syntax error"),
        (HEAD + "<page></mediawiki>", "mismatched tag"),
        ('<!DOCTYPE m [<!ENTITY a "b">]>' + HEAD + "</mediawiki>", "it has a document type"),
        ("", "no element found"),
    ],
)
def test_what_is_no_dump(tmp_path: Path, xml: str, message: str) -> None:
    """XML of another kind, a dump that is cut short, and entities that could grow are refused."""
    with pytest.raises(UserError, match=rf"dump\.xml\.bz2: is not a whole dump of MediaWiki, as {message}"):
        read(tmp_path, xml)


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error gives the command that installs what is missing."""
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(UserError, match=r"Type: pip install 'snakmodel-toolkit\[collect\]'"):
        read(tmp_path, HEAD + "</mediawiki>")
