"""How the engine publishes: write beside, fsync, check the claim, rename. Its errors and their exit codes."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import xxhash

from megatron_llm.signals import drop

EXIT_USER_ERROR = 2
EXIT_INPUTS_MISSING = 3
EXIT_NO_ROOM = 74
"""The disk is full: the launcher runs me again, though not for ever."""
EXIT_AGAIN = 75
"""State saved, run me again."""
EXIT_STOPPED = 76
"""State saved, stopped on request: do not run me again."""
CLAIM = "SNAKMODEL_CLAIM"
"""Names the launcher's claim file; not set by hand."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FOR_A_PERSON = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors of the system that running again does not cure."""
_LEAST_BYTES = 1 << 20
"""A disk that has less than this left is full."""


class UserError(Exception):
    """A person's mistake; the message says what was found, what is valid and what to do."""


class InputsMissing(UserError):
    """A file that the command reads is not there or not whole."""


class NoRoom(UserError):
    """The disk is full."""


class Superseded(Exception):
    """Another attempt holds the claim file: this one must not publish."""


class SaveFailed(Exception):
    """A checkpoint could not be written, for a reason that may be gone when the run is started again."""


class OutputLost(Exception):
    """Nothing can be printed or recorded any more, for a reason that may be gone when the run is started again."""


TOLD = (UserError, Superseded, SaveFailed, OutputLost)
"""What ranks tell each other, and a person in one line."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point; a UserError becomes one line on stderr and exit code 2 (3 for missing inputs).

    Of several ranks, which find a mistake alike, only the first prints it. The exit code is the right one even if
    nothing can be printed any more.
    """
    code, text, alike = 1, "", False
    try:
        code = main() or 0
        if code == 0 and sys.stdout:  # None where the descriptor was closed before the start
            sys.stdout.flush()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        text = leaving.code if isinstance(leaving.code, str) else ""
    except UserError as error:
        text, alike = f"error: {error}", True
        code = exit_code_of(error)
    except Superseded as error:
        text, alike = f"superseded: {error}", True
    except Exception as error:
        if not isinstance(error, BrokenPipeError):  # as in `plan.py | head`: the reader has seen enough
            text = traceback.format_exc()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            code = EXIT_NO_ROOM
    if text and (not alike or os.environ.get("RANK", "0") == "0"):
        with suppress(OSError):
            print(text.rstrip("\n"), file=sys.stderr, flush=True)
    _settle()
    sys.exit(code)


def exit_code_of(error: UserError) -> int:
    """Exit code for an error that a user has to mend."""
    if isinstance(error, NoRoom):
        return EXIT_NO_ROOM
    return EXIT_INPUTS_MISSING if isinstance(error, InputsMissing) else EXIT_USER_ERROR


def kind_of(error: OSError) -> type[UserError] | None:
    """The error that this one of the system's is for a user, or None where running again may cure it."""
    if error.errno in NO_ROOM:
        return NoRoom
    return UserError if error.errno in FOR_A_PERSON else None


def _settle() -> None:
    """Let what cannot be printed go nowhere; else the interpreter fails to flush it, and exits with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            drop(stream)


def check_outputs(lost: tuple[str, OSError] | None) -> None:
    """Raise UserError or OutputLost if there is an output that could not be written; see signals.StopRequest."""
    if lost is None:
        return
    name, error = lost
    kind = kind_of(error) or OutputLost
    raise kind(
        f"{name} cannot be written ({error.strerror or error}), so the run ends here; what was trained is saved. Make "
        "room, or let the output go elsewhere, and run the same command again"
    )


def attempt_name() -> str:
    """The launcher's name for this attempt, or the process number by hand."""
    return os.environ.get("SNAKMODEL_ATTEMPT") or f"pid{os.getpid()}"


def check_claim() -> None:
    """Raise Superseded when the launcher's claim file names another attempt; without a launcher do nothing."""
    path = os.environ.get(CLAIM)
    if path:
        holder = json.loads(Path(path).read_text())["attempt"]
        if holder != attempt_name():
            raise Superseded(f"attempt {attempt_name()} gave way to {holder}; nothing published")


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Space left to this user on a folder's file system; the folder, or one above it, exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def remove(path: Path) -> None:
    """Delete a file or folder if present."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename(temporary: Path, final: Path) -> None:
    """Fsync `temporary` (a file or a whole folder), check the claim, and put it in the place of `final`."""
    fsync_all(temporary)
    put(temporary, final)


def fsync_all(path: Path) -> None:
    """Flush a file, or a folder with all that it holds, to disk."""
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        fsync(part)


def put(temporary: Path, final: Path) -> None:
    """Check the claim and put what is on disk already in the place of `final`, which a folder leaves first."""
    check_claim()
    aside = final.with_name(f".{final.name}.old-{attempt_name()}")
    if final.is_dir():
        final.rename(aside)
    temporary.replace(final)
    fsync(final.parent)
    remove(aside)


@contextmanager
def publishing(*finals: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path beside each final path; rename all when the body succeeds, remove all when it raises.

    Raises NoRoom when the disk is full.
    """
    temporaries = tuple(final.with_name(f".{final.name}.tmp-{attempt_name()}") for final in finals)
    for final, temporary in zip(finals, temporaries, strict=True):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        if os.environ.get(CLAIM):  # then nobody else may be at work: the rest is of killed attempts
            name = glob.escape(final.name)
            for stale in [*final.parent.glob(f".{name}.tmp-*"), *final.parent.glob(f".{name}.old-*")]:
                remove(stale)
    try:
        yield temporaries
        for temporary, final in zip(temporaries, finals, strict=True):
            rename(temporary, final)
    except Exception as error:
        if _is_full(error, finals[0].parent):
            names = ", ".join(final.name for final in finals)
            raise NoRoom(
                f"{finals[0].parent}: no room for {names}. Nothing was published. Free some space there (or ask for "
                "more), then run this again"
            ) from error
        raise
    finally:
        for temporary in temporaries:
            remove(temporary)


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for want of room. NumPy, torch and safetensors have errors of their own for that."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM or (error.errno is None and "requested and" in str(error))
    return not isinstance(error, (UserError, Superseded)) and free_bytes(folder) < _LEAST_BYTES


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically."""
    with publishing(path) as (temporary,):
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # as JSON spells names that are not UTF-8


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


def write_json(path: Path, value: object) -> None:
    """Replace a small JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
