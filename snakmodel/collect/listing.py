"""What a user can see without a connection: the table of sources, and what is missing with the commands to fetch it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from snakmodel.collect.fetch import missing, wanted
from snakmodel.collect.places import Place
from snakmodel.collect.record import has_files, read_record
from snakmodel.collect.sources import Source


def state(place: Place, source: Source) -> str:
    """In words, how far a source is. The sizes of its files are looked at, and not their content."""
    if record := read_record(place.record):
        if record["source"] != source.entry():
            return "changed in the file of sources"
        return "collected" if has_files(record, place.data) else "collected, but files are missing"
    if not missing(place, source):
        return "files are there, not converted"
    begun = sum(path.stat().st_size for path in _downloaded(place))
    return f"partly downloaded, {decimal(begun)}" if begun else "missing"


def table(data: Path, sources: Mapping[str, Source]) -> Table:
    """The table of all sources: what is there, what is missing, and how each is had."""
    found = Table("source", "how it is had", "state", "documents", "size", "licence", title=str(data))
    for name, source in sources.items():
        place = Place(data, name)
        record = read_record(place.record)
        size = decimal(sum(one["bytes"] for one in record["outputs"])) if record else ""
        count = f"{record['documents']:,}" if record else ""
        found.add_row(name, source.way, state(place, source), count, size, source.licence)
    return found


def plan(place: Place, source: Source) -> list[str]:
    """The lines that say what `fetch` would do, for a dry run."""
    lines = [f"{place.name}: {state(place, source)}"]
    if source.dataset and not wanted(place, source):
        lines.append(f"  would ask the Hub for the Parquet files of {source.dataset}, revision {source.revision}")
    for file, url in wanted(place, source).items():
        path, partial = place.downloads / file, place.partial(file)
        if path.is_file():
            lines.append(f"  {path}: is there, {path.stat().st_size:,} bytes")
        elif source.ask:
            lines.append(f"  {path}: has to be put in place. {source.ask.strip()}")
        else:
            have = f", from byte {partial.stat().st_size:,} on" if partial.is_file() else ""
            lines.append(f"  {path}: would be downloaded from {url or f'the Hub ({source.dataset})'}{have}")
    lines.append(f"  would be converted (format {source.format}) to {place.folder}")
    return lines


def offline(data: Path, sources: Mapping[str, Source], file: Path) -> list[str]:
    """The lines that say which files are missing, and what to type where there is a network, for all sources."""
    lines: list[str] = []
    for name, source in sources.items():
        place = Place(data, name)
        now = state(place, source)
        if now == "collected":
            continue
        lines.append(f"# {name}: {now}")
        if absent := missing(place, source):
            lines += _commands(place, source, absent)
        fetch = ["python", "-m", "snakmodel.collect", "fetch", "--sources", str(file), "--source", name]
        lines += [shlex.join([*fetch, "--output", str(data), "--offline"]), ""]
    return lines or ["# Nothing is missing."]


def _commands(place: Place, source: Source, absent: list[str]) -> list[str]:
    """The commands that fetch the missing files of a source, or the words that say whom to ask."""
    folder = shlex.join(["mkdir", "-p", str(place.downloads)])
    if source.ask:
        return [folder, f"# {source.ask.strip()}", *(f"# missing: {place.downloads / one}" for one in absent)]
    if source.dataset:
        command = ["hf", "download", source.dataset, "--repo-type", "dataset", "--revision", source.revision]
        patterns = source.files or [f"{source.config}/*.parquet" if source.config else "*.parquet"]
        included = [word for pattern in patterns for word in ("--include", pattern)]
        return [folder, shlex.join([*command, *included, "--local-dir", str(place.downloads)])]
    urls = wanted(place, source)
    curl = ["curl", "--location", "--fail", "--continue-at", "-"]
    return [
        folder,
        *(shlex.join([*curl, "--output", str(place.downloads / one), str(urls[one])]) for one in absent),
    ]


def _downloaded(place: Place) -> list[Path]:
    """The files that were downloaded so far, in whole or in part."""
    found = place.downloads.rglob("*") if place.downloads.is_dir() else []
    hidden = {place.parts.name, ".receipts", ".cache"}
    return [
        path
        for path in found
        if path.is_file() and path.suffix != ".json" and hidden.isdisjoint(path.relative_to(place.downloads).parts)
    ]
