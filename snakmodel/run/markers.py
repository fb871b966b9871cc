"""Done markers: the record that a task leaves when all its ranks have exited with 0.

Only a marker that exists and verifies means that a task is done.
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
"""Key in a marker's counts for the digests of what the task has read of files from outside the run. For a shard, the
value is [start, end, digest] of each of its parts, in order; for a task that reads whole files, a file's name ->
digest."""


def files_of(path: Path) -> list[Path]:
    """The files of an output: the file itself, or all files below a folder in the order of their names."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@dataclass(frozen=True)
class Marker:
    """What a finished task left: its key, the size and checksum of each output file, and its counts."""

    key: str
    outputs: dict[str, tuple[int, str]]
    """Maps the path of an output, relative to the run's folder, to (bytes, xxh3-128)."""
    counts: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    """A digest of what the task does and of the bytes that it read; empty in markers of earlier versions."""

    @classmethod
    def of(cls, root: Path, key: str, outputs: Sequence[str], counts_file: str | None = None) -> Marker:
        """Make a marker: read and digest the outputs (paths relative to `root`; folders are taken file by file).

        `counts_file` is an output that holds a JSON object, which the marker repeats. Raises OSError if an output is
        missing, ValueError if the counts are not JSON.
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
        """The marker in a file, or None if there is no file or it cannot be understood."""
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
        """The outputs that are named in `only` or lie in a folder that is; all outputs if `only` is empty."""
        if not only:
            return self.outputs
        wanted = {name for name in self.outputs if any(name == one or name.startswith(f"{one}/") for one in only)}
        return {name: self.outputs[name] for name in wanted}

    def problem(self, root: Path, *, full: bool, only: Sequence[str] = ()) -> str | None:
        """What is wrong with the outputs on disk, or None.

        `full` reads the outputs and compares their checksums; `only` names the outputs to look at (empty: all).
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
    """None if there is no readable marker."""
    problem: str | None
    """Why the task does not count as done, or None if it does."""


def marker_path(root: Path, stage: str, index: int) -> Path:
    """The path of a task's done marker in a run's folder."""
    return root / "markers" / stage / f"{index:05d}.json"


def judge(path: Path, root: Path, key: str, *, full: bool = False, only: Sequence[str] = ()) -> Verdict:
    """Whether the task whose marker lies at `path` is done, by its key and by the existence and sizes of its outputs.

    With `full`, their checksums are compared too. `only` names the outputs to look at; all if it is empty.
    """
    marker = Marker.read(path)
    if marker is None:
        return Verdict(None, f"{path} cannot be read" if path.exists() else "no marker")
    if marker.key != key:
        return Verdict(marker, f"{path} is of another command or other inputs")
    return Verdict(marker, marker.problem(root, full=full, only=only))
