"""Finds the lines of one range of the key space that occur often enough in all shards together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.lines.key_file import SUFFIX, Run, about, merged, read, write
from snakmodel.dedup.signature_file import numbered


def frequent(folder: Path, shards: int, part: int, minimum: int, output: Path) -> dict[str, Any]:
    """Write the keys that occur at least `minimum` times, `output`.lines, and what they are, `output`.json.

    Holds about HELD records in memory, however large the shards are. Raises InputsMissing if a shard is absent,
    UserError if the files have no such range or are of different runs.
    """
    if minimum < 2:
        raise UserError(f"--min {minimum}: must be 2 or more, or every line would be frequent")
    paths = numbered(folder, "shard", SUFFIX, shards, "--shards")
    runs, ranges = [], 0
    for path in paths:
        found = about(path, "count")
        ranges = ranges or found["ranges"]
        if found["ranges"] != ranges:
            raise UserError(
                f"{paths[0]} has {ranges} ranges and {path} {found['ranges']}; run dedup lines count again for all "
                "shards with the same --ranges"
            )
        if not 0 <= part < ranges:
            raise UserError(f"--range {part}: the files in {folder} have the ranges 0 to {ranges - 1}")
        runs.append(Run(partial(read, path), found["starts"][part], found["starts"][part + 1]))
    distinct = records = lines = 0
    with publishing(Path(f"{output}{SUFFIX}"), Path(f"{output}.json")) as (kept, report):
        with kept.open("wb") as file:
            for block in merged(runs):
                often = block[block["count"] >= minimum]
                write(file, often)
                distinct += len(block)
                records += len(often)
                lines += int(often["count"].sum())
        counts = {
            "step": "frequent",
            "range": part,
            "ranges": ranges,
            "minimum": minimum,
            "distinct": distinct,
            "records": records,
            "lines": lines,
        }
        write_json(report, counts)
    return counts
