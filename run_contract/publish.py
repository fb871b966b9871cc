"""Publishing: outputs are written beside their final names, forced to disk and renamed, if the claim still holds.

A command that is killed at any instant leaves either nothing or whole outputs under their final names.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from run_contract.claim import CLAIM_VARIABLE, attempt_name, check_claim
from run_contract.errors import NO_ROOM, NoRoom, Superseded, UserError

_LEAST_BYTES = 1 << 20
"""Number of bytes; a disk with less than this left counts as full."""


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(path: Path) -> None:
    """Force a file, or a folder with everything that it holds, to disk."""
    for part in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        fsync(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put(temporary: Path, final: Path) -> None:
    """Check the claim and rename `temporary`, which is on disk already, to `final`.

    A folder that exists under the final name is moved aside first and removed afterwards.
    """
    check_claim()
    aside = final.with_name(f".{final.name}.old-{attempt_name()}")
    if final.is_dir():
        remove(aside)
        final.rename(aside)
    temporary.replace(final)
    fsync(final.parent)
    remove(aside)


def rename(temporary: Path, final: Path) -> None:
    """Force `temporary`, a file or a whole folder, to disk, check the claim, and rename it to `final`."""
    fsync_all(temporary)
    put(temporary, final)


@contextmanager
def publishing(*finals: Path) -> Iterator[tuple[Path, ...]]:
    """Yield one temporary path beside each final one; on success, force them to disk and rename them in order.

    The body creates each temporary path as a file or a folder. If it raises, the temporary paths are removed and
    nothing is published. A folder that exists under the final name is moved aside first and removed afterwards. Raises
    NoRoom when the disk is full, and Superseded when another attempt holds the claim.
    """
    temporaries = tuple(final.with_name(f".{final.name}.tmp-{attempt_name()}") for final in finals)
    try:
        for temporary, final in zip(temporaries, finals, strict=True):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            for stale in _leftovers(final) if CLAIM_VARIABLE in os.environ else [temporary]:
                remove(stale)
        yield temporaries
        for temporary in temporaries:
            fsync_all(temporary)
        check_claim()
        for temporary, final in zip(temporaries, finals, strict=True):
            put(temporary, final)
    except Exception as error:
        if not _is_full(error, finals[0].parent):
            raise
        names = ", ".join(final.name for final in finals)
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "the disk is full"
        raise NoRoom(
            f"{finals[0].parent}: no room for {names} ({reason}). Nothing was published. Free some space there (or ask "
            "for more), then run this again"
        ) from error
    finally:
        for temporary in temporaries:
            remove(temporary)


def _leftovers(final: Path) -> list[Path]:
    """What killed attempts left beside a final path; for the claim's holder only, since nobody else may be at work.

    A temporary file may itself have been written by way of a temporary one, whose name begins with two dots.
    """
    pattern = glob.escape(final.name)
    names = (f".{pattern}.tmp-*", f"..{pattern}.tmp-*", f".{pattern}.old-*")
    return [path for name in names for path in final.parent.glob(name)]


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for lack of room. NumPy, torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM or (error.errno is None and "requested and" in str(error))
    return not isinstance(error, (UserError, Superseded)) and free_bytes(folder) < _LEAST_BYTES


def free_bytes(folder: Path) -> int:
    """Bytes left to this user on the file system of a folder; if it does not exist, of its nearest parent that does."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def encoded(text: str) -> bytes:
    """The bytes of a JSON or YAML text.

    A byte of a file's name that is not UTF-8, which Python keeps as half a surrogate pair, becomes `\\uNNNN`: both
    formats read that back as the same name.
    """
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically; see `encoded` for names that are not UTF-8."""
    with publishing(path) as (temporary,):
        temporary.write_bytes(encoded(text))


def write_json(path: Path, value: object) -> None:
    """Replace a small JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_shared(path: Path, content: bytes) -> None:
    """Replace a small file that several commands may write at the same time, such as tasks that fill one folder.

    Unlike `publishing` it removes no temporary file but its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{attempt_name()}-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        rename(temporary, path)
    finally:
        remove(temporary)


def checksum(path: Path) -> str:
    """The xxh3-128 digest of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
