"""Raw text -> Arrow shards with the columns `text` and `source`.

Planning (on the login node) cuts the input's bytes into shards of equal size: `plan_shards` gives each shard a list of
byte ranges. A task then reads its ranges: a document belongs to the range in which its first byte lies, so the shards,
concatenated, hold the same documents in the same order however many there are. Documents end at line feeds only.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from snakmodel.arrow import SCHEMA, write_stream
from snakmodel.publish import InputsMissing, UserError, publishing, run_main, write_json

BOM = b"\xef\xbb\xbf"
BATCH_CHARACTERS = 1 << 22
BATCH_DOCUMENTS = 1 << 14
BACKWARD_BLOCK = 1 << 16
DOCUMENT_MODES = ("line", "blank-line", "file")
ERROR_POLICIES = ("error", "replace", "skip")


@dataclass(frozen=True)
class Part:
    """A byte range of one input file; `end` is exclusive."""

    file: str
    source: str
    start: int
    end: int


@dataclass
class Counts:
    """What one shard took in and left out."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents kept."""
    empty: int = 0
    """Documents of white space only, left out."""
    empty_files: int = 0
    replaced: int = 0
    """Documents in which bad bytes became U+FFFD."""
    skipped: int = 0
    """Documents left out for their bad bytes."""
    invalid: dict[str, int] = field(default_factory=dict)
    """Replaced and skipped documents by the first fault found in them."""
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> documents and bytes kept."""


def plan_shards(folder: Path, sources: Sequence[str] | None, shards: int | None, shard_bytes: int) -> list[list[Part]]:
    """Cut the `*.txt` files of a data folder into shards of about equal bytes.

    A source is a sub-folder (searched to any depth); files directly in the folder belong to the source of the folder's
    own name. `sources` selects sub-folders, that name, or single files directly in the folder (`news` or `news.txt`;
    the source is then `news`), in the order given. `shards` None means one per `shard_bytes`. Empty files stay in the
    plan as empty parts, to be counted. Raises UserError if nothing is found, a source is unknown or all is empty.
    """
    if shard_bytes < 1 or (shards is not None and shards < 1):
        raise UserError(f"shards = {shards}, shard_bytes = {shard_bytes}: both must be 1 or more")
    files = [(path, source, path.stat().st_size) for source, path in input_files(folder, sources)]
    total = sum(size for _, _, size in files)
    if total == 0:
        raise UserError(f"all {len(files)} *.txt files found in {folder} are empty; put the raw text there")
    count = min(shards or -(-total // shard_bytes), total)
    borders = [total * shard // count for shard in range(1, count + 1)]
    plan: list[list[Part]] = [[] for _ in range(count)]
    shard = done = 0
    for path, source, size in files:
        start = 0
        if size == 0:
            plan[shard].append(Part(str(path), source, 0, 0))
        while start < size:
            if done == borders[shard]:
                shard += 1
            end = min(size, start + borders[shard] - done)
            plan[shard].append(Part(str(path), source, start, end))
            done += end - start
            start = end
    return plan


def input_files(folder: Path, sources: Sequence[str] | None) -> list[tuple[str, Path]]:
    """(source, file) of each selected `*.txt` file in global order: the folder's own, then its sub-folders'."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it should hold *.txt files or one sub-folder of them per source")
    groups = _groups(folder)
    if not groups:
        raise UserError(f"no input files: looked for *.txt in {folder} and, to any depth, in its sub-folders")
    if sources is None:
        return [pair for pairs in groups.values() for pair in pairs]
    direct = {path.stem: [(path.stem, path)] for _, path in groups.get(folder.name, []) if path.parent == folder}
    groups = {**direct, **{path.name: pairs for pairs in direct.values() for _, path in pairs}, **groups}
    chosen: list[tuple[str, Path]] = []
    for name in dict.fromkeys(sources):
        if name not in groups:
            near = difflib.get_close_matches(name, groups, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown source {name!r}; {folder} has {', '.join(map(repr, groups))}{hint}")
        chosen += groups[name]
    if len({path for _, path in chosen}) < len(chosen):
        raise UserError(f"the sources {', '.join(map(repr, sources))} name the same file twice; name each text once")
    return chosen


def _groups(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Source -> its (source, file) pairs, without sources that have no files."""
    groups = {folder.name: [(folder.name, path) for path in _visible(folder, folder.glob("*.txt"))]}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        groups.setdefault(child.name, []).extend((child.name, path) for path in _visible(folder, child.rglob("*.txt")))
    return {name: pairs for name, pairs in groups.items() if pairs}


def _visible(folder: Path, paths: Iterator[Path]) -> list[Path]:
    """Files in name order, without those whose name, or a folder's on the way, starts with a dot."""

    def shown(path: Path) -> bool:
        return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(filter(shown, paths))


def raw_documents(part: Part, document: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document whose first byte lies in the part, line ends included, the BOM left out."""
    with Path(part.file).open("rb") as file:
        origin = len(BOM) if file.read(len(BOM)) == BOM else 0
        if document == "file":
            if part.start == 0 < part.end:
                yield file.seek(origin), file.read()
            return
        position = _seek_line(file, max(part.start, origin), origin)
        if document == "line":
            yield from _lines(file, position, part.end)
        else:
            within = _follows_text(file, position, origin)
            file.seek(position)
            yield from _blocks(file, position, part.end, within)


def _seek_line(file: BinaryIO, start: int, origin: int) -> int:
    """Move to the first line that begins at `start` or later, and give its offset."""
    if start == origin:
        return file.seek(origin)
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _lines(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, bytes]]:
    while position < end and (line := file.readline()):
        yield position, line
        position += len(line)


def _blocks(file: BinaryIO, position: int, end: int, within: bool) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank ones; `within`: the first lines continue a document that an earlier range owns."""
    lines: list[bytes] = []
    first = position
    while (lines or position < end) and (line := file.readline()):
        if not line.strip():
            if lines:
                yield first, b"".join(lines)
            lines, within = [], False
        elif not within:
            first = first if lines else position
            lines.append(line)
        position += len(line)
    if lines:
        yield first, b"".join(lines)


def _follows_text(file: BinaryIO, position: int, origin: int) -> bool:
    """Whether the line that ends just before `position` holds more than white space."""
    end = position - 1
    while end > origin:
        begin = max(origin, end - BACKWARD_BLOCK)
        file.seek(begin)
        _, feed, line = file.read(end - begin).rpartition(b"\n")
        if line.strip():
            return True
        if feed:
            return False
        end = begin
    return False


def documents(part: Part, document: str, errors: str, counts: Counts) -> Iterator[str]:
    """The documents of a part, decoded, CRLF made LF, without line feeds at their ends; empty ones are left out.

    Raises InputsMissing if the file is gone, UserError if it became shorter or, with errors "error", is not UTF-8.
    """
    path = Path(part.file)
    if not path.is_file():
        raise InputsMissing(f"{path} does not exist; it was there when the run was planned")
    if (size := path.stat().st_size) < part.end:
        raise UserError(f"{path} has {size} bytes, the plan expects {part.end} or more; put the planned text back")
    if size == 0:
        counts.empty_files += 1
        return
    for offset, raw in raw_documents(part, document):
        text = _decode(raw, path, offset, errors, counts)
        if text is None:
            continue
        text = text.replace("\r\n", "\n").strip("\n")
        if text and not text.isspace():
            yield text
        else:
            counts.empty += 1


def _decode(raw: bytes, path: Path, offset: int, errors: str, counts: Counts) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "error":
            raise UserError(_bad_bytes(path, offset + error.start, raw[error.start], error.reason)) from error
        counts.invalid[error.reason] = counts.invalid.get(error.reason, 0) + 1
    if errors == "skip":
        counts.skipped += 1
        return None
    counts.replaced += 1
    return raw.decode("utf-8", errors="replace")


def _bad_bytes(path: Path, offset: int, byte: int, reason: str) -> str:
    line, left = 1, offset
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 22))):
            line, left = line + block.count(b"\n"), left - len(block)
    return (
        f"{path}: byte {offset} (line {line}) is not UTF-8: {reason}, 0x{byte:02x}; convert the file (for example "
        "iconv -f latin1 -t utf-8), or set errors to replace or skip to go on without such bytes or documents"
    )


def batches(parts: Sequence[Part], document: str, errors: str, counts: Counts) -> Iterator[Any]:
    """Record batches of one source each, of bounded size; `counts` grows as they are made."""
    for part in parts:
        texts: list[str] = []
        characters = 0
        for text in documents(part, document, errors, counts):
            texts.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield _batch(texts, part.source, counts)
                texts, characters = [], 0
        if texts:
            yield _batch(texts, part.source, counts)


def _batch(texts: list[str], source: str, counts: Counts) -> Any:
    column = pa.array(texts, pa.large_string())
    size = pc.sum(pc.binary_length(column)).as_py()
    entry = counts.sources.setdefault(source, {"documents": 0, "bytes": 0})
    entry["documents"] += len(texts)
    entry["bytes"] += size
    counts.documents += len(texts)
    counts.bytes += size
    return pa.record_batch([column, pa.array([source] * len(texts), pa.string())], schema=SCHEMA)


def read_shard(plan: Path, shard: int) -> list[Part]:
    """The parts of one shard of a `shards.json`. Raises InputsMissing or UserError."""
    if not plan.is_file():
        raise InputsMissing(f"{plan} does not exist; the launcher writes it when it plans the run")
    try:
        shards = [[Part(**part) for part in parts] for parts in json.loads(plan.read_text(encoding="utf-8"))["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{plan} is not a shard plan ({error}); plan the run again") from error
    if not 0 <= shard < len(shards):
        raise UserError(f"--shard {shard}: {plan} has the shards 0 to {len(shards) - 1}")
    return shards[shard]


def prepare(parts: Sequence[Part], output: Path, document: str, errors: str) -> Counts:
    """Write `output`.arrow and its counts `output`.json."""
    counts = Counts()
    with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
        write_stream(arrow, SCHEMA, batches(parts, document, errors, counts))
        write_json(report, asdict(counts))
    return counts


def main() -> None:
    """python -m snakmodel.prepare --shards RUN/shards.json --shard 3 --output RUN/arrow/shard-00003

    Reads the byte ranges that the plan gives to one shard, writes `shard-00003.arrow` and its counts beside it.
    """
    parser = argparse.ArgumentParser(prog="snakmodel.prepare", description="raw text -> one Arrow shard")
    parser.add_argument("--shards", type=Path, required=True, help="the plan, shards.json")
    parser.add_argument("--shard", type=int, required=True, help="which shard of the plan, from 0")
    parser.add_argument("--output", type=Path, required=True, help="output path without .arrow")
    parser.add_argument("--document", choices=DOCUMENT_MODES, default="line", help="what one document is")
    parser.add_argument(
        "--errors", choices=ERROR_POLICIES, default="error", help="what to do with bytes that are not UTF-8"
    )
    args = parser.parse_args()
    counts = prepare(read_shard(args.shards, args.shard), args.output, args.document, args.errors)
    print(
        f"{args.output}.arrow: {counts.documents} documents, {counts.bytes} bytes, {counts.empty} empty ones left out"
    )


if __name__ == "__main__":
    run_main(main)
