"""Reads the end of a log."""

from __future__ import annotations

import os
from pathlib import Path

_TAIL_BYTES = 1 << 16


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, from its last 64 KiB; if it cannot be read, a message instead."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return ["(there is no such file: the job never started, or its log was removed)"]
    except OSError as error:
        return [f"(it cannot be read: {error.strerror})"]
