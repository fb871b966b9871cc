"""Runs of deduplication over generated documents, step by step, for the tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from run_contract.publish import write_json
from snakmodel.chain.stage import stage_key
from snakmodel.dedup.buckets import buckets
from snakmodel.dedup.components import DROPPED, components
from snakmodel.dedup.filter import filter_shard
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.signatures import signatures
from snakmodel.run.markers import Marker, marker_path
from snakmodel.run.paths import shard_name
from snakmodel.shards.arrow_stream import SCHEMA, Rows, texts, write_stream

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = [
    f"{a}{b}" for a in ("sø", "by", "skov", "ærø", "vej", "hus") for b in ("en", "et", "erne", "mand", "gård", "land")
]


def corpus(families: int = 60, seed: int = 5) -> list[str]:
    """5 documents a family: families that drift apart word by word, exact copies, and a tenth of short ones."""
    random_ = random.Random(seed)
    size = 5 * families
    made: list[str] = []
    for _ in range(families):
        words = random_.choices(WORDS, k=random_.randint(40, 90))
        for _ in range(random_.randint(1, 5)):
            made.append(" ".join(words))
            words[random_.randrange(len(words))] = random_.choice(WORDS)
    made = made[: size * 9 // 10]
    made += random_.choices(made, k=size * 9 // 10 - len(made))
    made += [" ".join(random_.choices(WORDS[:3], k=random_.randint(1, 3))) for _ in range(size - len(made))]
    random_.shuffle(made)
    return made


def write_shards(folder: Path, documents: list[str], shards: int, batch: int = 7) -> None:
    """Cut documents into contiguous shards, each of several record batches; the source alternates."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = [len(documents) * shard // shards for shard in range(shards + 1)]
    for shard in range(shards):
        numbers = range(edges[shard], edges[shard + 1])
        write_stream(
            folder / f"shard-{shard:05d}.arrow",
            SCHEMA,
            (record_batch(documents, numbers[first : first + batch]) for first in range(0, len(numbers), batch)),
        )


def record_batch(documents: list[str], numbers: range) -> Any:
    sources = ["even" if number % 2 == 0 else "odd" for number in numbers]
    return pa.record_batch([pa.array([documents[n] for n in numbers], pa.large_string()), sources], schema=SCHEMA)


def arrow_shards(run: Path, shards: int) -> list[Rows]:
    return [Rows(run / f"arrow/shard-{shard:05d}.arrow") for shard in range(shards)]


def sign(run: Path, shards: int, ranges: int, parameters: Parameters) -> None:
    for shard, rows in enumerate(arrow_shards(run, shards)):
        signatures(rows, run / f"dedup/signatures/shard-{shard:05d}", "text", ranges, parameters)


def link(run: Path, shards: int, ranges: int, verify: bool = False, against: Sequence[Path] = ()) -> None:
    given = arrow_shards(run, shards) if verify else None
    for part in range(ranges):
        output = run / f"dedup/buckets/range-{part:05d}"
        buckets(run / "dedup/signatures", shards, part, output, given, against=against)


def join(run: Path, shards: int, ranges: int, against: Sequence[Path] = (), with_sizes: bool = False) -> dict[str, Any]:
    folders = (run / "dedup/signatures", run / "dedup/buckets")
    return components(*folders, shards, ranges, run / "dedup/components", against, with_sizes)


def keep(run: Path, shard: int, with_sizes: bool = False) -> dict[str, Any]:
    name, lists = f"shard-{shard:05d}", run / "dedup/components"
    sizes = lists / f"sizes/{name}.npy" if with_sizes else None
    source, removed = Rows(run / f"arrow/{name}.arrow"), lists / f"removed/{name}.npy"
    return filter_shard(source, removed, run / f"dedup/kept/{name}", sizes)


def whole(
    run: Path,
    documents: list[str],
    shards: int,
    ranges: int,
    parameters: Parameters,
    verify: bool = False,
    against: Sequence[Path] = (),
    with_sizes: bool = False,
) -> dict[str, Any]:
    """All four steps; returns the statistics."""
    write_shards(run / "arrow", documents, shards)
    sign(run, shards, ranges, parameters)
    link(run, shards, ranges, verify, against)
    stats = join(run, shards, ranges, against, with_sizes)
    for shard in range(shards):
        keep(run, shard, with_sizes)
    return stats


def signed_run(run: Path, documents: list[str], shards: int, ranges: int, parameters: Parameters) -> Path:
    """The folder of a run that has done prepare and dedup-signatures, with the files by which others know it."""
    write_shards(run / "arrow", documents, shards)
    sign(run, shards, ranges, parameters)
    keys = [f"key {shard}" for shard in range(shards)]
    for shard, key in enumerate(keys):
        for stage, output in (("prepare", "arrow/{}.arrow"), ("dedup-signatures", "dedup/signatures/{}.sig")):
            name = output.format(shard_name(shard))
            Marker.of(run, key, [name]).write(marker_path(run, stage, shard))
    write_json(run / "shards.json", {"shards": [[]] * shards})
    write_json(run / "run.yaml", {"stage_keys": {"dedup-signatures": stage_key(keys)}})
    return run


def kept_sizes(run: Path) -> list[int]:
    """The column `cluster_size` of all kept shards."""
    files = sorted((run / "dedup/kept").glob("*.arrow"))
    return [size for file in files for size in datasets.Dataset.from_file(str(file))["cluster_size"][:]]


def labels(run: Path) -> list[int]:
    return np.load(run / "dedup/components/labels.npy").tolist()  # type: ignore[no-any-return]


def kept(run: Path) -> list[str]:
    files = sorted((run / "dedup/kept").glob("*.arrow"))
    return [text for file in files for batch in texts(file) for text in batch]


def clusters(labelled: Iterable[int | None]) -> set[frozenset[int]]:
    """The clusters of two documents or more."""
    found: dict[int, set[int]] = {}
    for document, label in enumerate(labelled):
        if label is not None and label != DROPPED:
            found.setdefault(label, set()).add(document)
    return {frozenset(cluster) for cluster in found.values() if len(cluster) > 1}


def plain_components(size: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The lowest number of each node's component, by depth-first search."""
    near: list[list[int]] = [[] for _ in range(size)]
    for left, right in pairs:
        near[left].append(right)
        near[right].append(left)
    lowest = [-1] * size
    for start in range(size):
        queue = [start] if lowest[start] < 0 else []
        while queue:
            node = queue.pop()
            if lowest[node] < 0:
                lowest[node] = start
                queue += near[node]
    return lowest
