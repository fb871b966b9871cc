"""Collects one source: has its files, converts them, and publishes the folder of text together with its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

from run_contract.errors import NO_ROOM, InputsMissing, NoRoom, UserError
from run_contract.publish import put, remove, rename, write_json
from snakmodel.collect import hub
from snakmodel.collect.convert import Download, convert
from snakmodel.collect.download import Patience, download, forget, http_client
from snakmodel.collect.lock import waiting_lock
from snakmodel.collect.parts import as_json, sha256
from snakmodel.collect.places import Place
from snakmodel.collect.record import Record, read_record, strangers, verifies
from snakmodel.collect.report import Report
from snakmodel.collect.sources import Source, file_name


def fetch(place: Place, source: Source, *, offline: bool = False, patience: Patience | None = None) -> Record:
    """Collect a source, and return its record.

    If its record verifies, nothing is done. With `offline`, no connection is opened. Raises UserError for what the user
    has to correct, InputsMissing if files have to be put in place first, NoRoom if the disk is full, and NotNow if
    running the command again later may help.
    """
    report = Report(place.name)
    with waiting_lock(place.lock, f"the source {place.name}"), _room(place):
        record = _publish_unpublished(place) or read_record(place.record)
        if record and record["source"] == source.entry() and verifies(record, place.data):
            report.note(f"collected already, on {record['collected']}: {record['documents']:,} documents")
            return record
        _check_folder(place, record)
        downloads = (
            [_by_hand(place, source, file, report) for file in missing_none(place, source)]
            if offline or source.ask
            else list(_downloads(place, source, report, patience))
        )
        parts, left_out = convert(place, source, downloads, report)
        record = {
            "name": place.name,
            "source": source.entry(),
            "collected": _now(),
            "downloads": [asdict(one) for one in downloads],
            "outputs": [{**part, "file": f"{place.name}/{part['file']}"} for part in as_json(parts)],
            "documents": sum(part.documents for part in parts),
            "left_out": left_out,
        }
        write_json(place.unpublished_record, record)
        rename(place.parts, place.folder)
        remove(place.progress)
        _publish_unpublished(place)
        report.note(f"{record['documents']:,} documents in {len(parts)} files; left out: {left_out or 'none'}")
        return record


def _publish_unpublished(place: Place) -> Record | None:
    """The record that was not published before a command was killed, now published, if its files are in place."""
    record = read_record(place.unpublished_record)
    if record and verifies(record, place.data):
        put(place.unpublished_record, place.record)
        for old in place.data.glob(f".{place.name}.old-*"):
            remove(old)
        return record
    return None


def _check_folder(place: Place, record: Record | None) -> None:
    """Raise UserError if the source's folder holds files that this command has not made, and would replace."""
    if unknown := strangers(place, record, read_record(place.unpublished_record)):
        raise UserError(
            f"{place.folder}: holds files that were not collected ({', '.join(unknown[:3])}"
            f"{' and more' if len(unknown) > 3 else ''}), and would be replaced. Move them away, or rename the source"
        )


def wanted(place: Place, source: Source) -> dict[str, str | None]:
    """Maps the files of the source that can be named without a connection to their addresses, None if by hand.

    For a dataset of the Hub these are the files of the listing that was kept, if there is one.
    """
    if source.dataset:
        with suppress(OSError, ValueError, KeyError):
            kept = json.loads(place.listing.read_text(encoding="utf-8"))
            return dict.fromkeys(hub.chosen_paths(source, kept["paths"]))
        return {}
    if source.ask:
        return {file: None for pattern in source.files or [] for file in _matching(place, pattern) or [pattern]}
    return {file_name(url): url for url in source.addresses}


def missing(place: Place, source: Source) -> list[str]:
    """The files, or patterns of files, that have to be in the folder of downloads and are not."""
    if source.dataset and not wanted(place, source):
        return [] if _matching(place, "**/*.parquet") else ["*.parquet"]
    return [file for file in wanted(place, source) if not (place.downloads / file).is_file()]


def missing_none(place: Place, source: Source) -> list[str]:
    """The files in the folder of downloads, if all are there. Raises InputsMissing that names those that are not."""
    if absent := missing(place, source):
        ask = f" {source.ask.strip().rstrip('.')}." if source.ask else ""
        raise InputsMissing(
            f"{place.name}: {', '.join(absent[:5])}{' and more' if len(absent) > 5 else ''} missing.{ask} Put what is "
            f"missing into {place.downloads}, and run this again; `list --offline` prints what to type"
        )
    return list(wanted(place, source)) or hub.chosen_paths(source, _matching(place, "**/*.parquet"))


def _matching(place: Place, pattern: str) -> list[str]:
    """The files below the folder of downloads that match a pattern, without hidden ones, in order."""
    found = (path.relative_to(place.downloads) for path in place.downloads.glob(pattern) if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _downloads(place: Place, source: Source, report: Report, patience: Patience | None) -> Iterator[Download]:
    """Yield the files of the source, each downloaded if it is not there."""
    headers: dict[str, str] = {}
    addresses = {file_name(url): (url, source.checksum(file_name(url))) for url in source.addresses}
    if source.dataset:
        addresses, headers = hub.parquet_files(source, place.listing), hub.authorization()
    with http_client() as client:
        for file, (url, expected) in addresses.items():
            if (place.downloads / file).is_file() and (receipt := _receipt(place, source, file, url)):
                yield receipt
                continue
            partial, host = place.partial(file), urlsplit(url).netloc.rpartition("@")[2]
            report.note(f"downloading {url}")
            with waiting_lock(place.host_lock(host), f"the host {host}"):
                answer = download(
                    client,
                    url,
                    partial,
                    report,
                    headers=headers,
                    max_mb_per_second=source.max_mb_per_second,
                    patience=patience,
                )
            one = Download(
                file, url, partial.stat().st_size, sha256(partial), answer.etag, answer.last_modified, _now()
            )
            try:
                _check_sum(expected, one, url)
            except UserError:
                forget(partial)
                raise
            place.receipt(file).parent.mkdir(parents=True, exist_ok=True)
            (place.downloads / file).parent.mkdir(parents=True, exist_ok=True)
            write_json(place.receipt(file), {**asdict(one), "version": source.version})
            rename(partial, place.downloads / file)
            forget(partial)
            yield one


def _receipt(place: Place, source: Source, file: str, url: str | None) -> Download | None:
    """What is known about a file in the folder of downloads; None if it has to be downloaded anew.

    A file without a receipt was put in place by hand.
    """
    path = place.downloads / file
    size, digest = path.stat().st_size, sha256(path)
    try:
        kept = json.loads(place.receipt(file).read_text(encoding="utf-8"))
        same = kept.pop("version") == source.version and (url is None or kept["url"] == url)
        one = Download(**kept)
    except (OSError, ValueError, KeyError, TypeError):
        same, one = True, Download(file, None, size, digest, None, None, _modified(path))
    else:
        if one.sha256 != digest:
            same = False
    if same:
        _check_sum(source.checksum(file), one, str(path))
    return one if same else None


def _by_hand(place: Place, source: Source, file: str, report: Report) -> Download:
    """What is known about a file that is in place and cannot be downloaded again."""
    found = _receipt(place, source, file, None)
    if found is None:
        path = place.downloads / file
        remove(place.receipt(file))
        report.note(f"{path} is not the file that was downloaded for this version; it is taken as put in place by hand")
        found = _receipt(place, source, file, None)
    assert found is not None
    return found


def _check_sum(expected: str | None, one: Download, where: str) -> None:
    if expected and one.sha256 != expected:
        raise UserError(
            f"{where}: has the sha256 {one.sha256}, and not the {expected} that the file of sources or the Hub gives. "
            "The file is not the one that was meant, or was damaged on its way: fetch it again, or correct `sha256`"
        )


@contextmanager
def _room(place: Place) -> Iterator[None]:
    """Turn the system's error about a full disk into NoRoom; what is done so far is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise NoRoom(
            f"{place.data}: no room for the source {place.name} ({error.strerror}). What was downloaded is kept. Free "
            "some space there (or ask for more), then run this again"
        ) from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _modified(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
