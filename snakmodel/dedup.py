"""Near-duplicate removal in four steps that any number of machines can share.

  signatures   a shard's documents -> its band keys, sorted and cut into P ranges of the key space   (one task a shard)
  buckets      range p of every shard -> documents that share a key, as few links as connect them    (one task a range)
  components   all links -> the lowest document number of every cluster, and each shard's removals   (one task)
  filter       a shard and its removals -> the documents kept                                        (one task a shard)

Documents are numbered through the shards in order. The lowest number of a cluster survives, so the result depends
neither on the number of shards nor on that of ranges. Every file names the texts and parameters it was made from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from snakmodel.arrow import open_stream, texts, write_stream
from snakmodel.minhash import RECORD, SHORT_POLICIES, BandHasher, Parameters
from snakmodel.publish import InputsMissing, UserError, checksum, publishing, run_main, write_json

Numbers = NDArray[np.int64]

MAGIC = b"SNAKSIG1"
SEGMENT = np.dtype([("offset", "<u8"), ("length", "<u8"), ("checksum", "<u8")])
"""Where a segment of a signature file lies, in bytes, and its xxh3-64."""
ROW = np.dtype("<u4")
DROPPED = -1
"""The label of a short document removed by `short_docs: drop`."""


@dataclass(frozen=True)
class SignatureFile:
    """An opened signature file: P segments of records (one a range, sorted by key) and one of dropped rows.

    Layout, little-endian: magic, uint64 length of the header, uint64 xxh3-64 of header and index, JSON header, the
    index of P + 1 entries of SEGMENT, the segments.
    """

    path: Path
    header: dict[str, Any]
    """parameters, fingerprint, ranges, documents, short_documents, dropped, input (checksum of the Arrow file)."""
    index: NDArray[np.void]

    @classmethod
    def open(cls, path: Path) -> SignatureFile:
        """Read header and index. Raises UserError if the file is foreign, damaged or truncated."""
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 16)
            lengths = np.frombuffer(start[len(MAGIC) :].ljust(16, b"\0"), "<u8")
            header = file.read(min(int(lengths[0]), path.stat().st_size))
            try:
                meta = json.loads(header)
                table = file.read((meta["ranges"] + 1) * SEGMENT.itemsize)
                intact = start.startswith(MAGIC) and xxhash.xxh3_64_intdigest(header + table) == lengths[1]
            except (ValueError, KeyError, TypeError):
                intact = False
        if not intact:
            raise UserError(f"{path} is not a signature file, or is cut off or damaged; run dedup signatures again")
        index = np.frombuffer(table, SEGMENT)
        expected = int(index["offset"][-1] + index["length"][-1])
        if path.stat().st_size != expected:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {expected}; run dedup signatures again")
        return cls(path, meta, index)

    def read(self, segment: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """One segment, its checksum compared."""
        entry = self.index[segment]
        with self.path.open("rb") as file:
            file.seek(int(entry["offset"]))
            content = file.read(int(entry["length"]))
        if xxhash.xxh3_64_intdigest(content) != entry["checksum"]:
            raise UserError(f"{self.path}: segment {segment} is damaged; run dedup signatures again")
        return np.frombuffer(content, dtype)


def write_signatures(path: Path, header: dict[str, Any], segments: Sequence[NDArray[Any]]) -> None:
    """Write a signature file; the last segment holds the dropped rows."""
    meta = json.dumps(header, sort_keys=True).encode()
    lengths = [segment.nbytes for segment in segments]
    index = np.empty(len(segments), SEGMENT)
    index["length"] = lengths
    index["offset"] = len(MAGIC) + 16 + len(meta) + index.nbytes + np.cumsum([0, *lengths[:-1]])
    contents = [segment.view(np.uint8).data for segment in segments]
    index["checksum"] = [xxhash.xxh3_64_intdigest(content) for content in contents]
    digest = xxhash.xxh3_64_intdigest(meta + index.tobytes())
    with path.open("wb") as file:
        file.write(MAGIC + np.array([len(meta), digest], "<u8").tobytes() + meta + index.tobytes())
        for content in contents:
            file.write(content)


def cut_ranges(records: NDArray[np.void], ranges: int) -> list[NDArray[np.void]]:
    """Sort records by key and row and cut them where the upper half of the key passes p·2⁶⁴/P, p = 1 … P-1."""
    records = records[np.lexsort((records["row"], records["lo"], records["hi"]))]
    borders = np.array([-(-(part << 64) // ranges) for part in range(1, ranges)], np.uint64)
    return np.split(records, np.searchsorted(records["hi"], borders))


def signatures(source: Path, output: Path, column: str, ranges: int, parameters: Parameters) -> dict[str, Any]:
    """Write `output`.sig and its counts `output`.json."""
    if ranges < 1:
        raise UserError(f"--ranges {ranges}: must be 1 or more")
    hasher = BandHasher(parameters)
    found = [hasher.records(pa.array([], pa.string()), 0)]
    documents = 0
    for batch in texts(source, column):
        found.append(hasher.records(pa.array(batch, pa.large_string()), documents))
        documents += len(batch)
    records, short = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    dropped = short if parameters.short_docs == "drop" else short[:0]
    counts = {"documents": documents, "short_documents": len(short), "dropped": len(dropped)}
    about = {"parameters": parameters.described(), "fingerprint": parameters.fingerprint(), "ranges": ranges}
    with publishing(Path(f"{output}.sig"), Path(f"{output}.json")) as (file, report):
        write_signatures(file, {**about, **counts, "input": checksum(source)}, [*cut_ranges(records, ranges), dropped])
        write_json(report, {**counts, "records": len(records)})
    return counts


@dataclass(frozen=True)
class Corpus:
    """The signature files of all shards, checked against each other."""

    files: tuple[SignatureFile, ...]
    bases: Numbers
    """(S + 1,): the number of each shard's first document; the last entry is the number of documents."""
    digest: str
    """Names the texts, the parameters and how they are cut into shards and ranges."""

    @classmethod
    def open(cls, folder: Path, shards: int) -> Corpus:
        """Raises InputsMissing if a shard is absent, UserError if one is too many or of other parameters."""
        files = tuple(SignatureFile.open(path) for path in numbered(folder, "shard", ".sig", shards, "--shards"))
        first = files[0]
        for file in files:
            for key in ("parameters", "ranges"):
                if file.header[key] != first.header[key]:
                    raise UserError(
                        f"{first.path} and {file.path} were made with different {key}: {first.header[key]} and "
                        f"{file.header[key]}; run dedup signatures again for all shards with the same flags"
                    )
        bases = np.cumsum([0, *(file.header["documents"] for file in files)], dtype=np.int64)
        digest = xxhash.xxh3_128_hexdigest(json.dumps([file.header for file in files], sort_keys=True).encode())
        return cls(files, bases, digest)


def numbered(folder: Path, stem: str, suffix: str, count: int, flag: str) -> list[Path]:
    """The paths stem-00000 … in a folder. Raises InputsMissing or UserError if there are fewer or more than `count`."""
    if count < 1:
        raise UserError(f"{flag} {count}: must be 1 or more")
    paths = [folder / f"{stem}-{number:05d}{suffix}" for number in range(count)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise InputsMissing(f"{folder} lacks {len(missing)} of {count} files, the first is {missing[0]}")
    if foreign := sorted({path.name for path in folder.glob(f"{stem}-*{suffix}")} - {path.name for path in paths}):
        raise UserError(
            f"{folder} holds {foreign[0]} although {flag} is {count}: it is of another run; remove the folder"
        )
    return paths


def find(parent: Numbers, nodes: Numbers) -> Numbers:
    """The root of each node, (k,); the paths walked are shortened in `parent`."""
    while True:
        up = parent[nodes]
        top = parent[up]
        if np.array_equal(up, top):
            return up
        parent[nodes] = top


def union(parent: Numbers, left: Numbers, right: Numbers) -> None:
    """Join the sets of left[i] and right[i]; a root is always the lowest number of its set."""
    while True:
        left, right = find(parent, left), find(parent, right)
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))


def links_of(keys: NDArray[np.void], documents: Numbers) -> Numbers:
    """As few links as connect the documents that share a key: (k, 2), a document and the lowest it is connected to."""
    order = np.lexsort((keys["lo"], keys["hi"]))
    keys, documents = keys[order], documents[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = (keys["hi"][1:] != keys["hi"][:-1]) | (keys["lo"][1:] != keys["lo"][:-1])
    first = documents[starts][np.cumsum(starts) - 1]
    left, right = documents[~starts], first[~starts]
    nodes = np.sort(np.concatenate([left, right]))
    nodes = nodes[np.diff(nodes, prepend=-1) > 0]  # np.unique hashes, which is several times slower
    parent = np.arange(len(nodes))
    union(parent, np.searchsorted(nodes, left), np.searchsorted(nodes, right))
    roots = find(parent, np.arange(len(nodes)))
    linked = roots != np.arange(len(nodes))
    return np.stack([nodes[linked], nodes[roots[linked]]], axis=1)


def buckets(folder: Path, shards: int, part: int, output: Path) -> dict[str, Any]:
    """Write the links of one range: `output`.npy, int64 (k, 2), and `output`.json. Holds that range in memory."""
    corpus = Corpus.open(folder, shards)
    ranges = corpus.files[0].header["ranges"]
    if not 0 <= part < ranges:
        raise UserError(f"--range {part}: the signature files in {folder} have the ranges 0 to {ranges - 1}")
    total = sum(int(file.index["length"][part]) for file in corpus.files) // RECORD.itemsize
    print(f"range {part}: {total} keys of {shards} shards, about {total * 150 / 1e6:.1f} MB of memory", flush=True)
    records = np.concatenate([file.read(part, RECORD) for file in corpus.files])
    lengths = [int(file.index["length"][part]) // RECORD.itemsize for file in corpus.files]
    links = links_of(records, records["row"].astype(np.int64) + np.repeat(corpus.bases[:-1], lengths))
    counts = {"corpus": corpus.digest, "ranges": ranges, "range": part, "keys": total, "links": len(links)}
    with publishing(Path(f"{output}.npy"), Path(f"{output}.json")) as (array, report):
        write_array(array, links)
        write_json(report, counts)
    return counts


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Save an array under exactly this name."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path) -> tuple[NDArray[Any], dict[str, Any]]:
    """An array and the JSON object beside it. Raises InputsMissing or UserError."""
    about = path.with_suffix(".json")
    if missing := [str(file) for file in (path, about) if not file.is_file()]:
        raise InputsMissing(f"{' and '.join(missing)} missing; run the step that writes it first")
    try:
        return np.load(path, allow_pickle=False), json.loads(about.read_text(encoding="utf-8"))
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} or the .json beside it is damaged ({error}); run the step that writes it again"
        ) from error


def all_links(corpus: Corpus, folder: Path, ranges: int) -> Iterator[Numbers]:
    """The links of every range. Raises UserError if a file was made from other signature files."""
    for part, path in enumerate(numbered(folder, "range", ".npy", ranges, "--ranges")):
        links, about = read_array(path)
        if (about.get("corpus"), about.get("range")) != (corpus.digest, part) or links.shape != (about["links"], 2):
            raise UserError(f"{path} was made from other signature files; run dedup buckets again for all ranges")
        yield links


def components(folder: Path, links: Path, shards: int, ranges: int, output: Path) -> dict[str, Any]:
    """Publish the folder `output`: labels.npy int64 (n,), removed/shard-*.{npy,json}, stats.json.

    A label is the lowest document number of the cluster, or -1 for a dropped short document. Removal lists are the
    local rows, uint32, ascending.
    """
    corpus = Corpus.open(folder, shards)
    if corpus.files[0].header["ranges"] != ranges:
        raise UserError(f"--ranges {ranges}: the signature files in {folder} have {corpus.files[0].header['ranges']}")
    total = int(corpus.bases[-1])
    print(f"{total} documents, about {total * 8 / 1e6:.1f} MB of memory and the links of one range", flush=True)
    labels = np.arange(total)
    for pairs in all_links(corpus, links, ranges):
        union(labels, pairs[:, 0], pairs[:, 1])
    duplicates: list[Numbers] = []
    with publishing(output) as (target,):
        (target / "removed").mkdir(parents=True)
        for number, file in enumerate(corpus.files):
            duplicates.append(write_removed(labels, file, int(corpus.bases[number]), target / "removed", number))
        write_array(target / "labels.npy", labels)
        stats = statistics(corpus, labels, np.concatenate(duplicates))
        write_json(target / "stats.json", stats)
    return stats


def write_removed(labels: Numbers, file: SignatureFile, base: int, folder: Path, shard: int) -> Numbers:
    """Settle one shard's labels and write its removal list; return the labels (k,) of its removed duplicates."""
    numbers = np.arange(base, base + file.header["documents"])
    settled = find(labels, numbers)
    settled[file.read(len(file.index) - 1, ROW)] = DROPPED
    labels[numbers] = settled
    removed = np.flatnonzero(settled != numbers).astype(ROW)
    write_array(folder / f"shard-{shard:05d}.npy", removed)
    about = {"documents": len(numbers), "removed": len(removed), "input": file.header["input"]}
    write_json(folder / f"shard-{shard:05d}.json", about)
    duplicates: Numbers = settled[(settled != numbers) & (settled != DROPPED)]
    return duplicates


def statistics(corpus: Corpus, labels: Numbers, duplicates: Numbers) -> dict[str, Any]:
    """The counts of a run; clusters are those of two documents or more."""
    headers = [file.header for file in corpus.files]
    dropped = sum(header["dropped"] for header in headers)
    _, sizes = np.unique(duplicates, return_counts=True)
    return {
        "documents": len(labels),
        "kept": len(labels) - len(duplicates) - dropped,
        "removed": len(duplicates) + dropped,
        "duplicates": len(duplicates),
        "short_documents": sum(header["short_documents"] for header in headers),
        "dropped": dropped,
        "clusters": len(sizes),
        "largest": int(sizes.max(initial=0)) + 1 if len(sizes) else 0,
        "shards": len(headers),
        "parameters": headers[0]["parameters"],
    }


def removal_list(path: Path, source: Path) -> NDArray[Any]:
    """The rows to remove from a shard. Raises InputsMissing if there is no list, UserError if it is another shard's."""
    rows, about = read_array(path)
    if about.get("input") != checksum(source):
        raise UserError(f"{path} was made for other texts than {source}; run dedup again from signatures on")
    if len(rows) != about["removed"] or (rows >= about["documents"]).any():
        raise UserError(f"{path} does not agree with the .json beside it; run dedup components again")
    return rows


def filter_shard(source: Path, removed: Path, output: Path) -> dict[str, Any]:
    """Write the documents kept, with all columns, as `output`.arrow, and their counts by source as `output`.json."""
    with open_stream(source) as reader:
        rows = removal_list(removed, source)
        counts: dict[str, Any] = {"documents": 0, "removed": len(rows), "sources": {}}
        with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
            write_stream(arrow, reader.schema, kept_batches(reader, rows, counts))
            write_json(report, counts)
    return counts


def kept_batches(reader: Any, rows: NDArray[Any], counts: dict[str, Any]) -> Iterator[Any]:
    """Each record batch without the rows removed; `counts` grows as they are made."""
    first = 0
    for batch in reader:
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        keep = np.ones(batch.num_rows, bool)
        keep[rows[low:high].astype(np.int64) - first] = False
        first += batch.num_rows
        batch = batch.filter(pa.array(keep))
        counts["documents"] += batch.num_rows
        if "source" in batch.schema.names:
            for entry in batch.column("source").value_counts().to_pylist():
                counts["sources"][entry["values"]] = counts["sources"].get(entry["values"], 0) + entry["counts"]
        if batch.num_rows:
            yield batch


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the four sub-commands; outputs are given without their suffix."""
    parser = argparse.ArgumentParser(prog="snakmodel.dedup", description="near-duplicate removal, one step at a time")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("signatures", help="a shard's documents -> its band keys")
    step.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    step.add_argument("--column", default="text", help="the column that holds the documents")
    step.add_argument("--num_perm", type=int, default=64, help="values in a signature")
    step.add_argument("--threshold", type=float, default=0.85, help="Jaccard similarity of near-duplicates")
    step.add_argument("--ngram", type=int, default=5, help="tokens in an n-gram")
    step.add_argument("--min_length", type=int, default=5, help="fewer tokens make a document short")
    step.add_argument("--ranges", type=int, required=True, help="ranges of the key space")
    step.add_argument("--short_docs", choices=SHORT_POLICIES, default="exact", help="what to do with short documents")
    bucket = steps.add_parser("buckets", help="one range of every shard -> links")
    bucket.add_argument("--range", type=int, required=True, help="which range, from 0")
    joined = steps.add_parser("components", help="all links -> clusters and removal lists")
    joined.add_argument("--buckets", type=Path, required=True, help="the folder of the links")
    joined.add_argument("--ranges", type=int, required=True, help="ranges of the key space")
    for step in (bucket, joined):
        step.add_argument("--signatures", type=Path, required=True, help="the folder of the signature files")
        step.add_argument("--shards", type=int, required=True, help="number of shards")
    kept = steps.add_parser("filter", help="a shard and its removals -> the documents kept")
    kept.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    kept.add_argument("--removed", type=Path, required=True, help="the shard's removal list")
    for step in steps.choices.values():
        step.add_argument("--output", type=Path, required=True, help="output path without suffix")
    return parser.parse_args(argv)


def main() -> None:
    """python -m snakmodel.dedup signatures|buckets|components|filter --output PATH …

    Runs one step for one shard or range and prints its counts; see the module's docstring for the order.
    """
    args = parse_arguments()
    if args.step == "signatures":
        parameters = Parameters(args.num_perm, args.threshold, args.ngram, args.min_length, args.short_docs)
        counts = signatures(args.input, args.output, args.column, args.ranges, parameters)
    elif args.step == "buckets":
        counts = buckets(args.signatures, args.shards, args.range, args.output)
    elif args.step == "components":
        counts = components(args.signatures, args.buckets, args.shards, args.ranges, args.output)
    else:
        counts = filter_shard(args.input, args.removed, args.output)
    print(json.dumps(counts, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
