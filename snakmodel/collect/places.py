"""The paths below a data folder: what is collected, and the hidden folder `.collected` beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

COLLECTED = ".collected"
"""The hidden folder below a data folder, which `snakmodel.prepare` does not read."""


@dataclass(frozen=True)
class Place:
    """Where everything of one source lies."""

    data: Path
    """The data folder."""
    name: str
    """The name of the source."""

    @property
    def folder(self) -> Path:
        """The folder of the source's text."""
        return self.data / self.name

    @property
    def downloads(self) -> Path:
        """The folder of the downloads, and of files that a user puts in place."""
        return self.data / COLLECTED / self.name

    @property
    def record(self) -> Path:
        """The record of what was collected."""
        return self.data / COLLECTED / f"{self.name}.json"

    @property
    def unpublished_record(self) -> Path:
        """The record while the folder of the text is renamed."""
        return self.downloads / ".record.json"

    @property
    def parts(self) -> Path:
        """The folder in which the text is made."""
        return self.downloads / ".parts"

    @property
    def progress(self) -> Path:
        """The file that says how far the conversion is."""
        return self.downloads / ".progress.json"

    @property
    def listing(self) -> Path:
        """The list of a dataset's files, as the Hub gave it."""
        return self.downloads / ".listing.json"

    @property
    def lock(self) -> Path:
        """The folder of the lock that keeps two commands from collecting the source at the same time."""
        return self.data / COLLECTED / ".locks" / self.name

    def host_lock(self, host: str) -> Path:
        """The folder of the lock that keeps several commands from downloading from a host at the same time."""
        return self.data / COLLECTED / ".hosts" / host

    def partial(self, file: str) -> Path:
        """The file of a download in progress; what the server said about it is beside it, as .json."""
        return self.downloads / ".partial" / file

    def receipt(self, file: str) -> Path:
        """What is known about a finished download."""
        return self.downloads / ".receipts" / f"{file}.json"
