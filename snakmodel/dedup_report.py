"""What deduplication removed: documents and bytes by source, which sources repeat each other, the largest clusters.

Walks the shards once for lengths and sources, without reading the texts; memory is 4 bytes a document, and the labels,
which are mapped. Nothing in the chain waits for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from snakmodel.arrow import Rows, batches, column_index, open_stream
from snakmodel.dedup_components import DROPPED
from snakmodel.dedup_figure import draw
from snakmodel.dedup_verify import Texts
from snakmodel.progress import progress
from snakmodel.publish import InputsMissing, UserError, publishing, write_json
from snakmodel.signature_file import Numbers

_EXCERPT = 160
_UNNAMED = "(no source)"


def report(shards: list[Rows], column: str, components: Path, output: Path) -> dict[str, Any]:
    """Write `output`.json and `output`.png; return the counts of documents.

    Raises UserError if the components are of other texts.
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
            for sources, lengths in described(shard, column):
                tally.add(sources, lengths)
                advance(len(lengths))
            counted.append(tally.documents)
    if tally.documents != len(labels):
        raise UserError(
            f"{components} is of {len(labels)} documents, the shards in {shards[0].path.parent} have "
            f"{tally.documents}; run dedup again from signatures on"
        )
    texts = Texts(counted, shards, column)
    clusters = [{**one, "excerpt": excerpt(texts[one["document"]])} for one in stats["largest_clusters"]]
    removed = {key: stats[key] for key in ("documents", "kept", "removed", "duplicates", "dropped", "clusters")}
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


def described(shard: Rows, column: str) -> Iterator[tuple[Any, Numbers]]:
    """The sources (a dictionary array) and the lengths in bytes of the documents, batch by batch."""
    with open_stream(shard.path) as reader:
        index = column_index(reader, column, shard.path)
        sourced = "source" in reader.schema.names
        for batch in batches(reader, shard):
            lengths = pc.binary_length(batch.column(index)).to_numpy(zero_copy_only=False).astype(np.int64)
            if sourced:
                sources = pc.fill_null(batch.column("source").cast(pa.string()), _UNNAMED)
            else:
                sources = pa.repeat(_UNNAMED, batch.num_rows)
            yield sources.dictionary_encode(), lengths


class Tally:
    """Sums over documents, which come in the order of their numbers."""

    def __init__(self, labels: NDArray[Any]) -> None:
        self.labels = labels
        self.documents = 0
        self.names: dict[str, int] = {}
        self.codes = np.empty(len(labels), np.int32)
        self.sums: dict[int, Numbers] = {}
        self.pairs: dict[tuple[int, int], int] = {}

    def add(self, sources: Any, lengths: Numbers) -> None:
        """A batch of documents: their sources and their bytes."""
        first, self.documents = self.documents, self.documents + len(lengths)
        if self.documents > len(self.labels):
            return
        known = np.array([self.names.setdefault(name, len(self.names)) for name in sources.dictionary.to_pylist()])
        codes = known[sources.indices.to_numpy(zero_copy_only=False)]
        self.codes[first : self.documents] = codes
        labels = self.labels[first : self.documents]
        kept = labels == np.arange(first, self.documents)
        for code in np.unique(codes).tolist():
            here = codes == code
            both = here & kept
            sums = [here.sum(), lengths[here].sum(), both.sum(), lengths[both].sum()]
            self.sums[code] = self.sums.get(code, np.zeros(4, np.int64)) + np.array(sums)
        twice = ~kept & (labels != DROPPED)  # the survivor came earlier: its source is known
        pairs, counts = np.unique(
            np.stack([self.codes[labels[twice]], codes[twice]], axis=1), axis=0, return_counts=True
        )
        for (survivor, removed), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.pairs[survivor, removed] = self.pairs.get((survivor, removed), 0) + count

    def by_source(self) -> dict[str, dict[str, int]]:
        """Documents and bytes, before and after, of each source."""
        names = ("documents", "bytes", "kept_documents", "kept_bytes")
        return {name: dict(zip(names, self.sums[code].tolist(), strict=True)) for name, code in self.names.items()}

    def matrix(self) -> dict[str, dict[str, int]]:
        """Source of the survivor -> source of the removed duplicate -> documents; zeros are left out."""
        names = list(self.names)
        found: dict[str, dict[str, int]] = {}
        for (survivor, removed), count in sorted(self.pairs.items()):
            found.setdefault(names[survivor], {})[names[removed]] = count
        return found


def excerpt(text: str) -> str:
    """The beginning of a document on one line."""
    line = " ".join(text[: 4 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT and len(text) <= 4 * _EXCERPT else f"{line[:_EXCERPT]}…"
