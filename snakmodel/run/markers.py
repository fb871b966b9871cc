"""Done markers: what a task left behind when all its ranks had exited 0.

A marker that exists and verifies is the only thing that means done.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from run_contract.publish import checksum, write_json

READ = "read"
"""Key in a marker's counts: digests of what the task read of files from outside the run. A shard has [start, end,
digest] of each of its parts, in order; a task that reads whole files has path -> digest."""


def files_of(path: Path) -> list[Path]:
    """The files of an output: itself, or all below it in name order."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@dataclass(frozen=True)
class Marker:
    """What a done task left: its key, every output file with size and checksum, and the counts it reported."""

    key: str
    outputs: dict[str, tuple[int, str]]
    """Path relative to the run's folder -> (bytes, xxh3-128)."""
    counts: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    """Digest of what the task does and of the bytes that it read; empty in markers of earlier versions."""

    @classmethod
    def of(cls, root: Path, key: str, outputs: Sequence[str], counts_file: str | None = None) -> Marker:
        """Read and digest the outputs (paths relative to `root`; folders are taken file by file).

        `counts_file` is the output, a JSON object, whose content the marker repeats. Raises OSError when an output is
        missing, ValueError when the counts are not JSON.
        """
        missing = [name for name in outputs if not (root / name).exists()]
        if missing:
            raise FileNotFoundError(f"the command exited 0 but did not write {', '.join(missing)} under {root}")
        files = [path for name in outputs for path in files_of(root / name)]
        digests = {str(path.relative_to(root)): (path.stat().st_size, checksum(path)) for path in files}
        counts = json.loads((root / counts_file).read_text(encoding="utf-8")) if counts_file else {}
        return cls(key, digests, counts)

    @classmethod
    def read(cls, path: Path) -> Marker | None:
        """The marker in a file, or None if there is none or it cannot be understood."""
        try:
            raw = json.loads(path.read_bytes())
            outputs = {name: (int(size), str(digest)) for name, (size, digest) in raw["outputs"].items()}
            return cls(str(raw["key"]), outputs, dict(raw["counts"]), str(raw.get("content", "")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Publish the marker."""
        write_json(path, asdict(self))

    def chosen(self, only: Sequence[str] = ()) -> dict[str, tuple[int, str]]:
        """The outputs that are named, or lie in a folder that is; all of them where none is."""
        if not only:
            return self.outputs
        wanted = {name for name in self.outputs if any(name == one or name.startswith(f"{one}/") for one in only)}
        return {name: self.outputs[name] for name in wanted}

    def problem(self, root: Path, *, full: bool, only: Sequence[str] = ()) -> str | None:
        """What is wrong with the outputs on disk, or None.

        `full` reads and compares checksums; `only` names outputs.
        """
        for name, (size, digest) in self.chosen(only).items():
            try:
                found = os.stat(f"{root}/{name}")  # noqa: PTH116  ten thousand Path objects take longer than their stat
            except OSError:
                return f"{name} is missing"
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is missing"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes, its marker says {size}"
            if full and checksum(root / name) != digest:
                return f"{name} does not match the checksum in its marker"
        return None


@dataclass(frozen=True)
class Verdict:
    """Whether a task counts as done, and what its marker says."""

    marker: Marker | None
    """None where there is none that can be read."""
    problem: str | None
    """Why the task does not count as done, or None if it does."""


def marker_path(root: Path, stage: str, index: int) -> Path:
    """Where a task's done marker lies in a run's folder."""
    return root / "markers" / stage / f"{index:05d}.json"


def judge(path: Path, root: Path, key: str, *, full: bool = False, only: Sequence[str] = ()) -> Verdict:
    """Whether the task whose marker lies at `path` is done: key, existence and sizes, with `full` checksums too.

    `only` names the outputs that are looked at; all when empty.
    """
    marker = Marker.read(path)
    if marker is None:
        return Verdict(None, f"{path} cannot be read" if path.exists() else "no marker")
    if marker.key != key:
        return Verdict(marker, f"{path} is of another command or other inputs")
    return Verdict(marker, marker.problem(root, full=full, only=only))
