"""The entry point of every command: how it begins and ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from run_contract.errors import (
    EXIT_INPUTS_MISSING,
    EXIT_NO_ROOM,
    EXIT_USER_ERROR,
    FOR_USER,
    NO_ROOM,
    Superseded,
    UserError,
    exit_code_of,
)
from run_contract.output import print_whatever_the_encoding, say, settle

STOPPED = "Stopped. Type the same command again: it goes on."
"""What is printed after Ctrl-C."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code; a user's mistake becomes one `error:` line and a non-zero exit code.

    A missing file gives exit code 3, a full disk 74, a user's mistake 2, Ctrl-C 130, and any other error 1 with a
    traceback. If the reader of the output has gone, as in `jobs/status.py | head`, the exit code is 1 and nothing is
    printed. When several ranks make the same mistake, only the first rank prints it. The exit code is right even if
    nothing can be printed.
    """
    print_whatever_the_encoding()
    code, text, alike = 1, "", False
    try:
        code = main() or 0
        if code == 0 and sys.stdout:  # None where the descriptor was closed before the start
            sys.stdout.flush()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        text = leaving.code if isinstance(leaving.code, str) else ""
    except BrokenPipeError:
        code = 1
    except UserError as error:
        text, code, alike = f"error: {error}", exit_code_of(error), True
    except Superseded as error:
        text, code, alike = f"superseded: {error}", 1, True
    except KeyboardInterrupt:
        text, code = STOPPED, 128 + signal.SIGINT
    except OSError as error:
        text, code = _of_the_system(error)
    except Exception:
        text, code = traceback.format_exc(), 1
    if text and (not alike or os.environ.get("RANK", "0") == "0"):
        say(text.rstrip("\n"), error=True)
    settle()
    sys.exit(code)


def _of_the_system(error: OSError) -> tuple[str, int]:
    """The text and the exit code for an error of the operating system that no other code has put into words."""
    named = error.filename is not None and error.strerror is not None
    text = f"error: {error.filename}: {error.strerror}" if named else traceback.format_exc()
    if error.errno in NO_ROOM:
        return text, EXIT_NO_ROOM
    if named and error.errno == errno.ENOENT:
        return text, EXIT_INPUTS_MISSING
    return text, EXIT_USER_ERROR if named and error.errno in (*FOR_USER, errno.EISDIR) else 1
