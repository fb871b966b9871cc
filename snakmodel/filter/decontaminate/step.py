"""The step `decontaminate`: documents that share a run of words with evaluation items are marked, removed or cut.

evaluation files -> `items.read` -> `grams.Grams`, a table of all their n-grams
batch -> `Grams.find` -> spans of words, and the items to which they belong -> the mode's batch, and the counts
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from run_contract.errors import UserError
from snakmodel.filter.decontaminate.cut import without
from snakmodel.filter.decontaminate.grams import SHORTEST, Found, Grams, distinct
from snakmodel.filter.decontaminate.items import Evaluation, read
from snakmodel.filter.decontaminate.letters import is_letter
from snakmodel.filter.decontaminate.tally import bounded_file
from snakmodel.filter.quality.measures import Numbers
from snakmodel.filter.shard import with_columns
from snakmodel.shards.arrow_stream import NO_SOURCE, source_names
from snakmodel.shards.counts import bounded

COLUMN = "contaminated"
"""The column that marking adds: the names of the evaluation files whose items a document shares words with."""
MODES = ("mark", "remove", "cut")
NGRAM, MOST_WORDS = 13, 100
"""The default number of words of a gram, and the largest."""
HELP = "Marks, removes or cuts documents that share runs of words with evaluation items."
_TYPE = pa.list_(pa.string())
_OF, _BEGIN, _END = 0, 3, 4
"""Columns of spans; see `kernel.find`."""


@dataclass(frozen=True)
class Sources:
    """The sources of a batch's documents."""

    names: list[str]
    codes: Numbers
    """The place of each document's source among the names, (n,)."""

    @classmethod
    def of(cls, batch: Any) -> Sources:
        """The sources of a batch; if it does not tell them, all documents are of one without a name."""
        return cls(*(source_names(batch) or ([NO_SOURCE], np.zeros(batch.num_rows, np.int64))))

    def count(self, documents: Numbers) -> dict[str, int]:
        """How many of these documents each source has."""
        found: dict[str, int] = {}
        for name, number in zip(self.names, np.bincount(self.codes[documents], minlength=len(self.names)), strict=True):
            if number:
                found[name] = found.get(name, 0) + int(number)
        return found


class Decontaminate:
    """A `RejectingStep` that finds documents which share words with evaluation items; see `FinishingStep` as well."""

    name = "decontaminate"

    def __init__(
        self, files: Sequence[Evaluation], ngram: int = NGRAM, mode: str = "mark", rejected_path: Path | None = None
    ) -> None:
        if not 1 <= ngram <= MOST_WORDS:
            raise UserError(f"--ngram {ngram}: a number of words from 1 to {MOST_WORDS} is needed")
        if rejected_path and mode == "mark":
            raise UserError("--mode mark keeps all documents, so that there is nothing for --rejected; leave it out")
        self.files, self.ngram, self.mode, self.rejected_path = files, ngram, mode, rejected_path
        self._grams = Grams([text for one in files for text in one.texts], ngram)
        self._numbers = np.array([number for one in files for number in one.numbers], np.int64)
        self._file = np.repeat(np.arange(len(files)), [len(one.texts) for one in files])
        self._about = [self._contents(place) for place in range(len(files))]
        self._rejected: Any = None

    def _contents(self, place: int) -> dict[str, int]:
        """How many items an evaluation file holds, how many are looked for as a whole, and how many are too short."""
        lengths = self._grams.lengths[self._file == place]
        if not lengths.any():
            raise UserError(
                f"{self.files[place].name}: none of its {len(lengths)} items has {min(self.ngram, SHORTEST)} words, "
                "the fewest that are looked for; name its text with --fields, or leave the file out"
            )
        whole = (lengths > 0) & (lengths < self.ngram)
        return {"items": len(lengths), "whole": int(whole.sum()), "too_short": int((lengths == 0).sum())}

    def schema(self, schema: Any) -> Any:
        """See `Step`; marking adds the column `contaminated`."""
        return with_columns(schema, pa.field(COLUMN, _TYPE)) if self.mode == "mark" else schema

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """See `Step`. The counts are documents and spans, by source and evaluation file, and the items hit."""
        place = batch.schema.get_field_index("text")
        found = self._grams.find(batch.column(place))
        hit = np.unique(found.spans[:, _OF])
        counts = self._counts(Sources.of(batch), found, hit)
        if self.mode == "mark":
            columns = [*batch.columns, self._marks(found, batch.num_rows)]
            return pa.RecordBatch.from_arrays(columns, schema=self.schema(batch.schema)), counts
        dropped = np.zeros(batch.num_rows, np.bool_)
        after = batch
        if self.mode == "remove":
            dropped[hit] = True
        elif len(hit):
            texts = cut_texts(batch.column(place), hit, found)
            dropped[hit] = [not any(map(is_letter, text)) for text in texts]
            counts["emptied"] = int(dropped.sum())
            after = batch.set_column(place, batch.schema.field(place), with_rows(batch.column(place), hit, texts))
        self._rejected = batch.filter(pa.array(dropped))
        return after.filter(pa.array(~dropped)), counts

    def rejected(self) -> Any:
        """See `RejectingStep`: removed documents and, in the mode cut, those of which nothing was left."""
        return self._rejected

    def finished(self, counts: dict[str, Any]) -> dict[str, Any]:
        """See `FinishingStep`: the counts with what each evaluation file holds, bounded by source and item."""
        empty = {"documents": 0, "spans": 0, "by_source": {}, "hit_items": {}}
        files = counts.get("files", {})
        return {
            "ngram": self.ngram,
            "mode": self.mode,
            "hit": counts.get("hit", 0),
            "spans": counts.get("spans", 0),
            **({"emptied": counts.get("emptied", 0)} if self.mode == "cut" else {}),
            "by_source": bounded(dict(sorted(counts.get("by_source", {}).items()))),
            "files": {
                one.name: bounded_file({**about, **files.get(one.name, empty)})
                for one, about in zip(self.files, self._about, strict=True)
            },
        }

    def _counts(self, sources: Sources, found: Found, hit: Numbers) -> dict[str, Any]:
        spans, documents = sources.count(found.spans[:, _OF]), sources.count(hit)
        by_source = {name: {"documents": number, "spans": spans[name]} for name, number in documents.items()}
        files = {}
        owner = self._file[found.items[:, 1]]
        for place in np.unique(owner).tolist():
            here = found.items[owner == place]
            of = found.spans[here[:, 0], _OF]
            shared, pairs = np.unique(of), distinct(here[:, 1], of)
            items, firsts = np.unique(pairs[:, 0], return_index=True)
            files[self.files[place].name] = {
                "documents": len(shared),
                "spans": len(np.unique(here[:, 0])),
                "by_source": sources.count(shared),
                "hit_items": {
                    str(self._numbers[item]): sources.count(documents)
                    for item, documents in zip(items, np.split(pairs[:, 1], firsts[1:]), strict=True)
                },
            }
        return {"hit": len(hit), "spans": len(found.spans), "by_source": by_source, "files": files}

    def _marks(self, found: Found, documents: int) -> Any:
        """The names of the evaluation files that each document shares words with, in the order of --against."""
        pairs = distinct(found.spans[found.items[:, 0], _OF], self._file[found.items[:, 1]])
        offsets = np.searchsorted(pairs[:, 0], np.arange(documents + 1)).astype(np.int32)
        names = pa.array([one.name for one in self.files], pa.string())
        return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(pairs[:, 1])))


def cut_texts(texts: Any, hit: Numbers, found: Found) -> list[str]:
    """The texts of these documents without their spans."""
    borders = np.searchsorted(found.spans[:, _OF], [*hit.tolist(), len(texts)])
    spans = found.spans[:, [_BEGIN, _END]].tolist()
    return [
        without(text, spans[first:stop])
        for text, first, stop in zip(texts.take(pa.array(hit)).to_pylist(), borders[:-1], borders[1:], strict=True)
    ]


def with_rows(texts: Any, rows: Numbers, changed: list[str]) -> Any:
    """The strings, of which those in these rows are exchanged."""
    mask = np.zeros(len(texts), np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(texts, pa.array(mask), pa.array(changed, texts.type))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step."""
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="evaluation files: .jsonl, .jsonl.gz or .parquet with an item per line or row",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="the fields that hold an item's text, such as question choices answer (default: all strings of the item)",
    )
    parser.add_argument(
        "--ngram", type=int, default=NGRAM, help="how many words in a row must be shared (default: %(default)s)"
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="mark",
        help=f"mark: keep all documents, and name the files in the column {COLUMN}; remove: drop documents; cut: cut "
        "the shared words out of them (default: %(default)s)",
    )
    parser.add_argument(
        "--rejected", type=Path, metavar="PATH", help="write the documents that are dropped as PATH.arrow"
    )


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`; reads the evaluation files."""
    if not 1 <= args.ngram <= MOST_WORDS:
        raise UserError(f"--ngram {args.ngram}: a number of words from 1 to {MOST_WORDS} is needed")
    read(args.against, args.fields)
    return with_columns(schema, pa.field(COLUMN, _TYPE)) if args.mode == "mark" else schema


def make(args: argparse.Namespace) -> Decontaminate:
    """The step of these flags."""
    return Decontaminate(read(args.against, args.fields), args.ngram, args.mode, args.rejected)
