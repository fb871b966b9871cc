"""A web server on this machine that serves files, and misbehaves as a test asks it to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file of the server, and what happens to the next requests for it."""

    content: bytes
    etag: str | None = '"one"'
    last_modified: str | None = None
    ranges: bool = True
    kind: str = "application/octet-stream"
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """The answers to the next requests, before the file is served."""
    drops: list[int] = field(default_factory=list)
    """The numbers of bytes after which the connections of the next requests are cut."""
    linger: float = 0.0
    """Seconds before a request is answered, in which others may arrive."""
    hold: threading.Event | None = None
    """If given, a cut connection is kept open, without another byte, until it is set."""


@dataclass
class Site:
    """The running server."""

    address: str
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """The path and the headers, with names in lower case, of each request."""
    open_now: int = 0
    most_open: int = 0
    """The largest number of requests that were served at the same time."""
    dropped: threading.Event = field(default_factory=threading.Event)
    """Is set when a connection was cut or is kept open."""

    def add(self, path: str, content: bytes, **form: object) -> str:
        """Serve a file, and return its address."""
        self.files[path] = Served(content, **form)  # type: ignore[arg-type]
        return f"{self.address}{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site
    lock: threading.Lock

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Serve a file, in whole or in part."""
        site = self.site
        with self.lock:
            site.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            site.open_now += 1
            site.most_open = max(site.most_open, site.open_now)
        try:
            self._serve(site.files.get(self.path.split("?")[0]))
        finally:
            with self.lock:
                site.open_now -= 1

    do_HEAD = do_GET

    def _serve(self, served: Served | None) -> None:
        if served is None:
            return self._answer(404, {}, b"there is no such thing")
        time.sleep(served.linger)
        if served.statuses:
            status, headers = served.statuses.pop(0)
            return self._answer(status, headers, b"not now")
        headers = {"Content-Type": served.kind}
        for name, value in (("ETag", served.etag), ("Last-Modified", served.last_modified)):
            if value:
                headers[name] = value
        status, start, total = 200, 0, len(served.content)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, served.etag, served.last_modified)
        if match and served.ranges and same:
            status, start = 206, int(match[1])
            if start >= total:
                return self._answer(416, {"Content-Range": f"bytes */{total}"}, b"")
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        return self._answer(status, headers, served.content[start:], served)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, served: Served | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if served is None or not served.drops:
            self.wfile.write(body)
            return
        self.wfile.write(body[: served.drops.pop(0)])
        self.wfile.flush()
        self.site.dropped.set()
        if served.hold:
            served.hold.wait(60)
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing about clients that go away."""


@contextmanager
def serving() -> Iterator[Site]:
    """Run a server while the body runs."""
    handler = type("Handler", (_Handler,), {"lock": threading.Lock()})
    server = _Server(("127.0.0.1", 0), handler)
    site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    handler.site = site  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
