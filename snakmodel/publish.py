"""Write-then-rename, done markers, and the claim that keeps a superseded attempt from publishing.

A command writes its outputs to temporary names that carry its attempt, renames them, and only then is its done marker
written (by the driver, when every rank has exited 0). A marker that exists and verifies is the only thing that means
done.
"""

from __future__ import annotations

import codecs
import errno
import glob
import io
import json
import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import xxhash

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_INPUTS_MISSING = 3
EXIT_NO_ROOM = 74
"""EX_IOERR: the disk is full, so run me again, though not for ever."""
EXIT_AGAIN = 75
"""EX_TEMPFAIL: state saved, run me again."""
EXIT_STOPPED = 76
"""Saved and stopped on request: not requeued, and dependants do not run."""

CLAIM_VARIABLE = "SNAKMODEL_CLAIM"
ATTEMPT_VARIABLE = "SNAKMODEL_ATTEMPT"

READ = "read"
"""Key in a marker's counts: digests of what the task read of files from outside the run. A shard has [start, end,
digest] of each of its parts, in order; a task that reads whole files has path -> digest."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOR_A_PERSON = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Errors that trying again would not mend. Others, such as a network disk has them, are crashes and tried again."""
_COPY_AT_ONCE = 1 << 30


class UserError(Exception):
    """A person's mistake: the message names what was found, what is valid and what to do.

    Printed without a traceback.
    """


class InputsMissing(UserError):
    """An input or its marker is absent or does not verify; the command exits 3 and is not retried."""


class NoRoom(UserError):
    """The disk is full. A user has to free space, so a job is started again only as often as its retries allow."""


class Superseded(Exception):
    """A newer attempt of the same task holds the claim; this one must neither publish nor requeue."""


STOPPED = "Stopped. Type the same command again: it goes on."
"""What is said after Ctrl-C."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point; people's mistakes become one `error:` line and a non-zero exit code.

    The exit code is the right one even if nothing can be printed any more.
    """
    print_whatever_the_encoding()
    code, text = 1, ""
    try:
        code = main() or 0
        if code == 0 and sys.stdout:  # None where the descriptor was closed before the start
            sys.stdout.flush()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        text = leaving.code if isinstance(leaving.code, str) else ""
    except BrokenPipeError:  # as in `jobs/status.py | head`: the reader has seen enough
        code = 1
    except UserError as error:
        text = f"error: {error}"
        code = EXIT_NO_ROOM if isinstance(error, NoRoom) else EXIT_USER_ERROR
        code = EXIT_INPUTS_MISSING if isinstance(error, InputsMissing) else code
    except Superseded as error:
        text = f"superseded: {error}"
    except KeyboardInterrupt:
        text, code = STOPPED, 128 + signal.SIGINT
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        text = f"error: {error.filename}: {error.strerror}" if named else traceback.format_exc()
        code = EXIT_USER_ERROR if named and error.errno in _FOR_A_PERSON else 1
        code = EXIT_NO_ROOM if error.errno in _NO_ROOM else code
    except Exception:
        text = traceback.format_exc()
    if text:
        say(text.rstrip("\n"), error=True)
    _settle()
    sys.exit(code)


def print_whatever_the_encoding() -> None:
    """Let names of files that are not UTF-8 be printed as they are, and characters that a terminal lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def say(text: str, *, error: bool = False) -> None:
    """Print a line, errors to stderr, for those who must go on where nothing can be printed: a full disk or a reader
    that has gone must end neither the driver nor what has to be done before an exit."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        _drop(stream)
    except RuntimeError:  # in a signal handler that comes amid another print
        return


def _settle() -> None:
    """Let what cannot be printed go nowhere; else the interpreter fails to flush it, and exits with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Let what a stream still holds, and all that follows, go nowhere."""
    with suppress(OSError, ValueError):  # a stream without a descriptor, or one that is closed
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def attempt_name() -> str:
    """What temporary names carry: the attempt given by the driver, or this process."""
    return os.environ.get(ATTEMPT_VARIABLE) or f"pid{os.getpid()}"


def check_claim() -> None:
    """Raise Superseded if the claim file named in the environment belongs to another attempt."""
    claim = os.environ.get(CLAIM_VARIABLE)
    if not claim:
        return
    holder = json.loads(Path(claim).read_text())["attempt"]
    if holder != attempt_name():
        raise Superseded(f"attempt {attempt_name()} was replaced by {holder}; nothing published")


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def publishing(*finals: Path) -> Iterator[tuple[Path, ...]]:
    """Yield one temporary path beside each final one; on success fsync them and rename them in the order given.

    The body creates each temporary path as a file or a folder. If it raises, the temporaries are removed and nothing is
    published. A folder that stands under the final name is moved aside first and removed afterwards. Raises NoRoom when
    the disk is full.
    """
    temporaries = tuple(final.with_name(f".{final.name}.tmp-{attempt_name()}") for final in finals)
    try:
        for temporary, final in zip(temporaries, finals, strict=True):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            for stale in _leftovers(final) if CLAIM_VARIABLE in os.environ else [temporary]:
                remove(stale)
        yield temporaries
        for temporary in temporaries:
            for path in [temporary, *sorted(temporary.rglob("*"))] if temporary.is_dir() else [temporary]:
                fsync(path)
        check_claim()
        for temporary, final in zip(temporaries, finals, strict=True):
            _rename(temporary, final)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        names = ", ".join(final.name for final in finals)
        raise NoRoom(
            f"{finals[0].parent}: no room for {names} ({os.strerror(error.errno)}). Nothing was published. "
            "Free some space there (or ask for more), then run this again"
        ) from error
    finally:
        for temporary in temporaries:
            remove(temporary)


def _leftovers(final: Path) -> list[Path]:
    """What killed attempts left beside a final path. Only for the holder of the claim: nobody else may be at work."""
    pattern = glob.escape(final.name)
    return [*final.parent.glob(f".{pattern}.tmp-*"), *final.parent.glob(f".{pattern}.old-*")]


def _rename(temporary: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}.old-{attempt_name()}")
    if final.is_dir():
        remove(aside)
        final.rename(aside)
    temporary.replace(final)
    fsync(final.parent)
    remove(aside)


def append_file(sink: BinaryIO, path: Path) -> None:
    """Write a file's bytes at the end of an open one, within the file system where it can do that."""
    sink.flush()
    with path.open("rb") as source:
        with suppress(OSError):  # not on every file system, nor between two; what it leaves is copied below
            while os.copy_file_range(source.fileno(), sink.fileno(), _COPY_AT_ONCE):
                pass
        shutil.copyfileobj(source, sink, 1 << 22)


def printable(text: str) -> str:
    """A file's name as valid Unicode: a byte of it that is not UTF-8 becomes `\\xNN`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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


def files_of(path: Path) -> list[Path]:
    """The files of an output: itself, or all below it in name order."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
