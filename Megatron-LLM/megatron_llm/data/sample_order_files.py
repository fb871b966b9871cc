"""Sample indices on disk: SPLIT-FINGERPRINT.*.npy, and last SPLIT-FINGERPRINT.json, which holds their checksums.

The fingerprint depends on everything that the arrays depend on. So an index of different data or settings is never used
by mistake, and builders that run at the same time write the same bytes under the same names. Files are replaced one
by one, by rename; a process that has mapped a file keeps the version that it opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_llm.data.indexed_dataset import disk_errors
from run_contract.errors import UserError
from run_contract.publish import checksum, publishing, write_json

VERSION = 1
Arrays = Mapping[str, NDArray[Any]]


def fingerprint(description: Mapping[str, Any]) -> str:
    """The fingerprint of an index, from JSON values that describe it."""
    text = json.dumps({"version": VERSION, **description}, sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def manifest_path(folder: Path, split: str, description: Mapping[str, Any]) -> Path:
    """The path of this index's manifest, whether it exists or not."""
    return folder / f"{split}-{fingerprint(description)}.json"


def write(manifest: Path, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Publish the arrays, then their manifest. Raises UserError when the disk is full."""
    finals = [_array_path(manifest, name) for name in arrays]
    with disk_errors(manifest), publishing(*finals, manifest) as temporaries:
        for temporary, array in zip(temporaries, arrays.values(), strict=False):
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        files = {
            name: {"bytes": temporary.stat().st_size, "xxh3_128": checksum(temporary)}
            for name, temporary in zip(arrays, temporaries, strict=False)
        }
        write_json(temporaries[-1], {"version": VERSION, **description, "files": files})


def verify(manifest: Path) -> None:
    """Compare every array's size and checksum with the manifest. Raises UserError."""
    for name, stated in _files(manifest).items():
        path = _array_path(manifest, name)
        if not path.is_file():
            raise _damaged(manifest, f"{path.name} is missing")
        found: dict[str, Any] = {"bytes": path.stat().st_size}
        if found["bytes"] == stated["bytes"]:
            found["xxh3_128"] = checksum(path)
        if found != stated:
            raise _damaged(manifest, f"{path.name} has {found}, the manifest says {stated}")


def read(manifest: Path) -> dict[str, NDArray[Any]]:
    """The arrays, memory-mapped, so that processes on a node share them. Raises UserError when one cannot be mapped."""
    arrays: dict[str, NDArray[Any]] = {}
    for name in _files(manifest):
        path = _array_path(manifest, name)
        try:
            arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(manifest, f"{path.name} cannot be read ({error})") from error
    return arrays


def _array_path(manifest: Path, name: str) -> Path:
    return manifest.with_name(f"{manifest.stem}.{name}.npy")


def _files(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(manifest.read_bytes())["files"]
        return {str(name): dict(stated) for name, stated in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(manifest, f"the manifest cannot be read ({error!r})") from error


def _damaged(manifest: Path, what: str) -> UserError:
    return UserError(
        f"the sample index {manifest} is damaged: {what}; build it again with "
        "tools/build_index.py and the data flags of the training run"
    )
