"""Reports what deduplication removed: documents and bytes by source, duplicates between sources, the largest clusters.

Walks through the shards once for the lengths and sources, without reading the texts. Takes 4 bytes of memory per
document, and the labels, which are mapped. No stage of the chain waits for the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.components import DROPPED
from snakmodel.dedup.jaccard import Texts
from snakmodel.dedup.report_figure import draw
from snakmodel.dedup.signature_file import Numbers
from snakmodel.shards.arrow_stream import NO_SOURCE, Rows, batches, column_index, open_stream, source_names
from snakmodel.shards.counts import MANY_SOURCES, MOST_SOURCES
from snakmodel.shards.progress import progress

_EXCERPT = 160
_OF_EARLIER = -1
"""The number of the source EARLIER_RUNS."""
EARLIER_RUNS = "(earlier runs)"
"""The source that stands for all documents of the runs in `dedup.against`."""


def report(shards: list[Rows], column: str, components: Path, output: Path) -> dict[str, Any]:
    """Write `output`.json and `output`.png, and return the counts of documents.

    Raises InputsMissing if `components` is not complete, UserError if it belongs to other texts.
    """
    for name in ("stats.json", "labels.npy"):
        if not (components / name).is_file():
            raise InputsMissing(f"{components / name} does not exist; run dedup components first")
    stats = json.loads((components / "stats.json").read_text(encoding="utf-8"))
    labels = np.load(components / "labels.npy", mmap_mode="r")
    tally = Tally(labels)
    counted = [0]
    with progress("report", len(labels), "documents") as advance:
        for shard in shards:
            for names, codes, lengths in described(shard, column):
                tally.add(names, codes, lengths)
                advance(len(lengths))
            counted.append(tally.documents)
    if tally.documents != len(labels):
        raise UserError(
            f"{components} is of {len(labels)} documents, the shards in {shards[0].path.parent} have "
            f"{tally.documents}; run dedup again from signatures on"
        )
    texts = Texts(counted, shards, column)
    clusters = [{**one, "excerpt": excerpt(texts[one["document"]])} for one in stats["largest_clusters"]]
    counts = ("documents", "kept", "removed", "duplicates", "dropped", "clusters", "earlier")
    removed = {key: stats[key] for key in counts if key in stats}
    found = {
        **removed,
        "sources": tally.by_source(),
        "sizes": stats["sizes"],
        "largest_clusters": clusters,
        "duplicates_of": tally.matrix(),
    }
    with publishing(Path(f"{output}.json"), Path(f"{output}.png")) as (text, picture):
        write_json(text, found)
        draw(found, picture)
    return removed


def described(shard: Rows, column: str) -> Iterator[tuple[list[str], Numbers, Numbers]]:
    """Yield for each batch the names of its sources, and each document's place among them and size in bytes."""
    with open_stream(shard.path) as reader:
        index = column_index(reader, column, shard.path)
        for batch in batches(reader, shard):
            lengths = pc.binary_length(batch.column(index)).to_numpy(zero_copy_only=False).astype(np.int64)
            names, codes = source_names(batch) or ([NO_SOURCE], np.zeros(batch.num_rows, np.int64))
            yield names, codes, lengths


class Tally:
    """Sums over documents, by source; with too many sources, over all documents together.

    The documents have to come in the order of their numbers.
    """

    def __init__(self, labels: NDArray[Any]) -> None:
        self.labels = labels
        self.documents = 0
        self.names: dict[str, int] = {}
        self.codes = np.empty(len(labels), np.int32)
        self.sums = np.zeros((4, 0), np.int64)
        self.pairs: dict[tuple[int, int], int] = {}

    def add(self, names: list[str], places: Numbers, lengths: Numbers) -> None:
        """Add a batch of documents: the names of sources, and each document's place among them and size in bytes."""
        first, self.documents = self.documents, self.documents + len(lengths)
        if self.documents > len(self.labels):
            return
        codes = self.number(names)[places]
        self.codes[first : self.documents] = codes
        labels = self.labels[first : self.documents]
        kept = labels == np.arange(first, self.documents)
        for sums, weights in zip(self.sums, (np.ones(len(codes)), lengths, kept, lengths * kept), strict=True):
            sums += np.bincount(codes, weights, len(sums)).astype(np.int64)
        twice = ~kept & (labels != DROPPED)  # the survivor came earlier: its source is known
        survivors = labels[twice]
        sources = np.where(survivors < 0, _OF_EARLIER, self.codes[np.maximum(survivors, 0)])
        pairs, counts = np.unique(np.stack([sources, codes[twice]], axis=1), axis=0, return_counts=True)
        for (survivor, removed), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.pairs[survivor, removed] = self.pairs.get((survivor, removed), 0) + count

    def number(self, names: list[str]) -> Numbers:
        """The numbers of these sources; new sources get the next numbers."""
        if MANY_SOURCES not in self.names:
            for name in names:
                self.names.setdefault(name, len(self.names))
            self.sums = np.pad(self.sums, ((0, 0), (0, len(self.names) - self.sums.shape[1])))
        if len(self.names) > MOST_SOURCES:
            self.names, self.sums = {MANY_SOURCES: 0}, self.sums.sum(1, keepdims=True)
            self.codes[:] = 0
            pairs, self.pairs = self.pairs, {(0, 0): 0}
            for (survivor, _), count in pairs.items():
                both = min(survivor, 0), 0
                self.pairs[both] = self.pairs.get(both, 0) + count
        return np.array([self.names.get(name, 0) for name in names])

    def by_source(self) -> dict[str, dict[str, int]]:
        """The documents and bytes of each source, before and after deduplication."""
        names = ("documents", "bytes", "kept_documents", "kept_bytes")
        return {name: dict(zip(names, self.sums[:, code].tolist(), strict=True)) for name, code in self.names.items()}

    def matrix(self) -> dict[str, dict[str, int]]:
        """Maps the survivor's source to the removed duplicate's source to the number of documents, without zeros."""
        names = [*self.names, EARLIER_RUNS]  # _OF_EARLIER is the last place
        found: dict[str, dict[str, int]] = {}
        for (survivor, removed), count in sorted(self.pairs.items()):
            found.setdefault(names[survivor], {})[names[removed]] = count
        return found


def excerpt(text: str) -> str:
    """The beginning of a document, on one line."""
    line = " ".join(text[: 4 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT and len(text) <= 4 * _EXCERPT else f"{line[:_EXCERPT]}…"
