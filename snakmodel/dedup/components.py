"""Turns all links into clusters: the lowest document number of each, the removals of each shard, and statistics."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.buckets import find, union
from snakmodel.dedup.earlier_runs import open_runs
from snakmodel.dedup.signature_file import ROW, Corpus, Numbers, numbered, read_array, write_array
from snakmodel.run.paths import shard_name
from snakmodel.shards.progress import progress

DROPPED = -1
"""The label of a short document that `short_docs: drop` removes."""
EARLIER = -2
"""The label of a document whose cluster's lowest document is the first of all earlier runs; lower labels are of later
ones."""
_BLOCK = 1 << 20
"""The number of documents that are handled at a time in steps that need more memory than the labels."""
_LARGEST = 20


def components(
    folder: Path,
    links: Path,
    shards: int,
    ranges: int,
    output: Path,
    against: Sequence[Path] = (),
    with_sizes: bool = False,
) -> dict[str, Any]:
    """Publish the folder `output`: labels.npy int64 (n,), removed/shard-*.{npy,json} and stats.json.

    A label is the lowest document number of the document's cluster, or -1 for a dropped short document. Removal lists
    hold the rows within the shard, uint32, ascending. With `against`, the folders of earlier runs, the clusters are
    those of all documents together, but everything that is written is about this run's documents, which are numbered
    from 0: where the lowest document of a cluster is number e of the earlier runs, the label is -2 - e. With
    `with_sizes`, sizes/shard-*.{npy,json} hold the size of the cluster of each document that is kept, int64, in order.

    Returns the statistics. Takes memory for 8 bytes per document (of all runs), one shard's documents and the links of
    one range. Raises UserError if the files do not belong together.
    """
    runs = open_runs(against, folder, "--against")
    corpus = Corpus.open(folder, shards, [file for run in runs for file in run.files])
    if corpus.ranges != ranges:
        raise UserError(f"--ranges {ranges}: the signature files in {folder} have {corpus.ranges}")
    total = int(corpus.bases[-1])
    print(f"{total} documents, about {decimal(total * 8)} of memory and the links of one range", flush=True)
    parent = np.arange(total)
    verified: Counter[str] = Counter()
    with progress("joining", ranges, "ranges") as advance:
        for pairs, about in all_links(corpus, links, ranges):
            union(parent, pairs[:, 0], pairs[:, 1])
            verified.update(about.get("verified", {}))
            advance(1)
    labels = settled(corpus, parent)
    with publishing(output) as (target,):
        (target / "removed").mkdir(parents=True)
        removed = sum(write_removed(corpus, labels, shard, target / "removed") for shard in range(shards))
        write_array(target / "labels.npy", labels)
        stats = statistics(corpus, removed, labels)
        if verified:
            stats["verified"] = dict(verified)
        if with_sizes:
            (target / "sizes").mkdir()
            for shard in range(shards):
                write_sizes(corpus, labels, shard, target / "sizes")
        write_json(target / "stats.json", stats)
    return stats


def all_links(corpus: Corpus, folder: Path, ranges: int) -> Iterator[tuple[Numbers, dict[str, Any]]]:
    """Yield the links of every range, and the content of the .json beside them.

    Raises UserError if the files do not belong together.
    """
    verified = None
    for part, path in enumerate(numbered(folder, "range", ".npy", ranges, "--ranges")):
        links, about = read_array(path)
        if (about.get("corpus"), about.get("range")) != (corpus.digest, part) or links.shape != (about["links"], 2):
            raise UserError(f"{path} was made from other signature files; run dedup buckets again for all ranges")
        if part and verified != ("verified" in about):
            raise UserError(f"{path}: some ranges were verified and some not; run dedup buckets again for all ranges")
        verified = "verified" in about
        yield links, about


def blocks(start: int, stop: int) -> Iterator[Numbers]:
    """The numbers from start to stop (exclusive), in arrays of at most _BLOCK."""
    for first in range(start, stop, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, stop))


def settled(corpus: Corpus, parent: Numbers) -> Numbers:
    """The labels of this run's documents, as `components` describes them. They take the place of their parents."""
    first = corpus.first
    for numbers in blocks(first, len(parent)):
        parent[numbers] = find(parent, numbers)
    labels = parent[first:]
    for numbers in blocks(0, len(labels) if first else 0):
        roots = labels[numbers]
        labels[numbers] = np.where(roots >= first, roots - first, EARLIER - roots)
    for file, base in zip(corpus.own, corpus.own_bases.tolist(), strict=False):
        labels[base + file.dropped().astype(np.int64)] = DROPPED
    return labels


def write_removed(corpus: Corpus, labels: Numbers, shard: int, folder: Path) -> int:
    """Write one shard's removal list, and return the list's length."""
    base, end = corpus.own_bases[shard : shard + 2].tolist()
    found = [np.empty(0, ROW)]
    for numbers in blocks(base, end):
        found.append((np.flatnonzero(labels[numbers] != numbers) + (numbers[0] - base)).astype(ROW))
    removed = np.concatenate(found)
    write_array(folder / f"{shard_name(shard)}.npy", removed)
    about = {"documents": end - base, "removed": len(removed), "input": corpus.own[shard].header["input"]}
    write_json(folder / f"{shard_name(shard)}.json", about)
    return len(removed)


def write_sizes(corpus: Corpus, labels: Numbers, shard: int, folder: Path) -> None:
    """Write the cluster sizes of a shard's kept documents; `labels` is what `cluster_sizes` made of the labels.

    The cluster of a document that is kept holds none of the earlier runs' documents: one of these would be kept.
    """
    base, end = corpus.own_bases[shard : shard + 2].tolist()
    here = labels[base:end]
    sizes = -1 - here[here < DROPPED]
    write_array(folder / f"{shard_name(shard)}.npy", sizes)
    about = {"documents": len(sizes), "input": corpus.own[shard].header["input"]}
    write_json(folder / f"{shard_name(shard)}.json", about)


def statistics(corpus: Corpus, removed: int, labels: Numbers) -> dict[str, Any]:
    """The statistics of a run. Only clusters of two or more documents are counted. Overwrites `labels`.

    With earlier runs, clusters with documents of these are left out; `earlier` says how many documents were removed
    because they belong to one.
    """
    headers = [file.header for file in corpus.own]
    dropped = sum(header["dropped"] for header in headers)
    of_earlier = sum(int(np.count_nonzero(labels[numbers] < DROPPED)) for numbers in blocks(0, len(labels)))
    sizes, largest = cluster_sizes(labels)
    stats = {
        "documents": len(labels),
        "kept": len(labels) - removed,
        "removed": removed,
        "duplicates": removed - dropped,
        "short_documents": sum(header["short_documents"] for header in headers),
        "dropped": dropped,
        "clusters": sum(sizes.values()),
        "largest": max(sizes, default=0),
        "sizes": sorted(sizes.items()),
        "largest_clusters": [{"size": size, "document": -negative} for size, negative in largest],
        "shards": len(headers),
        "parameters": headers[0]["parameters"],
    }
    if corpus.earlier:
        stats["earlier"] = {"shards": corpus.earlier, "documents": corpus.first, "duplicates": of_earlier}
    return stats


def cluster_sizes(labels: Numbers) -> tuple[Counter[int], list[tuple[int, int]]]:
    """The number of clusters of each size, and the largest clusters in order as (size, -lowest document number).

    The clusters are counted in place, so that a corpus takes no more memory than its labels: the label of a survivor is
    replaced by -1 minus the size of its cluster. Labels of documents of earlier runs become DROPPED before, so that no
    label has such a value.
    """
    np.maximum(labels, DROPPED, out=labels)
    for numbers in blocks(0, len(labels)):
        labels[numbers[labels[numbers] == numbers]] = -2
    for numbers in blocks(0, len(labels)):
        survivors = labels[numbers]
        np.subtract.at(labels, survivors[survivors >= 0], 1)
    sizes: Counter[int] = Counter()
    largest: list[tuple[int, int]] = []
    for numbers in blocks(0, len(labels)):
        counts = -1 - labels[numbers]
        chosen = counts > 1
        numbers, counts = numbers[chosen], counts[chosen]
        sizes.update(dict(zip(*(part.tolist() for part in np.unique(counts, return_counts=True)), strict=True)))
        top = np.argsort(-counts, kind="stable")[:_LARGEST]
        here = zip(counts[top].tolist(), (-numbers[top]).tolist(), strict=True)
        largest = heapq.nlargest(_LARGEST, [*largest, *here])
    return sizes, largest
