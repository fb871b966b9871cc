"""Exports Arrow shards as one .jsonl file (one `{"text": …}` per line) and one .txt file (one document per line).

Columns beside `text` and `source` follow the text in its object, as shards/json_rows.py writes them. The .txt file
holds the text only.

`shard` writes the pair of files of one shard, and its counts. `join` puts the pairs together in the order of the
shards, and checks that the joined files hold what the sums of the counts say.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_json
from snakmodel.shards.append_file import append_file
from snakmodel.shards.arrow_stream import column_index, open_stream, source_names
from snakmodel.shards.counts import Amounts
from snakmodel.shards.json_rows import further_columns, json_rows

FORMATS = ("jsonl", "txt")
_BORDER = b"\xff"
"""The separator of documents while a batch is handled as one string: a byte that UTF-8 never contains."""
_ESCAPES = {b"\\": b"\\\\", b'"': b'\\"', b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t", b"\b": b"\\b", b"\f": b"\\f"}
_CONTROL = re.compile(rb"[\x00-\x1f]")
_BLOCK = 1 << 22


@dataclass
class ExportCounts(Amounts):
    """Counts of the documents in a pair of files, and the sizes of the files in bytes."""

    jsonl_bytes: int = 0
    txt_bytes: int = 0


def outputs(prefix: Path) -> tuple[Path, ...]:
    """The paths of the .jsonl, .txt and .json file of a prefix."""
    return tuple(Path(f"{prefix}.{suffix}") for suffix in (*FORMATS, "json"))


def export_shard(source: Path, output: Path) -> ExportCounts:
    """Write `output`.jsonl, `output`.txt (line ends within a document become spaces) and their counts `output`.json.

    Raises UserError if the number of documents in the shard differs from the counts beside it.
    """
    counts = ExportCounts()
    with publishing(*outputs(output)) as (lines, plain, report):
        with lines.open("wb") as as_json, plain.open("wb") as as_text:
            for texts, sources, further in _batches(source):
                counts.add(_measured(texts, sources))
                content = _joined(texts)
                objects = _json_lines(content)
                as_json.write(objects if further is None else _extended(objects, further, source))
                as_text.write(_text_lines(content))
        counts.jsonl_bytes, counts.txt_bytes = lines.stat().st_size, plain.stat().st_size
        _check_documents(source, counts.documents)
        write_json(report, asdict(counts))
    return counts


def _batches(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield for every record batch its documents, its sources as `source_names` returns them, and its further columns.

    The further columns are a `pyarrow.RecordBatch`, or None if the shard has none. Raises UserError if a document is
    null or not valid UTF-8, or if further columns have no form in JSON.
    """
    with open_stream(path) as reader:
        column = column_index(reader, "text", path)
        further = further_columns(reader.schema, path)
        for batch in reader:
            texts = batch.column(column).cast(pa.large_string())
            if texts.null_count:
                raise UserError(f"{path}: a document is null; every one must be a string. Make the shard again")
            try:
                texts.validate(full=True)
            except pa.ArrowInvalid as error:
                raise UserError(f"{path}: a document is not UTF-8 ({error}). Make the shard again") from error
            if len(texts):
                yield texts, source_names(batch), batch.select(further) if further else None


def _measured(texts: Any, sources: Any) -> ExportCounts:
    columns = {"characters": pc.utf8_length(texts), "bytes": pc.binary_length(texts)}
    found = ExportCounts(len(texts), *(pc.sum(values).as_py() for values in columns.values()))
    if sources is not None:
        names, codes = sources
        sums = {"documents": np.bincount(codes)}
        sums |= {name: np.bincount(codes, values.to_numpy(zero_copy_only=False)) for name, values in columns.items()}
        for place, source in enumerate(names):
            found.sources[source] = {name: int(values[place]) for name, values in sums.items()}
    return found


def _joined(texts: Any) -> bytes:
    """The documents of an array as one string, with a separator between any two."""
    whole = pa.LargeListArray.from_arrays(pa.array([0, len(texts)], pa.int64()), texts.cast(pa.large_binary()))
    joined: bytes = pc.binary_join(whole, pa.scalar(_BORDER, pa.large_binary()))[0].as_py()
    return joined


def _json_lines(content: bytes) -> bytes:
    """One `{"text": …}` per line, escaped as Python's json does it without ensure_ascii."""
    for character, escape in _ESCAPES.items():
        content = content.replace(character, escape)
    if (np.frombuffer(content, np.uint8) < ord(" ")).any():
        content = _CONTROL.sub(lambda found: b"\\u%04x" % found[0][0], content)
    return b'{"text": "' + content.replace(_BORDER, b'"}\n{"text": "') + b'"}\n'


def _extended(lines: bytes, further: Any, path: Path) -> bytes:
    """The lines of JSON with the further columns of each document appended to its object."""
    rows = zip(lines.split(b"\n"), json_rows(further, path), strict=False)
    return b"".join(line[:-1] + b", " + row[1:] + b"\n" for line, row in rows)


def _text_lines(content: bytes) -> bytes:
    """One document per line; line ends within a document become spaces."""
    for line_end in (b"\r\n", b"\r", b"\n"):
        content = content.replace(line_end, b" ")
    return content.replace(_BORDER, b"\n") + b"\n"


def _check_documents(source: Path, documents: int) -> None:
    beside = source.with_suffix(".json")
    if not beside.is_file():
        return
    try:
        expected = json.loads(beside.read_text(encoding="utf-8"))["documents"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside} does not hold the counts of a shard ({error!r}); make the shard again") from error
    if documents != expected:
        raise UserError(f"{source} has {documents} documents, {beside.name} says {expected}; make the shard again")


def read_parts(folder: Path, shards: int) -> list[tuple[Path, ExportCounts]]:
    """The (prefix, counts) of every shard, in order.

    Raises InputsMissing if a file is absent, and UserError if a file's size differs from its counts or there are
    further shards.
    """
    if shards < 1:
        raise UserError(f"--shards {shards}: must be 1 or more")
    prefixes = [folder / f"shard-{shard:05d}" for shard in range(shards)]
    if missing := [path.name for prefix in prefixes for path in outputs(prefix) if not path.is_file()]:
        raise InputsMissing(f"{folder} lacks {len(missing)} files of {shards} shards, the first is {missing[0]}")
    if foreign := sorted({path.stem for path in folder.glob("shard-*")} - {prefix.name for prefix in prefixes}):
        raise UserError(
            f"{folder} holds {foreign[0]} although --shards is {shards}: it is of another run; remove the folder"
        )
    parts = [(prefix, read_counts(Path(f"{prefix}.json"))) for prefix in prefixes]
    for prefix, counts in parts:
        for suffix in FORMATS:
            path = Path(f"{prefix}.{suffix}")
            if (size := path.stat().st_size) != (expected := getattr(counts, f"{suffix}_bytes")):
                raise UserError(f"{path} has {size} bytes, its counts say {expected}; export the shard again")
    return parts


def read_counts(path: Path) -> ExportCounts:
    """The counts of one exported shard. Raises UserError if they are not understood or do not add up."""
    try:
        counts = ExportCounts(**json.loads(path.read_text(encoding="utf-8")))
        sums = [sum(entry[name] for entry in counts.sources.values()) for name in ("documents", "characters", "bytes")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the counts of an exported shard ({error!r}); export it again") from error
    if counts.sources and sums != [counts.documents, counts.characters, counts.bytes]:
        raise UserError(f"{path}: the counts of the sources do not add up to the shard's; export it again")
    return counts


def join(folder: Path, shards: int, output: Path) -> ExportCounts:
    """Write `output`.jsonl and `output`.txt from the files of all shards, and the sums of their counts, `output`.json.

    Raises UserError if the joined files do not have as many bytes or lines as the sums say.
    """
    parts = read_parts(folder, shards)
    counts = ExportCounts()
    for _, part in parts:
        counts.add(part)
    with publishing(*outputs(output)) as (lines, plain, report):
        for suffix, target in zip(FORMATS, (lines, plain), strict=True):
            concatenate([Path(f"{prefix}.{suffix}") for prefix, _ in parts], target)
            found = target.stat().st_size, _count_lines(target)
            expected = getattr(counts, f"{suffix}_bytes"), counts.documents
            if found != expected:
                raise UserError(
                    f"{folder}: joined, the .{suffix} parts have {found[0]} bytes and {found[1]} lines, their counts "
                    f"say {expected[0]} and {expected[1]}. They changed or are damaged: export the shards again"
                )
        write_json(report, asdict(counts))
    return counts


def concatenate(parts: Sequence[Path], target: Path) -> None:
    """Write the content of some files, one after another, into one file."""
    with target.open("wb") as sink:
        for part in parts:
            append_file(sink, part)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))


def main() -> None:
    """python -m snakmodel.export_text shard --input RUN/dedup/kept/shard-00003.arrow --output TEXT/shard-00003

    Or `join --input RUN/text/shards --shards S --output RUN/text/corpus`. Prints the counts.
    """
    parser = argparse.ArgumentParser(prog="snakmodel.export_text", description="Arrow shards -> jsonl and txt")
    steps = parser.add_subparsers(dest="step", required=True)
    shard = steps.add_parser("shard", help="one Arrow shard -> jsonl and txt")
    shard.add_argument("--input", type=Path, required=True, help="the Arrow shard")
    joined = steps.add_parser("join", help="the pairs of all shards -> one pair")
    joined.add_argument("--input", type=Path, required=True, help="the folder of the pairs")
    joined.add_argument("--shards", type=int, required=True, help="number of shards")
    for step in (shard, joined):
        step.add_argument("--output", type=Path, required=True, help="output path without suffix")
    args = parser.parse_args()
    joining = args.step == "join"
    counts = join(args.input, args.shards, args.output) if joining else export_shard(args.input, args.output)
    print(json.dumps(asdict(counts), ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
