"""The exit codes of every command, and the errors that lead to them."""

from __future__ import annotations

import errno

EXIT_DONE = 0
EXIT_USER_ERROR = 2
"""A user's mistake; running the command again does not help."""
EXIT_INPUTS_MISSING = 3
"""An input is missing or does not verify; the command is not retried."""
EXIT_NO_ROOM = 74
"""The disk is full (EX_IOERR); the command is run again, but only within the budget of retries."""
EXIT_AGAIN = 75
"""The state is saved, and the command has to be run again (EX_TEMPFAIL)."""
EXIT_STOPPED = 76
"""The state is saved, and the command stopped on request: it is not run again, and nothing that waits for it runs."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the operating system that mean that a disk, a quota or a file-size limit is full."""
FOR_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors of the operating system that a retry does not cure; other errors, such as those of network disks, may pass."""


class UserError(Exception):
    """A user's mistake; the message says what was found, what is valid and what to do.

    It is printed without a traceback.
    """


class InputsMissing(UserError):
    """An input or its marker is missing or does not verify."""


class NoRoom(UserError):
    """The disk is full. A user has to free space, so a job is started again only as often as its retries allow."""


class Superseded(Exception):
    """Another, newer attempt of the same task holds the claim; this one must neither publish nor ask for a requeue."""


def exit_code_of(error: UserError) -> int:
    """The exit code for an error that a user has to correct."""
    if isinstance(error, NoRoom):
        return EXIT_NO_ROOM
    return EXIT_INPUTS_MISSING if isinstance(error, InputsMissing) else EXIT_USER_ERROR


def kind_of(error: OSError) -> type[UserError] | None:
    """The class of user error that a system's error becomes, or None where running again may cure it."""
    if error.errno in NO_ROOM:
        return NoRoom
    return UserError if error.errno in FOR_USER else None
