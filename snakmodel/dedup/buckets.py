"""Links the documents that share a key of one range, with as few links as connect them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.earlier_runs import open_runs
from snakmodel.dedup.jaccard import Texts, Verifier
from snakmodel.dedup.signature_file import Corpus, Numbers, write_array
from snakmodel.shards.arrow_stream import Rows
from snakmodel.shards.progress import progress

_BYTES_A_KEY = 64
"""Bytes of memory per key at the peak: 24 for keys and numbers, 16 for their order and the sorted keys, and at most 24
for the keys that are shared."""


def buckets(
    folder: Path,
    shards: int,
    part: int,
    output: Path,
    texts: list[Rows] | None = None,
    column: str = "text",
    against: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the links of one range, `output`.npy, int64 (k, 2), and its counts `output`.json; return the counts.

    Holds the range in memory. With `texts`, documents are linked only if their Jaccard similarity reaches the
    threshold. `against` names the folders of earlier runs, whose documents are numbered before this run's. Raises
    UserError if the signature files have no such range, or if an earlier run cannot be used.
    """
    runs = open_runs(against, folder, "--against")
    corpus = Corpus.open(folder, shards, [file for run in runs for file in run.files])
    if not 0 <= part < corpus.ranges:
        raise UserError(f"--range {part}: the signature files in {folder} have the ranges 0 to {corpus.ranges - 1}")
    total = sum(file.records(part) for file in corpus.files)
    memory = f"about {decimal(total * _BYTES_A_KEY)} of memory"
    print(f"range {part}: {total} keys of {len(corpus.files)} shards, {memory}", flush=True)
    documents, starts = shared(corpus, part, total)
    counts = {"corpus": corpus.digest, "ranges": corpus.ranges, "range": part, "keys": total, "buckets": len(starts)}
    if texts is None:
        left, right = chained(documents, starts)
    else:
        every = Texts(
            corpus.bases.tolist(), [*(rows for run in runs for rows in run.texts("--against")), *texts], column
        )
        left, right, verified = verify(documents, starts, every, corpus)
        counts["verified"] = verified
    links = forest(left, right)
    counts["links"] = len(links)
    with publishing(Path(f"{output}.npy"), Path(f"{output}.json")) as (array, report):
        write_array(array, links)
        write_json(report, counts)
    return counts


def shared(corpus: Corpus, part: int, total: int) -> tuple[Numbers, Numbers]:
    """The documents of the keys that several documents share, and the start of each bucket.

    The documents, (m,), are sorted bucket by bucket; the starts, (b,), are positions among them.
    """
    keys, low, numbers = np.empty(total, np.uint64), np.empty(total, np.uint64), np.empty(total, np.int64)
    first = 0
    with progress("reading", len(corpus.files), "shards") as advance:
        for file, base in zip(corpus.files, corpus.bases, strict=False):
            records = file.read(part)
            here = slice(first, first + len(records))
            keys[here], low[here] = records["hi"], records["lo"]
            numbers[here] = records["row"] + base
            first += len(records)
            advance(1)
    return group(keys, low, numbers)


def group(keys: NDArray[np.uint64], low: NDArray[np.uint64], numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The buckets of two or more documents: the documents, (m,), and the start of each bucket, (b,).

    The keys are given in two halves. Only one half is sorted, because hardly any two different keys of a corpus agree
    in it; if some do, the other half is sorted too.
    """
    order = np.argsort(keys)
    same = keys[order[1:]] == keys[order[:-1]]
    order, starts = several(order, same)
    same = (keys[order[1:]] == keys[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    if len(order) - np.count_nonzero(same) != len(starts):
        order = order[np.lexsort((low[order], keys[order]))]
        same = (keys[order[1:]] == keys[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
        order, starts = several(order, same)
    return numbers[order], starts


def several(order: Numbers, same: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """The entries of `order` that have an equal neighbour, and the start of each run of equal entries.

    `same` says which entries, from the second on, equal the one before.
    """
    first, last = np.concatenate([[True], ~same]), np.concatenate([~same, [True]])
    member = ~(first & last)[: len(order)]
    return order[member], np.flatnonzero(first[: len(order)][member])


def chained(documents: Numbers, starts: Numbers) -> tuple[Numbers, Numbers]:
    """Links from every document of a bucket to the first document of the bucket."""
    others = np.ones(len(documents), bool)
    others[starts] = False
    sizes = np.diff(starts, append=len(documents))
    return documents[others], np.repeat(documents[starts], sizes - 1)


def verify(
    documents: Numbers, starts: Numbers, texts: Texts, corpus: Corpus
) -> tuple[Numbers, Numbers, dict[str, int]]:
    """Links between documents of a bucket that reach the threshold, and the counts of verified links."""
    verifier = Verifier(texts, corpus.files[0].header["parameters"])
    found: list[tuple[int, int]] = []
    with progress("verifying", len(starts), "buckets") as advance:
        for start, size in zip(starts, np.diff(starts, append=len(documents)), strict=True):
            found += verifier.links(np.unique(documents[start : start + size]))
            advance(1)
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], verifier.counts


def forest(left: Numbers, right: Numbers) -> Numbers:
    """The fewest links that connect what these links connect, (k, 2).

    Each is a document, and the lowest number to which it is connected.
    """
    nodes = np.sort(np.concatenate([left, right]))
    nodes = nodes[np.diff(nodes, prepend=-1) > 0]  # np.unique uses a hash table, which is several times slower
    parent = np.arange(len(nodes))
    union(parent, np.searchsorted(nodes, left), np.searchsorted(nodes, right))
    roots = find(parent, np.arange(len(nodes)))
    linked = roots != np.arange(len(nodes))
    return np.stack([nodes[linked], nodes[roots[linked]]], axis=1)


def find(parent: Numbers, nodes: Numbers) -> Numbers:
    """The root of each node, (k,). The paths on the way are shortened in `parent`."""
    while True:
        up = parent[nodes]
        top = parent[up]
        if np.array_equal(up, top):
            return up
        parent[nodes] = top


def union(parent: Numbers, left: Numbers, right: Numbers) -> None:
    """Join the sets of left[i] and right[i] for all i. A root is always the lowest number of its set."""
    while True:
        left, right = find(parent, left), find(parent, right)
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
