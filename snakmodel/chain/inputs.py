"""Keeps track of the files from outside a run, and gives what stands for their content in the keys of the run's tasks.

`inputs.json` holds each file's size, its modification time, and the fingerprint with which it was first planned. As
long as size and time are the same, nothing is read. If they changed, a digest of what each shard reads of the file is
compared with the digest that `prepare` left in the shard's done marker. If the two are equal, the file was only copied
or touched, and all keys stay; if they differ, the new digest takes the place of the fingerprint, in the keys of just
these shards.

Runs of earlier versions have no such file, and no digests in their markers. There the fingerprint of a file that is no
newer than the marker is trusted; of a newer file, the documents are compared with those in the shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_contract.errors import UserError
from run_contract.publish import checksum, write_json
from snakmodel.chain.stage import fingerprint
from snakmodel.config.recipe import Data
from snakmodel.prepare.input_files import FilePart, Selection, relative
from snakmodel.run.paths import RunPaths

if TYPE_CHECKING:
    from snakmodel.chain.comparison import Result

_WHOLE = "whole"
_SMALL = 1 << 26
"""The size, in bytes, up to which the launcher digests a file itself: tokenizers, and the small files of a model."""

Token = list[Any]
"""What stands for the content of a file, or of a part of a file, in a key."""


@dataclass
class _File:
    """What is remembered about one file."""

    size: int
    mtime_ns: int
    token: Token
    """The file's fingerprint when it was first planned."""
    parts: dict[str, list[str | None]] = field(default_factory=dict)
    """Maps a byte range (or `whole`) to two digests: the one that `token` stands for (None if unknown), and the present
    one."""

    @property
    def version(self) -> tuple[int, int]:
        """Size and modification time, which change when the file does."""
        return self.size, self.mtime_ns

    def token_of(self, place: str, name: str) -> Token:
        """What stands for a part in a key: the first fingerprint, as long as the part's content is the same."""
        first, now = self.parts.get(place, (None, None))
        return self.token if first == now else [name, now]


def _place(part: FilePart) -> str:
    return f"{part.start}-{part.end}"


class Inputs:
    """The files from outside a run, both as they are remembered and as they are now."""

    def __init__(self, root: Path, files: dict[str, _File], others: dict[str, _File], *, check: bool = False) -> None:
        self.root = root
        self.files = files
        """The files of raw text, by their names below the data folder."""
        self.others = others
        """The files of the base model and the tokenizer, by path."""
        self.check = check
        """Whether to compare the digests of all files, not only of those that look changed."""
        self.changes: list[str] = []
        """Sentences for users about files whose content differs from what was remembered."""
        self.notes: list[str] = []
        self._names: dict[str, str] = {}

    @property
    def _path(self) -> Path:
        return RunPaths(self.root).inputs

    @classmethod
    def read(cls, root: Path, *, check: bool = False) -> Inputs:
        """What `inputs.json` remembers, or nothing if it does not exist. Raises UserError if it is not understood."""
        path = RunPaths(root).inputs
        try:
            raw = json.loads(path.read_bytes()) if path.exists() else {"files": {}, "others": {}}
            files, others = ({name: _File(**one) for name, one in raw[kind].items()} for kind in ("files", "others"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not hold what is known of the input files ({error!r}). Restore it, or remove it: then "
                "files that changed since the run was planned count as changed again"
            ) from error
        return cls(root, files, others, check=check)

    def write(self, skipped: Mapping[str, Sequence[str]]) -> None:
        """Write `inputs.json`: the files as they are now, and what is not read of the data folder and why."""
        kinds = {"files": self.files, "others": self.others}
        value = {kind: {name: asdict(one) for name, one in files.items()} for kind, files in kinds.items()}
        if not self._path.exists() or json.loads(self._path.read_bytes()) != {**value, "skipped": skipped}:
            write_json(self._path, {**value, "skipped": skipped})

    def token(self, part: FilePart) -> Token:
        """What stands for the content of a part of a raw file in a key."""
        return self.files[self._names[part.file]].token_of(_place(part), Path(part.file).name)

    def look(self, found: Selection, shards: Sequence[Sequence[FilePart]], data: Data) -> None:
        """Compare the raw files with what is remembered of them, and note the changes."""
        self._names = {str(one.path): relative(found.folder, one.path) for one in found.files}
        before, self.files = self.files, {}
        touched: set[str] = set()
        for one in found.files:
            old = before.get(self._names[str(one.path)])
            if self.check or (old is None and not before) or (old and old.version != (one.size, one.mtime_ns)):
                touched.add(str(one.path))
            token, parts = (old.token, old.parts) if old else (fingerprint(one.path), {})
            self.files[self._names[str(one.path)]] = _File(one.size, one.mtime_ns, token, parts)
        wanted = {
            index: some
            for index, parts in enumerate(shards)
            if (some := [part for part in parts if part.file in touched])
        }
        if not wanted or not (self.root / "markers").is_dir():
            return
        from snakmodel.chain.comparison import Comparison  # imports pyarrow, so only when needed

        trust = not before and not self.check
        for result in Comparison(self.root, data, trust_old_markers=trust).of_all(wanted, shards):
            self._remember(result)

    def _remember(self, result: Result) -> None:
        name, place = self._names[result.part.file], _place(result.part)
        parts = self.files[name].parts
        first, last = parts.get(place, [result.read, result.read])
        if last != result.now:
            begin, end = f"{result.part.start:,}", f"{result.part.end:,}"
            self.changes.append(f"{name}: what begins in its bytes {begin} to {end} is different")
        if place in parts or first != result.now or not result.in_marker:
            parts[place] = [first, result.now]

    def whole(self, path: Path, read: str | None = None) -> Token:
        """What stands in a key for the content of a file that is not raw text.

        `read` is the digest of what a task has read of the file, if a done marker holds one. The launcher digests small
        files itself. Raises UserError if the file cannot be read.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error
        version = found.st_size, found.st_mtime_ns
        old = self.others.get(str(path))
        if old is None:
            digest = checksum(path) if found.st_size <= _SMALL else None
            old = _File(*version, fingerprint(path), {_WHOLE: [digest, digest]} if digest else {})
        elif old.version != version or self.check:
            self._compare_whole(path, old, read)
        self.others[str(path)] = replace(old, size=version[0], mtime_ns=version[1])
        return old.token_of(_WHOLE, path.name)

    def _compare_whole(self, path: Path, old: _File, read: str | None) -> None:
        first, last = old.parts.get(_WHOLE, [read, read])
        if last is None and fingerprint(path) == old.token:
            self.notes.append(f"{path}: only its size and three samples could be compared; they are as they were")
            return
        now = checksum(path)
        if now != last:
            self.changes.append(f"{path} is different")
        old.parts[_WHOLE] = [first, now]
