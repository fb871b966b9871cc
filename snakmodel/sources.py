"""What raw files a data folder holds, and how their bytes are cut into shards.

A document belongs to the byte range in which it begins: a line by its first byte, the rows of a Parquet row group or of
an Arrow record batch by the first byte of that group or batch. So planning needs no more than the files' sizes, and the
shards, concatenated, hold the same documents in the same order however many there are. What is compressed as a whole
(.gz, .zst) cannot be entered in the middle: it is one range.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from snakmodel.publish import UserError

ALL = "all"
"""Stands for every source where no source has this name."""
COMPRESSED = (".gz", ".zst")
TEXT = (".txt", ".danish")
"""Plain text; .danish is what the published language filter writes."""
ROWS = (".jsonl", ".parquet", ".arrow")
_SUFFIXES = (*TEXT, *ROWS, *(kind + codec for kind in (*TEXT, ".jsonl") for codec in COMPRESSED))
_TABLES = (".parquet", ".arrow")
_NAMED = 5
_UNPACKED = 3
_PASSED_OVER = ("readme", "license", "licence")
_HF_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Part:
    """A byte range of one input file; `end` is exclusive."""

    file: str
    source: str
    start: int
    end: int
    share: float = 1.0
    """Share of the documents that is taken."""
    salt: int = 0
    """Decides with a document's position which ones, where `share` is below 1."""


@dataclass(frozen=True)
class InputFile:
    """A file of a source, and the share of its documents that is taken."""

    source: str
    path: Path
    share: float = 1.0

    def text_bytes(self) -> int:
        """About how many bytes of text are taken from it; compressed files hold some three times their size."""
        packed = self.path.name.endswith((*COMPRESSED, ".parquet"))
        return int(self.path.stat().st_size * self.share * (_UNPACKED if packed else 1))


def suffix(name: str) -> str | None:
    """The ending that says what a file is, such as `.jsonl.gz`; None where it is nothing that can be read."""
    return max((one for one in _SUFFIXES if name.endswith(one)), key=len, default=None)


def plan_shards(
    folder: Path,
    shares: Mapping[str, float] | None,
    shards: int | None,
    shard_bytes: int,
    seed: int = 0,
    encoding: str = "utf-8",
) -> list[list[Part]]:
    """Cut the files of a data folder into shards of about equal bytes.

    A source is a sub-folder (searched to any depth); files directly in the folder belong to the source of the folder's
    own name. `shares` selects sub-folders, that name, or single files directly in the folder (`news` or `news.txt`;
    the source is then `news`), in the order given, with the share of their documents; `all` alone selects everything.
    `shards` None means one per `shard_bytes`. Empty files stay in the plan as empty parts, to be counted. Raises
    UserError if nothing is found, a source is unknown or all is empty.
    """
    if shard_bytes < 1 or (shards is not None and shards < 1):
        raise UserError(f"shards = {shards}, shard_bytes = {shard_bytes}: both must be 1 or more")
    files = [(one, one.path.stat().st_size) for one in input_files(folder, shares)]
    total = sum(size for _, size in files)
    if total == 0:
        raise UserError(f"all {len(files)} input files found in {folder} are empty; put the raw text there")
    count = min(shards or -(-total // shard_bytes), total)
    borders = [total * shard // count for shard in range(1, count + 1)]
    plan: list[list[Part]] = [[] for _ in range(count)]
    shard = done = 0
    for one, size in files:
        salt = _salt(seed, one.source, one.path.relative_to(folder.absolute())) if one.share < 1 else 0
        start = 0
        if size == 0:
            plan[shard].append(Part(str(one.path), one.source, 0, 0))
        while start < size:
            while done >= borders[shard]:
                shard += 1
            last = start + borders[shard] - done if divisible(one.path, encoding) else size
            end = min(size, last)
            plan[shard].append(Part(str(one.path), one.source, start, end, one.share, salt))
            done += end - start
            start = end
    return [parts for parts in plan if parts]


def divisible(path: Path, encoding: str) -> bool:
    """Whether reading can begin in the middle of a file: not where it has to be unpacked, or converted to UTF-8."""
    return not path.name.endswith(COMPRESSED) and (encoding == "utf-8" or path.suffix in _TABLES)


def _salt(seed: int, source: str, name: Path) -> int:
    return int(xxhash.xxh3_64_intdigest(f"{seed}\0{source}\0{name.as_posix()}".encode()))


def input_files(folder: Path, shares: Mapping[str, float] | None) -> list[InputFile]:
    """The selected files in global order: the folder's own, then its sub-folders'."""
    return [one for one in _selected(folder, shares) if _readable(one.path)]


def skipped_note(folder: Path, shares: Mapping[str, float] | None) -> list[str]:
    """A sentence, if there is need for one, on files among the selected ones that are not read.

    Hidden files, README, LICENSE and what `datasets` keeps beside its data are passed over in silence.
    """
    paths = [one.path for one in _selected(folder, shares) if not _readable(one.path)]
    unexpected = (
        path for path in paths if not path.name.lower().startswith(_PASSED_OVER) and path.name not in _HF_FILES
    )
    skipped = [str(path.relative_to(folder.absolute())) for path in unexpected]
    if not skipped:
        return []
    names = ", ".join(skipped[:_NAMED]) + (", …" if len(skipped) > _NAMED else "")
    return [f"{folder}: not read, as no kind of text that is known: {len(skipped)} file(s): {names}"]


def source_names(folder: Path) -> list[str]:
    """The sources of a folder, each file directly in it being one, then its sub-folders."""
    folder = folder.absolute()
    files = [one for one in input_files(folder, None) if one.path.parent == folder]
    folders = [one.source for one in input_files(folder, None) if one.path.parent != folder]
    names = (one.path.name if _stem(one.path) in folders else _stem(one.path) for one in files)
    return list(dict.fromkeys([*names, *folders]))


def _selected(folder: Path, shares: Mapping[str, float] | None) -> list[InputFile]:
    """The files of the selected sources, with those that cannot be read."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it should hold the raw text, or one sub-folder of it per source")
    groups = {name: pairs for name, pairs in _groups(folder).items() if any(_readable(path) for _, path in pairs)}
    if not groups:
        raise UserError(
            f"no input files: looked for *{', *'.join(_SUFFIXES)} in {folder} and, to any depth, in its sub-folders"
        )
    direct: dict[str, list[tuple[str, Path]]] = {}
    for _, path in groups.get(folder.name, []):
        if path.parent == folder and _readable(path):
            for name in (_stem(path), path.name):
                direct.setdefault(name, []).append((_stem(path), path))
    names = {**direct, **groups}
    shares = shares or {}
    wanted = [name for name in shares if name != ALL or ALL in names]
    if not wanted:
        return [InputFile(*pair, shares.get(ALL, 1.0)) for pairs in groups.values() for pair in pairs]
    chosen: list[InputFile] = []
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown source {name!r}; {folder} has {', '.join(map(repr, names))}{hint}")
        chosen += [InputFile(*pair, shares[name]) for pair in names[name]]
    if len({one.path for one in chosen}) < len(chosen):
        raise UserError(f"the sources {', '.join(map(repr, wanted))} name the same file twice; name each text once")
    return chosen


def _groups(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Source -> its (source, file) pairs, every visible file among them."""
    groups = {folder.name: [(folder.name, path) for path in _visible(folder, folder.glob("*"))]}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        groups.setdefault(child.name, []).extend((child.name, path) for path in _visible(folder, child.rglob("*")))
    return groups


def _visible(folder: Path, paths: Iterator[Path]) -> list[Path]:
    """Files in name order, without those whose name, or a folder's on the way, starts with a dot."""

    def shown(path: Path) -> bool:
        return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(filter(shown, paths))


def _stem(path: Path) -> str:
    return path.name.removesuffix(suffix(path.name) or "")


def _readable(path: Path) -> bool:
    """Whether documents are read from a file: of an Arrow dataset's folder, only what the dataset consists of."""
    kind = suffix(path.name)
    return kind is not None and (kind != ".arrow" or path.name in _dataset_files(path))


def _dataset_files(path: Path) -> Iterable[str]:
    """The data files in the folder of an Arrow file. `datasets` leaves the results of map and filter beside them."""
    state = path.with_name("state.json")
    if not state.is_file():
        return () if path.name.startswith("cache-") else (path.name,)
    try:
        return {one["filename"] for one in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state} does not list the data files of a dataset ({error!r}); save the dataset again"
        ) from error
