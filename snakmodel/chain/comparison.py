"""Finds out whether the text that the shards of a run were made from is still in the raw files.

Digests of the raw files are compared where a shard's done marker has them, and the documents themselves where it has
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.config.recipe import Data
from snakmodel.prepare.digests import part_digest
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.kept_columns import names_only
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, batches
from snakmodel.run.markers import READ, Marker, marker_path
from snakmodel.run.paths import shard_name
from snakmodel.shards.arrow_stream import open_stream
from snakmodel.shards.progress import progress

_THREADS = 8


@dataclass(frozen=True)
class Result:
    """The digest of a part of a raw file when its shard was made, and the digest now."""

    part: FilePart
    read: str | None
    """The digest of what the part's shard was made from; None if it is not known."""
    now: str
    in_marker: bool = True
    """Whether `read` comes from the shard's done marker, so that it need not be remembered elsewhere."""


class Comparison:
    """Compares what the shards have read of their files with what the files hold now."""

    def __init__(self, root: Path, data: Data, *, trust_old_markers: bool) -> None:
        """`trust_old_markers`: take files that are no newer than a marker without digests as unchanged."""
        self.root = root
        self.reading = Reading(data.document, data.errors, data.key, keep=names_only(data.keep))
        self.cleaning = Cleaning(data.clean.trim, data.clean.nfc, data.clean.min_characters)
        self.trusts_old_markers = trust_old_markers

    def of_all(
        self, wanted: Mapping[int, Sequence[FilePart]], shards: Sequence[Sequence[FilePart]]
    ) -> Iterator[Result]:
        """Compare the parts in `wanted` (index of a shard -> parts of that shard), and yield a result for each.

        `shards` holds all parts of every shard. Shards about which nothing can or need be said yield no results.
        """
        total = sum(part.end - part.start for parts in wanted.values() for part in parts)
        with ThreadPoolExecutor(_THREADS) as pool, progress("comparing input files", total, "bytes") as advance:
            found = pool.map(lambda index: self._of(index, shards[index], wanted[index]), wanted)
            for parts, results in zip(wanted.values(), found, strict=True):
                yield from results
                advance(sum(part.end - part.start for part in parts))

    def _of(self, index: int, parts: Sequence[FilePart], wanted: Sequence[FilePart]) -> list[Result]:
        """Compare some parts of one shard.

        The list is empty if nothing was made from the shard yet, or if it was made from other parts: then its key has
        changed already.
        """
        marker = Marker.read(self._marker(index))
        if marker is None:
            return [Result(part, None, self._digest(part)) for part in wanted] if self._used(index) else []
        read = marker.counts.get(READ)
        if read is None:
            return self._of_old_form(index, parts, wanted)
        if [one[:2] for one in read] != [[part.start, part.end] for part in parts]:
            return []
        digests = {part: str(one[2]) for part, one in zip(parts, read, strict=True)}
        return [Result(part, digests[part], self._digest(part)) for part in wanted]

    def _of_old_form(self, index: int, parts: Sequence[FilePart], wanted: Sequence[FilePart]) -> list[Result]:
        made = self._marker(index).stat().st_mtime_ns
        if self.trusts_old_markers and all(Path(part.file).stat().st_mtime_ns <= made for part in parts):
            return []
        same = self._same_documents(index, parts)
        found = [(part, self._digest(part)) for part in wanted]
        return [Result(part, now if same else None, now, in_marker=False) for part, now in found]

    def _same_documents(self, index: int, parts: Sequence[FilePart]) -> bool:
        """Whether the parts of a shard, when they are read again, give exactly the documents in its Arrow file."""
        try:
            with open_stream(self.root / "arrow" / f"{shard_name(index)}.arrow") as stored:
                found = batches(parts, self.reading, self.cleaning)
                now = (batch for batch, _ in found if batch.num_rows)
                return all(a is not None and b is not None and a.equals(b) for a, b in zip_longest(now, stored))
        except UserError:
            return False

    def _marker(self, index: int) -> Path:
        return marker_path(self.root, "prepare", index)

    def _used(self, index: int) -> bool:
        """Whether a later stage has used the shard, which shows that it existed even if its own marker was lost."""
        stages = (("dedup-signatures", index), ("dedup-filter", index), ("dedup-components", 0))
        return any(marker_path(self.root, *one).exists() for one in stages)

    def _digest(self, part: FilePart) -> str:
        try:
            return part_digest(part, self.reading)
        except (OSError, ValueError) as error:  # also what pyarrow raises; `prepare` will name the fault
            return f"unreadable: {type(error).__name__}"
