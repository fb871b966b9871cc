"""Collecting a source: its files and record, what is done again, and commands that are killed at any instant."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from run_contract import publish
from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError
from snakmodel.collect import __main__, convert
from snakmodel.collect.download import Patience
from snakmodel.collect.fetch import fetch
from snakmodel.collect.places import Place
from snakmodel.collect.record import Record, records
from snakmodel.collect.sources import Source
from snakmodel.prepare.input_files import plan_shards, selection
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, write_shard
from tests.collect.loopback import Site
from tests.conftest import PATIENCE

RANDOM = random.Random(3)
LINES = "".join(f"Linje {number}: {RANDOM.random()} æøå\n" for number in range(4000))
PACKED = gzip.compress(LINES.encode(), mtime=0)


def source(**keys: Any) -> Source:
    """A source of lines, unless the keys say otherwise."""
    return Source(**{"format": "lines", "licence": "unknown", **keys})


def texts(data: Path, record: Record) -> str:
    """The unpacked content of all files of a record."""
    return "".join(gzip.decompress((data / one["file"]).read_bytes()).decode() for one in record["outputs"])


def content(folder: Path) -> dict[str, bytes]:
    """The names and bytes of all files below a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(data: Path, name: str, files: dict[str, bytes]) -> None:
    """Put files in place by hand."""
    for file, inside in files.items():
        path = data / ".collected" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(inside)


def test_a_source(site: Site, tmp_path: Path) -> None:
    """The text is there, the record holds what a data card needs, and prepare reads the folder and nothing else."""
    url = site.add("/da.txt.gz", PACKED, last_modified="Tue, 02 Jan 2024 03:04:05 GMT")
    record = fetch(Place(tmp_path, "a"), source(url=url, version="v2", citation="Somebody 2024"))
    assert texts(tmp_path, record) == LINES
    assert record["source"] == {
        **{"url": url, "format": "lines", "licence": "unknown", "version": "v2", "citation": "Somebody 2024"}
    }
    (one,) = record["downloads"]
    digest = hashlib.sha256(PACKED).hexdigest()
    assert (one["url"], one["bytes"], one["sha256"], one["etag"]) == (url, len(PACKED), digest, '"one"')
    assert one["last_modified"] == "Tue, 02 Jan 2024 03:04:05 GMT"
    assert one["retrieved"].endswith("+00:00")
    (made,) = record["outputs"]
    whole = (tmp_path / "a" / "00000.txt.gz").read_bytes()
    assert made == {
        **{"file": "a/00000.txt.gz", "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()},
        "documents": 4000,
    }
    assert (record["documents"], record["left_out"]) == (4000, {})
    assert records(tmp_path) == [record]
    assert [(file.source, file.path) for file in selection(tmp_path, None).files] == [("a", tmp_path / made["file"])]


def test_what_is_done_again(site: Site, tmp_path: Path) -> None:
    """A record that verifies is enough. Otherwise as little is done as possible."""
    url, place = site.add("/da.txt", LINES.encode()), Place(tmp_path, "a")
    record = fetch(place, source(url=url))
    assert fetch(place, source(url=url)) == record
    changed = fetch(place, source(url=url, min_characters=30))
    assert changed["left_out"]["too short"] > 0
    assert len(site.requests) == 1  # the download was kept
    whole = (tmp_path / "a" / "00000.txt.gz").read_bytes()
    (tmp_path / "a" / "00000.txt.gz").write_bytes(whole[:-1] + b"x")
    assert fetch(place, source(url=url, min_characters=30))["outputs"] == changed["outputs"]
    assert (tmp_path / "a" / "00000.txt.gz").read_bytes() == whole
    assert len(site.requests) == 1
    (place.downloads / "da.txt").write_bytes(b"damaged")
    fetch(place, source(url=url))
    assert len(site.requests) == 2
    fetch(place, source(url=url, version="2"))
    assert len(site.requests) == 3
    shutil.rmtree(place.downloads)
    assert fetch(place, source(url=url, version="2"))["documents"] == 4000
    assert len(site.requests) == 3  # downloads may be deleted once the source is collected


def test_a_wrong_checksum(site: Site, tmp_path: Path) -> None:
    """Nothing is published, and the file is not kept; the right one is taken."""
    url, place = site.add("/da.txt", LINES.encode()), Place(tmp_path, "a")
    with pytest.raises(UserError, match=r"has the sha256 [0-9a-f]{64}, and not the 0{64} that the file"):
        fetch(place, source(url=url, sha256="0" * 64))
    assert not place.folder.exists()
    assert not [path for path in place.downloads.rglob("*") if path.is_file()]
    right = hashlib.sha256(LINES.encode()).hexdigest()
    assert fetch(place, source(url=url, sha256={"da.txt": right}))["documents"] == 4000


def test_files_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named with the words of the source; then the files are taken in order, and offline."""
    monkeypatch.setattr(httpx2, "Client", None)
    asked = source(ask="Ask Ada", files=["**/*.bz2"], format="tweets")
    with pytest.raises(
        InputsMissing, match=r"a: \*\*/\*\.bz2 missing\. Ask Ada\. Put what is missing into .*collected/a"
    ):
        fetch(Place(tmp_path, "a"), asked)
    tweets = {f"2018/{day:02d}/00.json.bz2": bz2.compress(b'{"text": "dag %d"}' % day) for day in (2, 1, 10)}
    put(tmp_path, "a", {**tweets, ".hidden.bz2": b"x", "readme.md": b"x"})
    record = fetch(Place(tmp_path, "a"), asked)
    assert [json.loads(line)["text"] for line in texts(tmp_path, record).splitlines()] == ["dag 1", "dag 2", "dag 10"]
    assert [one["url"] for one in record["downloads"]] == [None] * 3


def test_offline(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is opened; a file that was put in place counts as the download, and is checked like one."""
    urls = [site.add("/a.txt", b"en\n"), site.add("/b.txt", b"to\n")]
    monkeypatch.setattr(httpx2, "Client", None)
    put(tmp_path, "a", {"b.txt": b"to\n"})
    with pytest.raises(InputsMissing, match=r"a: a\.txt missing\. Put what"):
        fetch(Place(tmp_path, "a"), source(urls=urls), offline=True)
    put(tmp_path, "a", {"a.txt": b"en\n"})
    with pytest.raises(UserError, match=r"and not the 0{64} that the file of sources"):
        fetch(Place(tmp_path, "a"), source(urls=urls, sha256={"a.txt": "0" * 64}), offline=True)
    assert texts(tmp_path, fetch(Place(tmp_path, "a"), source(urls=urls), offline=True)) == "en\nto\n"


def test_folders_of_users_stay(tmp_path: Path) -> None:
    """A folder whose files were not collected is never replaced."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("x")
    put(tmp_path, "a", {"f": b"hej\n"})
    with pytest.raises(UserError, match=r"holds files that were not collected \(a/mine\.txt\), and would be replaced"):
        fetch(Place(tmp_path, "a"), source(ask="me", files=["f"]))
    assert (tmp_path / "a" / "mine.txt").read_text() == "x"


def test_nothing_left(tmp_path: Path) -> None:
    """A source without any document is a mistake in its keys, with what was left out as the hint."""
    put(tmp_path, "a", {"f": b"ab\nc\n"})
    with pytest.raises(UserError, match=r"a: no document is left of f \(left out: 2 × too short\); correct `format`"):
        fetch(Place(tmp_path, "a"), source(ask="me", files=["f"], min_characters=3))
    assert not (tmp_path / "a").exists()


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are cut between documents, and together hold what was put in, whatever their size."""
    monkeypatch.setattr(convert, "PART_BYTES", 20_000)
    lines = LINES.splitlines(keepends=True)
    put(tmp_path, "a", {"1": "".join(lines[:1500]).encode(), "2": "".join(lines[1500:]).encode()})
    record = fetch(Place(tmp_path, "a"), source(ask="me", files=["1", "2"]))
    assert len(record["outputs"]) > 5
    assert texts(tmp_path, record) == LINES
    assert sum(one["documents"] for one in record["outputs"]) == record["documents"] == 4000


def test_prepare_reads_what_was_written(tmp_path: Path) -> None:
    """The documents of the shards are those of the source: lines as they are, and texts of several lines from JSON."""
    odd = ["en\u2028to", " mellemrum ", "\u0085x", "tab\tog \x0b", "æ" * 5000]
    put(tmp_path, "a", {"f": "\r\n".join(odd).encode()})
    put(tmp_path, "b", {"f": "\n".join(json.dumps({"text": f"{one}\nmere\r\n"}) for one in odd).encode()})
    fetch(Place(tmp_path, "a"), source(ask="me", files=["f"]))
    fetch(Place(tmp_path, "b"), source(ask="me", files=["f"], format="jsonl"))
    (parts,) = plan_shards(tmp_path, None, 1, 1)
    write_shard(parts, tmp_path / ".shard.arrow", Reading("line", "error", "text", "utf-8"), Cleaning())
    with pa.OSFile(str(tmp_path / ".shard.arrow")) as file, pa.ipc.open_stream(file) as reader:
        rows = reader.read_all()
    assert rows["text"].to_pylist() == [*odd, *(f"{one}\nmere\r\n" for one in odd)]
    assert rows["source"].to_pylist() == ["a"] * 5 + ["b"] * 5


def _killed_at(number: int, place: Place, asked: Source) -> bool:
    """Whether a child process that collects a source was killed before its publication of this number."""
    child = os.fork()
    if child == 0:
        left = [number]

        def check_claim() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        publish.check_claim = check_claim
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        try:
            fetch(place, asked)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _tables() -> dict[str, bytes]:
    """Three small Parquet files."""
    made = {}
    for number in range(3):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"tekst {number}"]}), sink)
        made[str(number)] = bytes(sink.getvalue().to_pybytes())
    return made


@pytest.mark.parametrize(("form", "again"), [("lines", False), ("lines", True), ("parquet", False)])
def test_killed_before_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, again: bool) -> None:
    """Whenever a conversion is killed, the same command gives the same bytes; so it does where it replaces others."""
    monkeypatch.setattr(convert, "PART_BYTES", 40_000)
    lines = LINES.splitlines(keepends=True)
    files = {str(n): "".join(lines[n * 1000 : n * 1000 + 1000]).encode() for n in range(3)}
    files = _tables() if form == "parquet" else files
    asked, name = source(ask="me", files=["0", "1", "2"], format=form), "a"
    put(tmp_path / "whole", name, files)
    expected = fetch(Place(tmp_path / "whole", name), asked)["outputs"]
    number = 0
    while True:
        number += 1
        data = tmp_path / str(number)
        put(data, name, files)
        if again:
            fetch(Place(data, name), source(ask="me", files=["0", "1"]))
        killed = _killed_at(number, Place(data, name), asked)
        kept = [path.name for path in data.iterdir() if not path.name.startswith(".")]
        assert kept in ([], [name])
        assert fetch(Place(data, name), asked)["outputs"] == expected
        assert content(data / name) == content(tmp_path / "whole" / name)
        assert [path.name for path in data.iterdir() if path.name not in (name, ".collected")] == []
        if not killed:
            break
    assert number > 5  # several parts, states of the conversion, the folder and its record


def _command(data: Path, sources: Path) -> list[str]:
    arguments = ["--sources", str(sources), "--source", "a", "--output", str(data)]
    return [sys.executable, "-m", "snakmodel.collect", "fetch", *arguments]


def test_killed_in_the_middle_of_a_download(site: Site, tmp_path: Path) -> None:
    """The next command asks for the rest, and makes the same files as one that was never killed."""
    hold = threading.Event()
    url = site.add("/da.txt.gz", PACKED, drops=[20_000], hold=hold)
    sources = tmp_path / "sources.yaml"
    sources.write_text(f"a:\n  url: {url}\n  format: lines\n  licence: unknown\n")
    process = subprocess.Popen(_command(tmp_path / "data", sources), stdout=subprocess.DEVNULL)
    partial = Place(tmp_path / "data", "a").partial("da.txt.gz")
    end = time.monotonic() + PATIENCE
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    hold.set()
    have = partial.stat().st_size
    assert 0 < have <= 20_000
    assert not (tmp_path / "data" / "a").exists()
    record = fetch(Place(tmp_path / "data", "a"), source(url=url))
    assert site.requests[-1][1]["range"] == f"bytes={have}-"
    assert record["outputs"] == fetch(Place(tmp_path / "other", "a"), source(url=url))["outputs"]
    assert content(tmp_path / "data" / "a") == content(tmp_path / "other" / "a")


def test_a_full_disk(site: Site, tmp_path: Path) -> None:
    """The exit code is that of a full disk, one line says so, and the command goes on later."""
    sources, url = tmp_path / "sources.yaml", site.add("/da.txt.gz", PACKED)
    sources.write_text(f"a:\n  url: {url}\n  format: lines\n  licence: unknown\n")
    result = subprocess.run(
        _command(tmp_path / "data", sources),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 74, result.stderr
    assert result.stderr.startswith(f"error: {tmp_path / 'data'}: no room for the source a (File too large). What was")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "data" / "a").exists()
    assert texts(tmp_path / "data", fetch(Place(tmp_path / "data", "a"), source(url=url))) == LINES


def test_one_connection_per_host(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that collect several sources from a host into a data folder do so one after the other."""
    monkeypatch.setattr("snakmodel.collect.lock._LOOK_EVERY", 0.02)
    urls = [site.add(f"/{number}.txt", LINES.encode(), linger=0.2) for number in range(3)]
    tasks = [
        threading.Thread(target=fetch, args=(Place(tmp_path, f"s{number}"), source(url=url)))
        for number, url in enumerate(urls)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(PATIENCE)
    assert [record["documents"] for record in records(tmp_path)] == [4000] * 3
    assert site.most_open == 1


def test_the_same_mistakes_on_the_command_line(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake ends with one line and 2; what may pass with 75, after which the same command goes on."""
    sources, content = tmp_path / "sources.yaml", b"hej\n"
    page, busy = site.add("/page", b"<html>"), site.add("/busy", content, statuses=[(503, {})])
    sources.write_text(
        "".join(
            f"{name}:\n  url: {url}\n  format: lines\n  licence: unknown\n"
            for name, url in (("gone", f"{site.address}/gone"), ("page", page), ("busy", busy))
        )
    )
    monkeypatch.setattr("snakmodel.collect.download.Patience", lambda: Patience(tries=1))

    def run(*arguments: str) -> tuple[int, str]:
        flags = ["--sources", str(sources), "--output", str(tmp_path / "data")]
        monkeypatch.setattr(sys, "argv", ["collect", *arguments, *flags])
        with pytest.raises(SystemExit) as ended:
            run_main(__main__.main)
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.err or found.out

    for name, code, message in (
        ("gone", 2, "404 Not Found"),
        ("page", 2, "is a web page"),
        ("none", 2, "has no such source. Did you mean gone? Valid: gone, page, busy."),
        ("busy", 75, "type the same command again later"),
    ):
        ended, text = run("fetch", "--source", name)
        assert ended == code
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert message in text
    assert run("fetch", "--source", "busy", "--dry_run")[0] == 0
    assert run("fetch", "--source", "busy")[0] == 0
    assert run("fetch", "--source", "gone", "--offline")[0] == 3
    assert [record["name"] for record in records(tmp_path / "data")] == ["busy"]
    assert "busy" in run("list")[1]
