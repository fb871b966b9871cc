"""Lists what lies below a folder of raw text: each entry is a file, or is refused or skipped with a reason.

Nothing is left out silently. Links are followed; a link that leads nowhere, a folder that cannot be listed, and
anything that is neither a file nor a folder become entries of their own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from run_contract.errors import UserError

HIDDEN = "hidden, as its name starts with a dot"
LOOP = "a link to a folder that it lies in"
NO_FILE = "neither a file nor a folder"
NAMED = 5
"""The number of names that a message gives at most."""

_Identity = tuple[int, int]
"""The device and inode of a folder."""


@dataclass(frozen=True)
class Entry:
    """One name in a folder, after links have been followed."""

    path: Path
    kind: Literal["file", "folder", "skipped", "refused"]
    reason: str = ""
    """The reason why the entry is skipped or refused."""
    size: int = 0
    mtime_ns: int = 0
    identity: _Identity = (0, 0)


def entries(folder: Path, above: frozenset[_Identity] = frozenset()) -> list[Entry]:
    """The entries of a folder, in the order of their names. Raises OSError.

    `above` holds the folders that it lies in, and the folder itself.
    """
    with os.scandir(folder) as found:
        names = sorted(one.name for one in found)
    return [_entry(folder / name, above) for name in names]


def below(folder: Entry, above: frozenset[_Identity]) -> Iterator[Entry]:
    """All entries below a folder that are not folders themselves, to any depth and in the order of their names."""
    inside = above | {folder.identity}
    try:
        found = entries(folder.path, inside)
    except OSError as error:
        yield Entry(folder.path, "refused", f"the folder cannot be listed: {error.strerror}")
        return
    for one in found:
        yield from below(one, inside) if one.kind == "folder" else [one]


def identity(folder: Path) -> _Identity:
    """The device and inode of a folder, by which it is recognised under another name."""
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


def checked_record(one: Entry) -> Entry:
    """The entry as it is, or refused if it is the record (state.json) of a dataset some of whose files are missing."""
    if one.path.name != "state.json" or one.kind != "file":
        return one
    try:
        names = [data["filename"] for data in json.loads(one.path.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return one  # not a dataset's record; beside an Arrow file, `dataset_files` refuses it
    missing = [name for name in names if not (one.path.parent / name).is_file()]
    if not missing:
        return one
    return replace(
        one, kind="refused", reason=f"it lists {len(missing)} file(s) that are not there: {shortened(missing)}"
    )


def dataset_files(path: Path) -> Iterable[str]:
    """The names of the data files of the dataset that an Arrow file belongs to.

    `datasets` leaves the results of map and filter beside them. Raises UserError if the dataset's state.json is unfit.
    """
    state = path.with_name("state.json")
    if not state.is_file():
        return () if path.name.startswith("cache-") else (path.name,)
    try:
        return {one["filename"] for one in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state} does not list the data files of a dataset ({error!r}); save the dataset again"
        ) from error


def shortened(names: Sequence[str]) -> str:
    """The first few of these names, for a message."""
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
