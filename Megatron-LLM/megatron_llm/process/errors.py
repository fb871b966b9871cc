"""Errors of a training that ranks report to each other, beside those of run_contract."""

from __future__ import annotations

from run_contract.errors import Superseded, UserError, kind_of


class SaveFailed(Exception):
    """Raised when a checkpoint could not be written, for a reason that may be gone when the run is started again."""


class OutputLost(Exception):
    """Raised when output can no longer be written, for a reason that may be gone when the run is started again."""


REPORTED_ERRORS = (UserError, Superseded, SaveFailed, OutputLost)
"""The errors that ranks report to each other, and that a user sees as one line."""


def check_outputs(lost: tuple[str, OSError] | None) -> None:
    """Raise UserError or OutputLost if an output could not be written; see signals.StopRequest."""
    if lost is None:
        return
    name, error = lost
    kind = kind_of(error) or OutputLost
    raise kind(
        f"{name} cannot be written ({error.strerror or error}), so the run ends here; what was trained is saved. Make "
        "room, or let the output go elsewhere, and run the same command again"
    )
