"""Makes the files of a source's folder of its downloads, one after the other."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from run_contract.errors import UserError
from run_contract.publish import fsync, remove, write_json
from snakmodel.collect.documents import documents
from snakmodel.collect.parts import PART_BYTES, Part, PartWriter, as_json, sha256
from snakmodel.collect.places import Place
from snakmodel.collect.report import Report
from snakmodel.collect.sources import Source

_SUFFIXES = {"lines": ".txt"}


@dataclass(frozen=True)
class Download:
    """A file that was downloaded, or put in place by hand."""

    file: str
    """Its path below the folder of downloads."""
    url: str | None
    bytes: int
    sha256: str
    etag: str | None
    last_modified: str | None
    retrieved: str
    """The time, in UTC."""


def convert(
    place: Place, source: Source, downloads: Sequence[Download], report: Report
) -> tuple[list[Part], dict[str, int]]:
    """Fill the folder `place.parts`, and return its files and the numbers of documents left out, by reason.

    A conversion that was killed goes on after the last download that ended together with a part. Raises UserError if a
    download is not what the source says it is, or if no document is left.
    """
    state: dict[str, Any] = {"entry": source.entry(), "downloads": [[one.file, one.sha256] for one in downloads]}
    done, parts, left_out = _resumed(place, state)
    make = _copy_tables if source.format == "parquet" else _write_parts
    make(place, source, downloads, report, state, done, parts, left_out)
    if not sum(part.documents for part in parts):
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in left_out.items())
        raise UserError(
            f"{place.name}: no document is left of {', '.join(one.file for one in downloads[:3])} (left out: "
            f"{reasons or 'nothing, as there is nothing in it'}); correct `format` and the other keys of the source"
        )
    return parts, dict(sorted(left_out.items()))


def _resumed(place: Place, state: dict[str, Any]) -> tuple[int, list[Part], Counter[str]]:
    """The number of downloads that are done, the finished parts, and the counts; other files are removed."""
    try:
        kept = json.loads(place.progress.read_text(encoding="utf-8"))
        parts = [Part(**part) for part in kept["parts"]]
        whole = all((place.parts / part.file).stat().st_size == part.bytes for part in parts)
        if not whole or {key: kept[key] for key in state} != state:
            raise ValueError("the parts are of other downloads")
    except (OSError, ValueError, KeyError, TypeError):
        remove(place.progress)
        remove(place.parts)
        place.parts.mkdir(parents=True)
        return 0, [], Counter()
    names = {part.file for part in parts}
    for path in [path for path in place.parts.rglob("*") if path.is_file()]:
        if path.relative_to(place.parts).as_posix() not in names:
            path.unlink()
    return kept["done"], parts, Counter(kept["left_out"])


def _write_parts(
    place: Place,
    source: Source,
    downloads: Sequence[Download],
    report: Report,
    state: dict[str, Any],
    done: int,
    parts: list[Part],
    left_out: Counter[str],
) -> None:
    suffix = _SUFFIXES.get(source.format, ".jsonl")
    writer = PartWriter(place.parts, suffix, parts, PART_BYTES)
    number = sum(part.documents for part in parts)
    try:
        for place_of, one in enumerate(downloads[done:], done + 1):
            for text, columns in documents(place.downloads / one.file, source, left_out):
                writer.add(text, None if suffix == ".txt" else columns)
                number += 1
                if number % 1000 == 0:
                    report.now_and_then(f"{one.file}: {number:,} documents")
            if writer.end_of_input():
                _save(place, state, place_of, parts, left_out)
        writer.close()
    finally:
        writer.abandon()
    fsync(place.parts)


def _copy_tables(
    place: Place,
    source: Source,
    downloads: Sequence[Download],
    report: Report,
    state: dict[str, Any],
    done: int,
    parts: list[Part],
    left_out: Counter[str],
) -> None:
    """Take Parquet files as they are, by hard links, or with the column of the text renamed."""
    for number, one in enumerate(downloads[done:], done + 1):
        file = f"{number - 1:05d}.parquet"
        path, target = place.downloads / one.file, place.parts / file
        rows = _check_table(path, source)
        if source.key == "text":
            _link(path, target)
        else:
            _rename_column(path, target, source.key)
        parts.append(Part(file, target.stat().st_size, sha256(target), rows))
        _save(place, state, number, parts, left_out)
        report.now_and_then(f"{one.file}: taken")


def _check_table(path: Path, source: Source) -> int:
    """The number of rows of a Parquet file. Raises UserError if it is none, or has no column of texts."""
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: is no whole Parquet file ({error}). Delete it, and run this again") from error
    kinds = {field.name: field.type for field in schema}
    if source.key not in kinds or kinds[source.key] not in (pa.string(), pa.large_string()):
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f"{path}: has no column {source.key!r} of strings. It has {shown}; correct `key` of the source")
    return int(rows)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)
    fsync(target)


def _rename_column(path: Path, target: Path, key: str) -> None:
    """Write a Parquet file again, one row group at a time, with its column `key` named `text`."""
    with pq.ParquetFile(path) as file:
        names = ["text" if name == key else f"{name}_" if name == "text" else name for name in file.schema_arrow.names]
        schema = pa.schema([field.with_name(name) for field, name in zip(file.schema_arrow, names, strict=True)])
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group).rename_columns(names).cast(schema))
    fsync(target)


def _save(place: Place, state: dict[str, Any], done: int, parts: list[Part], left_out: Counter[str]) -> None:
    write_json(place.progress, {**state, "done": done, "parts": as_json(parts), "left_out": dict(left_out)})
