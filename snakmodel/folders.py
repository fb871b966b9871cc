"""What lies below a folder of raw text: each entry is a file, or is refused or passed over with the reason.

Nothing is left out without a word: links are followed, and a link that leads nowhere, a folder that cannot be listed
and anything that is neither a file nor a folder become entries of their own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HIDDEN = "hidden, as its name starts with a dot"
LOOP = "a link to a folder that it lies in"
NO_FILE = "neither a file nor a folder"

_Identity = tuple[int, int]
"""Device and inode of a folder."""


@dataclass(frozen=True)
class Entry:
    """One name in a folder, after following links."""

    path: Path
    kind: Literal["file", "folder", "skipped", "refused"]
    reason: str = ""
    """Why it is skipped or refused."""
    size: int = 0
    mtime_ns: int = 0
    identity: _Identity = (0, 0)


def entries(folder: Path, above: frozenset[_Identity] = frozenset()) -> list[Entry]:
    """What a folder holds, in name order. `above`: the folders that it lies in, and itself. Raises OSError."""
    with os.scandir(folder) as found:
        names = sorted(one.name for one in found)
    return [_entry(folder / name, above) for name in names]


def below(folder: Entry, above: frozenset[_Identity]) -> Iterator[Entry]:
    """Everything that is no folder, to any depth and in name order."""
    inside = above | {folder.identity}
    try:
        found = entries(folder.path, inside)
    except OSError as error:
        yield Entry(folder.path, "refused", f"the folder cannot be listed: {error.strerror}")
        return
    for one in found:
        yield from below(one, inside) if one.kind == "folder" else [one]


def identity(folder: Path) -> _Identity:
    """Device and inode, by which a folder is known again under another name."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _entry(path: Path, above: frozenset[_Identity]) -> Entry:
    if path.name.startswith("."):
        return Entry(path, "skipped", HIDDEN)
    try:
        found = path.stat()
    except OSError as error:
        target = f"a link to {path.readlink()}, " if path.is_symlink() else ""
        return Entry(path, "refused", f"{target}which cannot be opened: {error.strerror}".removeprefix("which "))
    if stat.S_ISREG(found.st_mode):
        return Entry(path, "file", "", found.st_size, found.st_mtime_ns)
    if not stat.S_ISDIR(found.st_mode):
        return Entry(path, "skipped", NO_FILE)
    own = found.st_dev, found.st_ino
    return Entry(path, "skipped", LOOP) if own in above else Entry(path, "folder", identity=own)
