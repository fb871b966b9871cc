"""Printing that copes with a full disk, a reader that has gone or odd names, where a plain print ends the program."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def print_whatever_the_encoding() -> None:
    """Print names of files that are not UTF-8 as they are, and characters that the terminal lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def say(text: str, *, error: bool = False) -> None:
    """Print a line (on stderr if it is an error), and go on if it cannot be printed.

    It is meant for code that a full disk or a reader that has gone must not end: the driver, and whatever has to be
    done before an exit.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        drop(stream)
    except RuntimeError:  # in a signal handler that interrupted another print
        return


def settle() -> None:
    """Flush both streams, and drop what cannot be printed.

    Otherwise the interpreter would fail to flush it at the end, and exit with 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            drop(stream)


def drop(stream: TextIO) -> None:
    """Send what a stream still holds, and everything that is printed to it later, to /dev/null."""
    with suppress(OSError, ValueError):  # a stream without a descriptor, or one that is closed
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def printable(text: str) -> str:
    """A file's name as valid Unicode: a byte of it that is not UTF-8 becomes `\\xNN`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
