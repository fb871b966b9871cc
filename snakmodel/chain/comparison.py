"""Whether what the shards of a run were made from is still in the raw files: by digests, or by the documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.config.recipe import Data
from snakmodel.prepare.digests import part_digest
from snakmodel.prepare.input_files import Part
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, Counts, batches
from snakmodel.run.markers import READ, Marker, marker_path
from snakmodel.run.paths import shard_name
from snakmodel.shards.arrow_stream import open_stream
from snakmodel.shards.progress import progress

_THREADS = 8


@dataclass(frozen=True)
class Result:
    """Digests of a part."""

    part: Part
    read: str | None
    """Of what its shard was made from; None where that is not known."""
    now: str
    in_marker: bool = True
    """Whether the first is in the shard's done marker, and need not be remembered."""


class Comparison:
    """Finds out whether what shards have read of their files is still there."""

    def __init__(self, root: Path, data: Data, *, trust_old_markers: bool) -> None:
        """`trust_old_markers`: a marker without digests speaks for files that are no newer than itself."""
        self.root = root
        self.reading = Reading(data.document, data.errors, data.key)
        self.cleaning = Cleaning(data.clean.trim, data.clean.nfc, data.clean.min_characters)
        self.trusts_old_markers = trust_old_markers

    def of_all(self, wanted: Mapping[int, Sequence[Part]], shards: Sequence[Sequence[Part]]) -> Iterator[Result]:
        """The results of some parts: shard -> those that are wanted of it."""
        total = sum(part.end - part.start for parts in wanted.values() for part in parts)
        with ThreadPoolExecutor(_THREADS) as pool, progress("comparing input files", total, "bytes") as advance:
            found = pool.map(lambda index: self._of(index, shards[index], wanted[index]), wanted)
            for parts, results in zip(wanted.values(), found, strict=True):
                yield from results
                advance(sum(part.end - part.start for part in parts))

    def _of(self, index: int, parts: Sequence[Part], wanted: Sequence[Part]) -> list[Result]:
        """Nothing about a shard that nobody has read, or that was read as other parts: its key says so already."""
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

    def _of_old_form(self, index: int, parts: Sequence[Part], wanted: Sequence[Part]) -> list[Result]:
        made = self._marker(index).stat().st_mtime_ns
        if self.trusts_old_markers and all(Path(part.file).stat().st_mtime_ns <= made for part in parts):
            return []
        same = self._same_documents(index, parts)
        found = [(part, self._digest(part)) for part in wanted]
        return [Result(part, now if same else None, now, in_marker=False) for part, now in found]

    def _same_documents(self, index: int, parts: Sequence[Part]) -> bool:
        """Whether a shard's parts still hold its documents."""
        try:
            with open_stream(self.root / "arrow" / f"{shard_name(index)}.arrow") as stored:
                now = batches(parts, self.reading, self.cleaning, Counts())
                return all(a is not None and b is not None and a.equals(b) for a, b in zip_longest(now, stored))
        except UserError:
            return False

    def _marker(self, index: int) -> Path:
        return marker_path(self.root, "prepare", index)

    def _used(self, index: int) -> bool:
        """Whether anything was made from a shard, whose own marker may have been lost."""
        stages = (("dedup-signatures", index), ("dedup-filter", index), ("dedup-components", 0))
        return any(marker_path(self.root, *one).exists() for one in stages)

    def _digest(self, part: Part) -> str:
        try:
            return part_digest(part, self.reading)
        except (OSError, ValueError) as error:  # pyarrow's errors are among these; `prepare` names the fault
            return f"unreadable: {type(error).__name__}"
