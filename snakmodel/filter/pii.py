"""The step `pii`: personal data in documents becomes placeholders.

    batch -> one RE2 pattern per kind picks the documents that Python has to look at
          -> each finder yields the spans it is sure of -> overlaps are resolved -> placeholders, counts

E-mail and IP addresses and IBANs are found by `pii_addresses`, phone numbers by `pii_phones` and national numbers by
`pii_national`. A document without a find stays as it is, byte for byte. What was found is counted and then forgotten:
no value is printed, logged, kept or put into an error.

A placeholder is a name in capitals between angle brackets, such as `<EMAIL>`. It has no digit and no `@`, so that a
second pass changes nothing. A tokenizer recognises a special token by its whole text, and none that the toolkit trains
with (`<s>`, `</s>`, `<unk>`, `<pad>`, `<0x0A>`, `<|…|>`, `[INST]`, CodeLlama's `<PRE>`, `<SUF>`, `<MID>`, `<EOT>`) is
one of these names. `[EMAIL]` would look like the control tokens of Mistral and BERT, and an invented address
(`email@example.com`) would teach the model an address and could not be told from text.
"""

from __future__ import annotations

import argparse
import functools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from run_contract.errors import UserError
from snakmodel.filter.pii_addresses import Emails, Ibans, IpAddresses
from snakmodel.filter.pii_national import NationalNumbers
from snakmodel.filter.pii_phones import PhoneNumbers
from snakmodel.filter.pii_support import FOREIGN_DIGITS, ascii_digits, near
from snakmodel.shards.arrow_stream import source_names
from snakmodel.shards.counts import MANY_SOURCES, MOST_SOURCES

HELP = "Replaces personal data by placeholders."
PLACEHOLDERS = {
    "email": "<EMAIL>",
    "ip": "<IP>",
    "iban": "<IBAN>",
    "national": "<NATIONAL_ID>",
    "phone": "<PHONE>",
}
"""The kinds and their placeholders. Of two overlapping finds of one length, that of the earlier kind counts."""

DOCUMENTS_AT_ONCE = 1024
"""Documents that are held as Python strings at a time."""


class Finder(Protocol):
    """Finds personal data of one kind in texts."""

    prefilter: str
    """An RE2 pattern that matches every text in which something may be found, if its digits are all ASCII."""

    def find(self, text: str) -> Iterable[tuple[int, int, str]]:
        """Start, end and the name under which it is counted, of each find in a text whose digits are all ASCII."""
        ...


class Find(NamedTuple):
    """A span of a text that is to be replaced; finds are sorted by precedence."""

    negative_length: int
    order: int
    """The position of the kind in PLACEHOLDERS."""
    start: int
    end: int
    name: str
    """The name under which it is counted: the kind, or the module of python-stdnum."""


class Pii:
    """A step that replaces personal data; see the module's docstring."""

    name = "pii"

    def __init__(self, finders: dict[str, Finder]) -> None:
        self.finders = [(order, finders[kind]) for order, kind in enumerate(PLACEHOLDERS) if kind in finders]
        self.placeholders = list(PLACEHOLDERS.values())
        self.sources: set[str] = set()

    def schema(self, schema: Any) -> Any:
        """The same columns as before."""
        return schema

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The batch with placeholders, and the counts `changed`, `found` (name -> number) and `found_by_source`."""
        index = batch.schema.get_field_index("text")
        texts = batch.column(index)
        foreign = pc.match_substring_regex(texts, f"[{FOREIGN_DIGITS}]")
        masks = [pc.or_(pc.match_substring_regex(texts, finder.prefilter), foreign) for _, finder in self.finders]
        rows = pc.indices_nonzero(functools.reduce(pc.or_, masks))
        changed: dict[int, str] = {}
        found: dict[int, Counter[str]] = {}
        for start in range(0, len(rows), DOCUMENTS_AT_ONCE):
            part = rows.slice(start, DOCUMENTS_AT_ONCE)
            columns = (column.take(part).to_pylist() for column in (texts, foreign, *masks))
            for row, text, odd, *wanted in zip(part.to_pylist(), *columns, strict=True):
                finds = self._finds(ascii_digits(text) if odd else text, wanted)
                if finds:
                    changed[row] = replaced(text, finds, self.placeholders)
                    found[row] = Counter(find.name for find in finds)
        if changed:
            batch = batch.set_column(index, batch.schema.field(index), _with_rows(texts, changed))
        return batch, self._counts(batch, found)

    def _finds(self, text: str, which: Sequence[bool]) -> list[Find]:
        """The finds of the kinds whose prefilter matched the text, without overlaps, from left to right."""
        finds = [
            Find(start - end, order, start, end, name)
            for (order, finder), wanted in zip(self.finders, which, strict=True)
            if wanted
            for start, end, name in finder.find(text)
        ]
        return without_overlaps(finds)

    def _counts(self, batch: Any, found: dict[int, Counter[str]]) -> dict[str, Any]:
        """The counts of a batch, of the finds of each of its rows."""
        total: Counter[str] = Counter()
        by_source: dict[str, Counter[str]] = {}
        sources = source_names(batch) if found else None
        for row, names in sorted(found.items()):
            total += names
            if sources is not None:
                source = self._bounded(sources[0][int(sources[1][row])])
                by_source.setdefault(source, Counter()).update(names)
        return {
            "changed": len(found),
            "found": dict(sorted(total.items())),
            "found_by_source": {source: dict(sorted(names.items())) for source, names in by_source.items()},
        }

    def _bounded(self, source: str) -> str:
        """The source, or MANY_SOURCES for every source after the first MOST_SOURCES with finds.

        Documents arrive in order, so the names do not depend on the size of the batches.
        """
        if source not in self.sources and len(self.sources) >= MOST_SOURCES:
            return MANY_SOURCES
        self.sources.add(source)
        return source


def _with_rows(texts: Any, changed: dict[int, str]) -> Any:
    """The strings, some of them exchanged; the others are copied as bytes."""
    rows = sorted(changed)
    mask = np.zeros(len(texts), dtype=np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(texts, pa.array(mask), pa.array([changed[row] for row in rows], texts.type))


def without_overlaps(finds: Iterable[Find]) -> list[Find]:
    """The finds that remain, from left to right: the longest first, then by the order of kinds, then the leftmost."""
    starts: list[int] = []
    kept: list[Find] = []
    for find in sorted(finds):
        place = bisect_left(starts, find.start)
        after = place == len(kept) or find.end <= kept[place].start
        if after and (place == 0 or kept[place - 1].end <= find.start):
            starts.insert(place, find.start)
            kept.insert(place, find)
    return kept


def replaced(text: str, finds: Iterable[Find], placeholders: Sequence[str]) -> str:
    """The text with each find, from left to right, exchanged for the placeholder of its kind."""
    parts: list[str] = []
    last = 0
    for find in finds:
        parts += [text[last : find.start], placeholders[find.order]]
        last = find.end
    return "".join([*parts, text[last:]])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step to a parser."""
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", help=f"what to replace, of: {', '.join(PLACEHOLDERS)} (default: all)"
    )
    parser.add_argument(
        "--region",
        nargs="+",
        default=[],
        metavar="REGION",
        help="regions whose phone numbers are found without a country code, such as DK; numbers like +45… always are",
    )
    parser.add_argument(
        "--national",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="national numbers, by modules of python-stdnum, such as dk.cpr or se.personnummer",
    )


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`."""
    make_step(args)
    return schema


def make_step(args: argparse.Namespace) -> Pii:
    """The step of parsed flags. Raises UserError on a wrong name, or if a package is missing."""
    kinds = args.kinds or [kind for kind in PLACEHOLDERS if kind != "national" or args.national]
    for kind in kinds:
        if kind not in PLACEHOLDERS:
            raise UserError(
                f"--kinds {kind!r} is unknown; the kinds are {', '.join(PLACEHOLDERS)}{near(kind, PLACEHOLDERS)}"
            )
    if "national" in kinds and not args.national:
        raise UserError("--kinds national needs --national with modules of python-stdnum, such as --national dk.cpr")
    if args.national and "national" not in kinds:
        raise UserError("--national is given, but --kinds does not name national; add it, or leave --national out")
    if args.region and "phone" not in kinds:
        raise UserError("--region is given, but --kinds does not name phone; add it, or leave --region out")
    makers: dict[str, Callable[[], Finder]] = {
        "email": Emails,
        "ip": IpAddresses,
        "iban": Ibans,
        "national": lambda: NationalNumbers(args.national),
        "phone": lambda: PhoneNumbers(args.region),
    }
    return Pii({kind: makers[kind]() for kind in kinds})
