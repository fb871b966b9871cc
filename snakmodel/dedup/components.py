"""All links -> the lowest document number of every cluster, each shard's removals, and the statistics."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.buckets import find, union
from snakmodel.dedup.signature_file import ROW, Corpus, Numbers, numbered, read_array, write_array
from snakmodel.shards.progress import progress

DROPPED = -1
"""The label of a short document removed by `short_docs: drop`."""
_BLOCK = 1 << 20
"""Documents at a time, where a step needs more than its labels."""
_LARGEST = 20


def components(folder: Path, links: Path, shards: int, ranges: int, output: Path) -> dict[str, Any]:
    """Publish the folder `output`: labels.npy int64 (n,), removed/shard-*.{npy,json}, stats.json.

    A label is the lowest document number of the cluster, or -1 for a dropped short document. Removal lists are the
    local rows, uint32, ascending. Memory: 8 bytes a document, one shard's documents and the links of one range.
    """
    corpus = Corpus.open(folder, shards)
    if corpus.ranges != ranges:
        raise UserError(f"--ranges {ranges}: the signature files in {folder} have {corpus.ranges}")
    total = int(corpus.bases[-1])
    print(f"{total} documents, about {total * 8 / 1e6:.1f} MB of memory and the links of one range", flush=True)
    labels = np.arange(total)
    verified: Counter[str] = Counter()
    with progress("joining", ranges, "ranges") as advance:
        for pairs, about in all_links(corpus, links, ranges):
            union(labels, pairs[:, 0], pairs[:, 1])
            verified.update(about.get("verified", {}))
            advance(1)
    with publishing(output) as (target,):
        (target / "removed").mkdir(parents=True)
        with progress("settling", shards, "shards") as advance:
            removed = 0
            for shard in range(shards):
                removed += write_removed(corpus, labels, shard, target / "removed")
                advance(1)
        write_array(target / "labels.npy", labels)
        stats = statistics(corpus, removed, labels)
        if verified:
            stats["verified"] = dict(verified)
        write_json(target / "stats.json", stats)
    return stats


def all_links(corpus: Corpus, folder: Path, ranges: int) -> Iterator[tuple[Numbers, dict[str, Any]]]:
    """The links of every range and what is said about them. Raises UserError if they do not belong together."""
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
    """The numbers from start to stop, some at a time."""
    for first in range(start, stop, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, stop))


def write_removed(corpus: Corpus, labels: Numbers, shard: int, folder: Path) -> int:
    """Settle one shard's labels and write its removal list; return its length."""
    file, base, end = corpus.files[shard], int(corpus.bases[shard]), int(corpus.bases[shard + 1])
    found = [np.empty(0, ROW)]
    for numbers in blocks(base, end):
        labels[numbers] = find(labels, numbers)
    labels[base + file.dropped().astype(np.int64)] = DROPPED
    for numbers in blocks(base, end):
        found.append((np.flatnonzero(labels[numbers] != numbers) + (numbers[0] - base)).astype(ROW))
    removed = np.concatenate(found)
    write_array(folder / f"shard-{shard:05d}.npy", removed)
    about = {"documents": end - base, "removed": len(removed), "input": file.header["input"]}
    write_json(folder / f"shard-{shard:05d}.json", about)
    return len(removed)


def statistics(corpus: Corpus, removed: int, labels: Numbers) -> dict[str, Any]:
    """The counts of a run. Clusters are those of two documents or more; `labels` is used up."""
    headers = [file.header for file in corpus.files]
    dropped = sum(header["dropped"] for header in headers)
    sizes, largest = cluster_sizes(labels)
    return {
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


def cluster_sizes(labels: Numbers) -> tuple[Counter[int], list[tuple[int, int]]]:
    """How many clusters there are of each size, and the largest ones: (size, -lowest number), in that order.

    Counts in place, so that a corpus takes no more memory than its labels: a survivor's label becomes -1 - its
    cluster's size, which no label is.
    """
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
