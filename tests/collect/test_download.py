"""Downloads from a server on this machine that misbehaves."""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from run_contract.errors import NoRoom, UserError
from snakmodel.collect import download as module
from snakmodel.collect.download import NotNow, Patience, download, http_client
from snakmodel.collect.lock import ABANDONED_AFTER, waiting_lock
from snakmodel.collect.report import Report
from tests.collect.loopback import Site

CONTENT = random.Random(1).randbytes(400_000)


@dataclass
class Watch:
    """A clock that only sleeping moves."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        """Note the seconds, and let them pass."""
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        """The seconds that have passed."""
        return self.now


def get(url: str, partial: Path, watch: Watch | None = None, tries: int = 4, **form: Any) -> Any:
    """Download an address into a partial file, without real waits."""
    watch = watch or Watch()
    patience = Patience(tries=tries, sleep=watch.sleep, clock=watch.clock)
    with http_client() as client:
        return download(client, url, partial, Report("test"), patience=patience, **form)


def test_a_whole_file(site: Site, tmp_path: Path) -> None:
    """The bytes arrive; the request says who asks, and asks for bytes that are not packed again."""
    answer = get(site.add("/f", CONTENT, last_modified="Tue, 02 Jan 2024 03:04:05 GMT"), tmp_path / "a" / "f")
    assert (tmp_path / "a" / "f").read_bytes() == CONTENT
    assert (answer.total, answer.etag, answer.last_modified) == (
        len(CONTENT),
        '"one"',
        "Tue, 02 Jan 2024 03:04:05 GMT",
    )
    (_, headers), *others = site.requests
    assert not others
    assert headers["user-agent"].startswith("snakmodel-toolkit/")
    assert headers["accept-encoding"] == "identity"


def test_dropped_connections_go_on_where_they_stopped(site: Site, tmp_path: Path) -> None:
    """Each further request asks for the rest only, on the condition that the file is the same."""
    get(site.add("/f", CONTENT, drops=[100_000, 50_000]), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    ranges = [(headers.get("range"), headers.get("if-range")) for _, headers in site.requests]
    assert ranges == [(None, None), ("bytes=100000-", '"one"'), ("bytes=150000-", '"one"')]


def test_a_date_serves_where_there_is_no_strong_etag(site: Site, tmp_path: Path) -> None:
    """A weak ETag says nothing about bytes, so that the date of the file is the condition."""
    date = "Tue, 02 Jan 2024 03:04:05 GMT"
    get(site.add("/f", CONTENT, etag='W/"x"', last_modified=date, drops=[1000]), tmp_path / "f")
    assert site.requests[1][1]["if-range"] == date
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_without_anything_that_identifies_the_file_it_begins_anew(site: Site, tmp_path: Path) -> None:
    """Without ETag and date the rest might belong to another file."""
    get(site.add("/f", CONTENT, etag=None, drops=[1000]), tmp_path / "f")
    assert [headers.get("range") for _, headers in site.requests] == [None, None]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_ranges(site: Site, tmp_path: Path) -> None:
    """The server sends the whole file again, which replaces what is there."""
    get(site.add("/f", CONTENT, ranges=False, drops=[100_000]), tmp_path / "f")
    assert site.requests[1][1]["range"] == "bytes=100000-"
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), 1000])
def test_a_file_that_changed_between_attempts(site: Site, tmp_path: Path, size: int) -> None:
    """The new file is downloaded from its beginning, whether it is as long as the old one or shorter."""
    url = site.add("/f", CONTENT, drops=[100_000])
    with pytest.raises(NotNow):
        get(url, tmp_path / "f", tries=1)
    site.add("/f", CONTENT[::-1][:size], etag='"two"')
    assert get(url, tmp_path / "f").etag == '"two"'
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1][:size]


def test_a_server_that_ignores_the_condition(site: Site, tmp_path: Path) -> None:
    """A part whose ETag is another one is not appended."""
    url = site.add("/f", CONTENT, drops=[100_000])
    with pytest.raises(NotNow):
        get(url, tmp_path / "f", tries=1)
    site.add("/f", CONTENT[::-1], etag='"one"')
    site.files["/f"].etag = '"two"'
    site.files["/f"].last_modified = '"one"'  # the server takes the condition for true
    get(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1]


def test_a_whole_partial_file_needs_no_connection(site: Site, tmp_path: Path) -> None:
    """A command that was killed after the last byte is not followed by another request."""
    url = site.add("/f", CONTENT)
    first = get(url, tmp_path / "f")
    assert get(url, tmp_path / "f") == first
    assert len(site.requests) == 1


def test_another_address_begins_anew(site: Site, tmp_path: Path) -> None:
    """What is there of one address is never continued with another one."""
    with pytest.raises(NotNow):
        get(site.add("/f", CONTENT, drops=[1000]), tmp_path / "f", tries=1)
    get(site.add("/g", CONTENT[::-1]), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when_to_come_back(site: Site, tmp_path: Path, status: int) -> None:
    """Retry-After is obeyed, as seconds and as a date, if it is longer than the own wait."""
    later = email.utils.formatdate(time.time() + 90, usegmt=True)
    watch = Watch()
    statuses = [(status, {"Retry-After": "37"}), (status, {"Retry-After": later}), (status, {"Retry-After": "soon"})]
    get(site.add("/f", CONTENT, statuses=statuses), tmp_path / "f", watch)
    assert watch.slept[0] == 37
    assert 60 < watch.slept[1] <= 90
    assert 3 <= watch.slept[2] <= 5  # the third wait of its own
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_patience_ends(site: Site, tmp_path: Path) -> None:
    """The waits grow; then the message says what is kept. A server that asks for a day is not waited for."""
    watch = Watch()
    with pytest.raises(NotNow, match=r"503 Service Unavailable\)\. 0 bytes are here and are kept; type the same"):
        get(site.add("/f", b"", statuses=[(503, {})] * 4), tmp_path / "f", watch)
    assert len(watch.slept) == 3
    assert watch.slept[0] < watch.slept[1] < watch.slept[2]
    with pytest.raises(NotNow, match="429"):
        get(site.add("/g", b"", statuses=[(429, {"Retry-After": "86400"})]), tmp_path / "g")


def test_a_server_that_always_drops_ends_patience(site: Site, tmp_path: Path) -> None:
    """Without ranges no attempt gets any further, however many bytes each one brings."""
    with pytest.raises(NotNow):
        get(site.add("/f", CONTENT, ranges=False, drops=[1000] * 9), tmp_path / "f")
    assert len(site.requests) == 4


def test_nobody_answers(tmp_path: Path, site: Site) -> None:
    """A refused connection is tried again, and named in the end."""
    with pytest.raises(NotNow, match=r"http://127\.0\.0\.1:9/f: could not be downloaded"):
        get("http://127.0.0.1:9/f", tmp_path / "f")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {}, "404 Not Found. Open the address in a browser"),
        (410, {}, "410 Gone. Open the address"),
        (403, {}, "403 Forbidden. The file needs a permission"),
        (401, {"X-Error-Code": "GatedRepo"}, "The dataset is gated: ask for access"),
    ],
)
def test_refused(site: Site, tmp_path: Path, status: int, headers: dict[str, str], message: str) -> None:
    """What a retry does not cure is an error of the user at once."""
    with pytest.raises(UserError, match=message):
        get(site.add("/f", b"", statuses=[(status, headers)]), tmp_path / "f")
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\n<!DOCTYPE html><html>Log in</html>", "application/gzip"),
        (b"<html><body>x", "application/octet-stream"),
        (b"Please log in.", "text/html; charset=utf-8"),
        (b"<!-- hello --> <head>", "text/plain"),
    ],
)
def test_a_web_page_is_no_file(site: Site, tmp_path: Path, content: bytes, kind: str) -> None:
    """A page is recognised by its first bytes or by what the server calls it, and nothing of it is kept."""
    with pytest.raises(UserError, match="is a web page"):
        get(site.add("/f", content, kind=kind), tmp_path / "f")
    assert not (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("content", [b"\x1f\x8b" + CONTENT, b"PK\x03\x04" + CONTENT])
def test_a_packed_file_under_a_wrong_type_is_taken(site: Site, tmp_path: Path, content: bytes) -> None:
    """Some servers call every file text/html."""
    get(site.add("/f", content, kind="text/html"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content


def test_the_speed_is_limited(site: Site, tmp_path: Path) -> None:
    """400,000 bytes at 0.1 MB per second take four seconds."""
    watch = Watch()
    get(site.add("/f", CONTENT), tmp_path / "f", watch, max_mb_per_second=0.1)
    assert watch.now == pytest.approx(4.0)


def test_no_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is larger than the free space is not begun."""
    monkeypatch.setattr(module, "free_bytes", lambda _: 399_999)
    with pytest.raises(NoRoom, match=r"no room for f, which has 400,000 bytes; 399,999 are free"):
        get(site.add("/f", CONTENT), tmp_path / "f")


def test_redirects_and_proxies(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is followed; a proxy that the environment names is asked for the whole address."""
    url = site.add("/f", CONTENT)
    get(site.add("/old", b"", statuses=[(302, {"Location": url})]), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", site.address)
    site.files["http://corpus.invalid/f"] = site.files["/f"]
    get("http://corpus.invalid/f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == CONTENT


def test_addresses_that_lead_nowhere(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is no number, redirects without end, other protocols, and a proxy of an unknown kind."""
    circle = site.add("/circle", b"", statuses=[(302, {"Location": "/circle"})] * 50)
    other = site.add("/other", b"", statuses=[(302, {"Location": "ftp://host.invalid/f"})])
    for url in ("http://host.invalid:x/f", circle, other):
        with pytest.raises(UserError, match="is not the address of a file"):
            get(url, tmp_path / "f")
    monkeypatch.setenv("all_proxy", "magic://host.invalid:1")
    with pytest.raises(UserError, match="a proxy that the environment names cannot be used"):
        get(circle, tmp_path / "f")


def test_a_client_of_its_own_kind(site: Site) -> None:
    """The library's exception for a connection that was cut is one of those that are tried again."""
    url = site.add("/f", CONTENT, drops=[10])
    with pytest.raises(httpx2.TransportError), http_client() as client:
        client.get(url)


def test_one_command_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that another thread's command holds is waited for, and the line says for what."""
    monkeypatch.setattr("snakmodel.collect.lock._LOOK_EVERY", 0.02)
    order, inside = [], threading.Event()

    def first() -> None:
        with waiting_lock(tmp_path / "host", "the host"):
            inside.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with waiting_lock(tmp_path / "host", "the host"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert f"waiting for the host, at which process {os.getpid()}" in capsys.readouterr().out


def test_a_lock_that_was_left_on_another_node(tmp_path: Path) -> None:
    """A lock that was not touched for long is taken over."""
    (tmp_path / "lock").write_text('{"host": "elsewhere", "pid": 1, "process_start": "1"}')
    long_ago = time.time() - ABANDONED_AFTER - 60
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    with waiting_lock(tmp_path, "the host"):
        assert "elsewhere" not in (tmp_path / "lock").read_text()
