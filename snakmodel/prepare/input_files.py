"""Finds the raw files in a data folder, and cuts their bytes into shards.

A document belongs to the byte range in which it begins: a line by its first byte, and the rows of a Parquet row group
or of an Arrow record batch by the first byte of that group or batch. Planning therefore needs nothing but the sizes of
the files, and the concatenated shards hold the same documents in the same order, however many shards there are. A file
that is compressed as a whole (.gz, .zst) cannot be read from the middle, and is a single range.

Everything below the folder is read, or refused by name, or counted among the skipped files with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import xxhash

from run_contract.errors import UserError
from run_contract.output import printable
from snakmodel.prepare.folders import NAMED, Entry, below, checked_record, dataset_files, entries, identity, shortened

ALL = "all"
"""The name that stands for all sources, unless a source has this name."""
COMPRESSED = (".gz", ".zst")
TEXT = (".txt", ".danish")
"""Endings of plain text; .danish is what the published language filter writes."""
ROWS = (".jsonl", ".parquet", ".arrow")
_SUFFIXES = (*TEXT, *ROWS, *(kind + codec for kind in (*TEXT, ".jsonl") for codec in COMPRESSED))
_NEVER_EMPTY = (*COMPRESSED, ".parquet", ".arrow")
"""Endings of the formats in which a file of 0 bytes is not valid."""
_TABLES = (".parquet", ".arrow")
_UNPACKED = 3
_DESCRIPTIONS = ("readme", "license", "licence")
_HF_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class FilePart:
    """A byte range of one input file; `end` is exclusive."""

    file: str
    source: str
    start: int
    end: int
    share: float = 1.0
    """The share of the documents that is taken."""
    salt: int = 0
    """A number that decides, with a document's position, whether the document is taken if `share` is below 1."""


@dataclass(frozen=True)
class InputFile:
    """A file of a source, and the share of its documents that is taken."""

    source: str
    path: Path
    share: float
    size: int
    mtime_ns: int

    def text_bytes(self) -> int:
        """The approximate number of bytes of text that are taken. Compressed files hold some three times their size."""
        packed = self.path.name.endswith((*COMPRESSED, ".parquet"))
        return int(self.size * self.share * (_UNPACKED if packed else 1))


@dataclass(frozen=True)
class Selection:
    """The files that are read, in global order, and the names of all others below the folder."""

    folder: Path
    files: list[InputFile]
    skipped: dict[str, list[str]]
    """Maps a reason to the names below the folder that are not read for it."""

    def notes(self) -> list[str]:
        """One sentence for each reason for which files are not read."""
        return [
            f"{self.folder}: not read, as {reason}: {len(names)}: {shortened(names)}"
            for reason, names in self.skipped.items()
        ]

    def sums(self) -> str:
        """A sentence with the number and bytes of the files that are read, and the number of names that are not."""
        others = sum(map(len, self.skipped.values()))
        total = sum(one.size for one in self.files)
        left = f"{others} other(s) not" if others else "nothing else lies there"
        return f"{self.folder}: {len(self.files)} file(s) of {total:,} bytes are read, {left}"


def suffix(name: str) -> str | None:
    """The ending that says what format a file has, such as `.jsonl.gz`; None if it cannot be read."""
    return max((one for one in _SUFFIXES if name.endswith(one)), key=len, default=None)


def plan_shards(
    folder: Path,
    shares: Mapping[str, float] | None,
    shards: int | None,
    shard_bytes: int,
    seed: int = 0,
    encoding: str = "utf-8",
) -> list[list[FilePart]]:
    """Cut the files of a data folder into shards; see `selection` for which files these are, and `cut` for how."""
    return cut(selection(folder, shares), shards, shard_bytes, seed, encoding)


def cut(
    found: Selection, shards: int | None, shard_bytes: int, seed: int = 0, encoding: str = "utf-8"
) -> list[list[FilePart]]:
    """Cut files into shards of about equal bytes.

    If `shards` is None, there is one shard per `shard_bytes`. Empty files stay in the plan as empty parts, so that they
    are counted. Raises UserError if all files are empty, or a number is below 1.
    """
    if shard_bytes < 1 or (shards is not None and shards < 1):
        raise UserError(f"shards = {shards}, shard_bytes = {shard_bytes}: both must be 1 or more")
    total = sum(one.size for one in found.files)
    if total == 0:
        names = shortened([relative(found.folder, one.path) for one in found.files])
        raise UserError(
            f"all {len(found.files)} input files found in {found.folder} are empty ({names}); put the raw text there"
        )
    count = min(shards or -(-total // shard_bytes), total)
    borders = [total * shard // count for shard in range(1, count + 1)]
    plan: list[list[FilePart]] = [[] for _ in range(count)]
    shard = done = 0
    for one in found.files:
        whole = whole_part(found.folder, one, seed)
        start = 0
        if one.size == 0:
            plan[shard].append(whole)
        while start < one.size:
            while done >= borders[shard]:
                shard += 1
            last = start + borders[shard] - done if divisible(one.path, encoding) else one.size
            end = min(one.size, last)
            plan[shard].append(FilePart(whole.file, whole.source, start, end, whole.share, whole.salt))
            done += end - start
            start = end
    return [parts for parts in plan if parts]


def whole_part(folder: Path, one: InputFile, seed: int) -> FilePart:
    """The part that covers a whole file."""
    salt = _salt(seed, one.source, relative(folder, one.path)) if one.share < 1 else 0
    return FilePart(str(one.path), one.source, 0, one.size, one.share, salt)


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed as a whole, so that it cannot be cut."""
    return path.name.endswith(COMPRESSED)


def _salt(seed: int, source: str, name: str) -> int:
    return int(xxhash.xxh3_64_intdigest(f"{seed}\0{source}\0{name}".encode("utf-8", "surrogateescape")))


def relative(folder: Path, path: Path) -> str:
    """The path of a file relative to the data folder."""
    return path.relative_to(folder).as_posix()


def divisible(path: Path, encoding: str) -> bool:
    """Whether reading can begin in the middle of a file: not if it has to be unpacked or converted to UTF-8."""
    return not is_compressed(path) and (encoding == "utf-8" or path.suffix in _TABLES)


def input_files(folder: Path, shares: Mapping[str, float] | None) -> list[InputFile]:
    """The selected files in global order: those directly in the folder, then those of its sub-folders."""
    return selection(folder, shares).files


def source_names(folder: Path) -> list[str]:
    """The sources of a folder: each file directly in it counts as one here, and then each sub-folder."""
    found = selection(folder, None)
    files = [one for one in found.files if one.path.parent == found.folder]
    folders = [one.source for one in found.files if one.path.parent != found.folder]
    names = (_name(one.path) if _stem(one.path) in folders else _stem(one.path) for one in files)
    return list(dict.fromkeys([*names, *folders]))


def selection(folder: Path, shares: Mapping[str, float] | None) -> Selection:
    """The files of a data folder that are to be read.

    A source is a sub-folder, which is searched to any depth; files directly in the data folder belong to a source with
    the data folder's own name. The keys of `shares` select sub-folders, that source, or single files directly in the
    folder (`news` or `news.txt`; the source is then `news`), in the given order, and the values are the shares of their
    documents. `all` alone, or no `shares`, selects everything. Raises UserError if nothing is found, a source is
    unknown, or something that is selected cannot be read.
    """
    folder = folder.absolute()
    groups = _groups(folder)
    skipped: dict[str, list[str]] = {}
    for one in (entry for group in groups.values() for entry in group):
        if (reason := _passed_over(one)) is not None:
            skipped.setdefault(reason, []).append(relative(folder, one.path))
    wanted = {name: [one for one in group if _passed_over(one) is None] for name, group in groups.items()}
    chosen = _chosen(folder, {name: group for name, group in wanted.items() if group}, shares or {})
    taken = {one.path for _, one, _ in chosen}
    if left := [one for group in wanted.values() for one in group if one.path not in taken]:
        names = [relative(folder, one.path) for one in left]
        skipped["not among the sources that are selected"] = names
    _refuse_unreadable([one for _, one, _ in chosen])
    files = [InputFile(source, one.path, share, one.size, one.mtime_ns) for source, one, share in chosen]
    return Selection(folder, files, skipped)


_Chosen = tuple[str, Entry, float]
"""A source, a file, and the share of the file's documents."""


def _chosen(folder: Path, groups: Mapping[str, list[Entry]], shares: Mapping[str, float]) -> list[_Chosen]:
    """The entries of the selected sources.

    Raises UserError if there are no input files, a source is unknown, or two sources name the same file.
    """
    if not groups:
        others = [printable(path.name) for path in islice((path for path in folder.rglob("*") if path.is_file()), 100)]
        found = f"it holds {shortened(sorted(others))}" if others else "it holds no files"
        raise UserError(
            f"no input files: looked for *{', *'.join(_SUFFIXES)} in {folder} and, to any depth, in its sub-folders; "
            f"{found}. Give a folder of text in one of these formats as data.path"
        )
    own = printable(folder.name)
    direct: dict[str, list[tuple[str, Entry]]] = {}
    for one in groups.get(own, []):
        if one.path.parent == folder:
            for name in (_stem(one.path), _name(one.path)):
                direct.setdefault(name, []).append((_stem(one.path), one))
    names = {**direct, **{name: [(name, one) for one in group] for name, group in groups.items()}}
    shares = {printable(name): share for name, share in shares.items()}
    wanted = [name for name in shares if name != ALL or ALL in names]
    if not wanted:
        return [(name, one, shares.get(ALL, 1.0)) for name, group in groups.items() for one in group]
    chosen: list[_Chosen] = []
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown source {name!r}; {folder} has {', '.join(map(repr, names))}{hint}")
        chosen += [(source, one, shares[name]) for source, one in names[name]]
    if len({one.path for _, one, _ in chosen}) < len(chosen):
        raise UserError(f"the sources {', '.join(map(repr, wanted))} name the same file twice; name each text once")
    return chosen


def _groups(folder: Path) -> dict[str, list[Entry]]:
    """Maps each source to all its entries in order, whether they can be read or not."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it should hold the raw text, or one sub-folder of it per source")
    above = frozenset([identity(folder)])
    try:
        found = entries(folder, above)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be listed: {error.strerror}. Correct its permissions") from error
    groups: dict[str, list[Entry]] = {printable(folder.name): []}
    for one in sorted(found, key=_is_source):
        inside = below(one, above) if one.kind == "folder" else [one]
        name = _name(one.path) if _is_source(one) else printable(folder.name)
        groups.setdefault(name, []).extend(map(checked_record, inside))
    return groups


def _is_source(one: Entry) -> bool:
    """Whether an entry directly in the data folder is a source, or may have been one (a link that leads nowhere)."""
    return one.kind == "folder" or (one.kind == "refused" and suffix(one.path.name) is None)


def _refuse_unreadable(chosen: Sequence[Entry]) -> None:
    problems = [f"{one.path}: {one.reason}" for one in chosen if one.kind == "refused"]
    problems += [
        f"{one.path}: 0 bytes, which is no valid {suffix(one.path.name)} file"
        for one in chosen
        if one.kind == "file" and not one.size and one.path.name.endswith(_NEVER_EMPTY)
    ]
    if problems:
        more = f" (and {len(problems) - NAMED} more)" if len(problems) > NAMED else ""
        raise UserError(
            f"{'; '.join(problems[:NAMED])}{more}. Restore what is meant to be read, or remove it from the data folder"
        )


def _name(path: Path) -> str:
    return printable(path.name)


def _stem(path: Path) -> str:
    return printable(path.name.removesuffix(suffix(path.name) or ""))


def _passed_over(one: Entry) -> str | None:
    """The reason why an entry is skipped, or None if it is to be read or is refused."""
    name = one.path.name
    if one.kind != "file":
        return one.reason if one.kind == "skipped" else None
    kind = suffix(name)
    if kind is None and name.lower().startswith(_DESCRIPTIONS):
        return "a description of the data"
    if kind is None and name in _HF_FILES:
        return "a record that `datasets` keeps"
    if kind is None:
        return "no kind of text that is known"
    return None if kind != ".arrow" or name in dataset_files(one.path) else "no data file of its dataset"
