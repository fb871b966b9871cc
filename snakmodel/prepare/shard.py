"""Makes one shard: its planned parts are read, cleaned, and written with a digest of what was read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_json
from snakmodel.prepare.digests import part_digest
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, Columns, ShardCounts, write_shard
from snakmodel.run.markers import READ


def read_shard(plan: Path, shard: int) -> list[FilePart]:
    """The parts of one shard in a `shards.json`. Raises InputsMissing if there is none, UserError if it is unfit."""
    if not plan.is_file():
        raise InputsMissing(f"{plan} does not exist; the launcher writes it when it plans the run")
    try:
        shards = [
            [FilePart(**part) for part in parts] for parts in json.loads(plan.read_text(encoding="utf-8"))["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{plan} is not a shard plan ({error}); plan the run again") from error
    if not 0 <= shard < len(shards):
        raise UserError(f"--shard {shard}: {plan} has the shards 0 to {len(shards) - 1}")
    return shards[shard]


def prepare(
    parts: Sequence[FilePart], output: Path, reading: Reading, cleaning: Cleaning, columns: Columns | None = None
) -> ShardCounts:
    """Write `output`.arrow and its counts `output`.json, with a digest of what was read of each part.

    With `columns`, the shard has these beside `text` and `source`. A thread makes the digests while the parts are read,
    so that nothing is fetched from disk twice. Raises UserError if a file changes meanwhile.
    """
    before = _versions(parts)
    with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
        with ThreadPoolExecutor(1) as beside:
            digests = beside.submit(lambda: [part_digest(part, reading) for part in parts])
            counts = write_shard(parts, arrow, reading, cleaning, columns)
            read = [[part.start, part.end, digest] for part, digest in zip(parts, digests.result(), strict=True)]
        if changed := [name for name, version in _versions(parts).items() if version != before[name]]:
            raise UserError(f"{changed[0]} was changed while it was read; leave it alone and run this again")
        write_json(report, {**asdict(counts), READ: read})
    return counts


def _versions(parts: Sequence[FilePart]) -> dict[str, tuple[int, int]]:
    """The size and modification time (in ns) of the files that exist."""
    found = {part.file: Path(part.file).stat() for part in parts if Path(part.file).exists()}
    return {name: (one.st_size, one.st_mtime_ns) for name, one in found.items()}
