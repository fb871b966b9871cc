"""Arrow shards -> one .jsonl (`{"text": …}` a line) and one .txt (a document a line), by way of a pair a shard.

`shard` writes the pair of one shard and its sizes; `join` puts the pairs together in the order of the shards.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from snakmodel.arrow import texts
from snakmodel.publish import InputsMissing, UserError, publishing, run_main, write_json

FORMATS = ("jsonl", "txt")
LINE_END = re.compile(r"\r\n|[\r\n]")
COPY_BLOCK = 1 << 22

Counts = dict[str, int]


def outputs(prefix: Path) -> tuple[Path, ...]:
    """The .jsonl, .txt and .json of a prefix."""
    return tuple(Path(f"{prefix}.{suffix}") for suffix in (*FORMATS, "json"))


def export_shard(source: Path, output: Path) -> Counts:
    """Write `output`.jsonl, `output`.txt (line ends within a document become spaces) and their counts `output`.json."""
    documents = 0
    quoted = json.JSONEncoder(ensure_ascii=False).encode
    with publishing(*outputs(output)) as (lines, plain, report):
        with lines.open("wb") as as_json, plain.open("wb") as as_text:
            for batch in texts(source):
                as_json.write("".join(f'{{"text": {quoted(text)}}}\n' for text in batch).encode())
                as_text.write("".join(LINE_END.sub(" ", text) + "\n" for text in batch).encode())
                documents += len(batch)
        counts = {"documents": documents, "jsonl_bytes": lines.stat().st_size, "txt_bytes": plain.stat().st_size}
        write_json(report, counts)
    return counts


def read_parts(folder: Path, shards: int) -> list[tuple[Path, Counts]]:
    """(prefix, counts) of every shard in order.

    Raises InputsMissing if a file is absent, UserError if one has another size than its counts say or there are more
    shards.
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
            if (size := path.stat().st_size) != counts[f"{suffix}_bytes"]:
                expected = counts[f"{suffix}_bytes"]
                raise UserError(f"{path} has {size} bytes, its counts say {expected}; export the shard again")
    return parts


def read_counts(path: Path) -> Counts:
    """The counts of one exported shard. Raises UserError if they cannot be understood."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {key: int(raw[key]) for key in ("documents", "jsonl_bytes", "txt_bytes")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the counts of an exported shard ({error!r}); export it again") from error


def join(folder: Path, shards: int, output: Path) -> Counts:
    """Write `output`.jsonl, `output`.txt and the sums of the counts, `output`.json."""
    parts = read_parts(folder, shards)
    counts = {key: sum(part[key] for _, part in parts) for key in ("documents", "jsonl_bytes", "txt_bytes")}
    with publishing(*outputs(output)) as (lines, plain, report):
        for suffix, target in zip(FORMATS, (lines, plain), strict=True):
            concatenate([Path(f"{prefix}.{suffix}") for prefix, _ in parts], target)
            if (size := target.stat().st_size) != counts[f"{suffix}_bytes"]:
                raise UserError(
                    f"{folder}: the .{suffix} parts changed while they were joined, {size} bytes; join again"
                )
        write_json(report, counts)
    return counts


def concatenate(parts: Sequence[Path], target: Path) -> None:
    """Copy files one after another into one."""
    with target.open("wb") as sink:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, COPY_BLOCK)


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
    print(json.dumps(counts))


if __name__ == "__main__":
    run_main(main)
