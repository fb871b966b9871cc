"""How every command begins and ends."""

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
"""What is said after Ctrl-C."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit with its code; a user's mistake becomes one `error:` line and a non-zero exit code.

    A file that is missing gives exit code 3, a full disk 74, a mistake 2, Ctrl-C 130, anything else 1 with a traceback.
    A reader of the output that has gone, as in `jobs/status.py | head`, gives 1 without a word. Of several ranks, which
    find a mistake alike, only the first prints it. The exit code is the right one even if nothing can be printed.
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
    """What is printed for an error of the system that nothing has put into words, and the exit code."""
    named = error.filename is not None and error.strerror is not None
    text = f"error: {error.filename}: {error.strerror}" if named else traceback.format_exc()
    if error.errno in NO_ROOM:
        return text, EXIT_NO_ROOM
    if named and error.errno == errno.ENOENT:
        return text, EXIT_INPUTS_MISSING
    return text, EXIT_USER_ERROR if named and error.errno in (*FOR_USER, errno.EISDIR) else 1
