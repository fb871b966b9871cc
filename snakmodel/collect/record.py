"""The record of a collected source: its entry in the file of sources, what was downloaded, and what was made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from snakmodel.collect.parts import sha256
from snakmodel.collect.places import COLLECTED, Place

Record = dict[str, Any]
"""The keys are `name`, `source` (the entry), `collected` (in UTC), `downloads`, `outputs`, `documents`, `left_out`.

A download has `file`, `url` (null if the file was put in place by hand), `bytes`, `sha256`, `etag`, `last_modified` and
`retrieved` (UTC). An output has `file`, below the data folder, `bytes`, `sha256` and `documents`.
"""


def records(data: Path) -> list[Record]:
    """The records of all sources that were collected into a data folder, by name.

    Raises UserError if one cannot be read.
    """
    found = [read_record(path) for path in sorted((data / COLLECTED).glob("[!.]*.json"))]
    return [record for record in found if record is not None]


def read_record(path: Path) -> Record | None:
    """The record in a file; None if there is no such file. Raises UserError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        assert {"name", "source", "collected", "downloads", "outputs", "documents", "left_out"} <= set(found)
    except FileNotFoundError:
        return None
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: is no record of a source. Delete it, and fetch the source again") from error
    return found


def verifies(record: Record, data: Path, alive: Callable[[], None] = lambda: None) -> bool:
    """Whether all files of the record are there with the right content, which is read. `alive` is called meanwhile."""
    return has_files(record, data) and all(
        sha256(data / one["file"], alive) == one["sha256"] for one in record["outputs"]
    )


def has_files(record: Record, data: Path) -> bool:
    """Whether all files of the record are there with the right sizes."""
    paths = ((data / one["file"], one["bytes"]) for one in record["outputs"])
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def strangers(place: Place, *known: Record | None) -> list[str]:
    """The files in the source's folder that none of the records knows."""
    names = {one["file"] for record in known if record for one in record["outputs"]}
    found = (path.relative_to(place.data).as_posix() for path in sorted(place.folder.rglob("*")) if not path.is_dir())
    return [name for name in found if name not in names]
