"""Earlier runs, whose documents a run is deduplicated against: their signature files, and their texts if needed.

The result is that of one deduplication of all documents together, those of the earlier runs first, restricted to the
new documents. All documents of an earlier run count, also those that it removed itself: their signatures are still
there, and the clusters of all documents together do not depend on what was removed before. The signatures hold nothing
of the runs that the earlier run was itself deduplicated against; these have to be listed too if they are to count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from run_contract.errors import UserError
from snakmodel.dedup.signature_file import SignatureFile
from snakmodel.run.markers import Marker, marker_path
from snakmodel.run.paths import RunPaths, shard_name
from snakmodel.shards.arrow_stream import Rows

SIGNATURES = "dedup/signatures"
"""The folder of the signature files, relative to a run's folder."""


@dataclass(frozen=True)
class EarlierRun:
    """The opened signature files of an earlier run."""

    root: Path
    files: tuple[SignatureFile, ...]
    """The signature files of all shards, in order."""
    keys: tuple[str, ...]
    """The keys of the tasks that made them."""

    @property
    def digest(self) -> str:
        """A digest of the content of all signature files."""
        return xxhash.xxh3_128_hexdigest(" ".join(file.digest for file in self.files).encode())

    def texts(self, key: str) -> list[Rows]:
        """The Arrow shards of the run. Raises UserError if one is gone, or is not what its signatures were made from.

        `key` is the flag or the key of the recipe that names the run, for the error.
        """
        found = []
        for shard, file in enumerate(self.files):
            name = f"arrow/{shard_name(shard)}.arrow"
            marker = _marker(self.root, "prepare", shard, name)
            if isinstance(marker, str) or marker.outputs[name][1] != file.header["input"]:
                problem = marker if isinstance(marker, str) else f"{name} is not what its signatures were made from"
                raise UserError(
                    f"{key}: similarity is to be verified (verify_jaccard), which needs the texts of {self.root}, but "
                    f"{problem}. Do that run's stages prepare and dedup-signatures again, or do not verify"
                )
            found.append(Rows(self.root / name))
        return found


def open_runs(folders: Sequence[Path], signatures: Path, key: str) -> list[EarlierRun]:
    """Open the signature files of earlier runs, in the order in which their folders are given.

    `signatures` is the folder of this run's own signature files. Raises UserError, which begins with `key`, if a folder
    is no run, if its signatures are not complete, or if it is this very run or named twice.
    """
    seen: set[Path] = set()
    for folder in folders:
        place = folder.resolve()
        if place / SIGNATURES == signatures.resolve():
            raise UserError(f"{key}: {folder} is this run itself; name only other runs")
        if place in seen:
            raise UserError(f"{key}: {folder} is named twice; name each run once")
        seen.add(place)
    return [_open_run(folder, key) for folder in folders]


def _open_run(root: Path, key: str) -> EarlierRun:
    shards = _shards(root, key)
    names = [f"{SIGNATURES}/{shard_name(shard)}.sig" for shard in range(shards)]
    found = [_marker(root, "dedup-signatures", shard, name) for shard, name in enumerate(names)]
    if problems := [marker for marker in found if isinstance(marker, str)]:
        raise UserError(
            f"{key}: {root} lacks the signatures of {len(problems)} of its {shards} shards; of the first, "
            f"{problems[0]}. Finish that run's stage dedup-signatures first"
        )
    keys = tuple(marker.key for marker in found if isinstance(marker, Marker))
    return EarlierRun(root, tuple(SignatureFile.open(root / name) for name in names), keys)


def _shards(root: Path, key: str) -> int:
    """The number of shards of a run. Raises UserError if the folder is not that of a run."""
    path = RunPaths(root).shards
    try:
        return len(json.loads(path.read_bytes())["shards"])
    except OSError:
        what = f"has no {path.name}" if root.is_dir() else "is not there"
        raise UserError(
            f"{key}: {root} {what}. Give the folder of a run that has done the stage dedup-signatures, such as "
            "runs/NAME"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {path} does not say the shards of a run ({error!r}). Plan that run again") from error


def _marker(root: Path, stage: str, shard: int, output: str) -> Marker | str:
    """The done marker of a shard's task, or what is wrong with it or with the size of one of its outputs."""
    path = marker_path(root, stage, shard)
    marker = Marker.read(path)
    if marker is None or output not in marker.outputs:
        return f"there is no done marker {path.relative_to(root)}"
    return marker.problem(root, full=False, only=(output,)) or marker
