"""Downloads a file over HTTP so that it may be interrupted at any time and goes on where it stopped.

A download grows as a partial file, with what the server said about it beside it. The next attempt asks for the rest on
the condition that the file is still the same (Range with If-Range), and begins anew if it is not, or if the server
cannot send a part. Nothing but a whole file ever has the final name.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx2

from run_contract.errors import NoRoom, UserError
from run_contract.publish import free_bytes, remove, write_json
from snakmodel.collect.report import Report


def _version() -> str:
    """The toolkit's version, if it is installed and not only on the path."""
    try:
        return version("snakmodel-toolkit")
    except PackageNotFoundError:
        return "unknown"


USER_AGENT = f"snakmodel-toolkit/{_version()} (python -m snakmodel.collect; httpx2/{httpx2.__version__})"
"""What servers are told about who downloads."""
_LATER = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed later."""
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_PACKED = (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"\xfd7zXZ", b"PAR1")


class NotNow(Exception):
    """A server or the network cannot serve a file at the moment; running the command again later may help."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait
        """The seconds to wait that the server asks for, if it does."""


@dataclass(frozen=True)
class Patience:
    """How often and how long to try."""

    tries: int = 8
    """The number of attempts in a row that bring nothing before the command gives up."""
    first_wait: float = 1.0
    """Seconds before the second attempt; each further wait is twice as long, give or take a quarter."""
    longest_wait: float = 120.0
    """Seconds that a wait has at most, unless the server asks for more."""
    longest_asked: float = 3600.0
    """Seconds that a server may ask for; the command gives up if it asks for more."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def wait(self, attempt: int, asked: float | None) -> float:
        """The seconds to wait after the attempt of this number, from 1."""
        own = min(self.first_wait * 2.0 ** (attempt - 1), self.longest_wait) * random.uniform(0.75, 1.25)
        return max(own, asked or 0.0)


@dataclass(frozen=True)
class Answer:
    """What a server said about a file."""

    url: str
    etag: str | None
    last_modified: str | None
    total: int | None
    """The size of the file in bytes, if the server gave it."""

    @property
    def validator(self) -> str | None:
        """What identifies this version of the file in If-Range; a weak ETag cannot."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


@contextmanager
def http_client() -> Iterator[httpx2.Client]:
    """A client that follows redirects, and uses the proxies that the environment names.

    Raises UserError if a proxy's address cannot be used.
    """
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    timeout = httpx2.Timeout(60.0, connect=30.0)
    try:
        client = httpx2.Client(headers=headers, timeout=timeout, follow_redirects=True)
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        raise UserError(
            f"a proxy that the environment names cannot be used ({error}); correct http_proxy, https_proxy or all_proxy"
        ) from error
    with client:
        yield client


def download(
    client: httpx2.Client,
    url: str,
    partial: Path,
    report: Report,
    *,
    headers: dict[str, str] | None = None,
    max_mb_per_second: float | None = None,
    patience: Patience | None = None,
) -> Answer:
    """Complete the file `partial`, and return what the server said about it.

    Raises UserError if the server refuses the file or sends a web page, NoRoom if the file does not fit on the disk,
    and NotNow if the patience ends.
    """
    patience = patience or Patience()
    attempt, furthest = 0, _size(partial)
    while True:
        try:
            return _receive(client, url, partial, report, headers or {}, max_mb_per_second, patience)
        except (httpx2.InvalidURL, httpx2.TooManyRedirects, httpx2.UnsupportedProtocol) as error:
            raise UserError(
                f"{url}: is not the address of a file ({error}); correct it in the file of sources"
            ) from error
        except (NotNow, httpx2.TransportError) as error:
            attempt = 1 if _size(partial) > furthest else attempt + 1
            furthest = max(furthest, _size(partial))
            asked = error.wait if isinstance(error, NotNow) else None
            reason = str(error) or type(error).__name__
            if attempt >= patience.tries or (asked or 0) > patience.longest_asked:
                raise NotNow(
                    f"{url}: could not be downloaded ({reason}). {_size(partial):,} bytes are here and are kept; type "
                    "the same command again later, or, where there is no network, see the flag --offline of `list`"
                ) from error
            wait = patience.wait(attempt, asked)
            report.note(f"{url}: {reason}; the next attempt is in {wait:.0f} s")
            patience.sleep(wait)


def _receive(
    client: httpx2.Client,
    url: str,
    partial: Path,
    report: Report,
    headers: dict[str, str],
    max_mb_per_second: float | None,
    patience: Patience,
) -> Answer:
    """Make one attempt. Raises NotNow or an error of the transport if another one may succeed."""
    known, have = _known(partial, url)
    if known and known.total == have:
        return known
    ranged = {"Range": f"bytes={have}-", "If-Range": known.validator} if known and known.validator and have else {}
    with client.stream("GET", url, headers={**headers, **ranged}) as response:
        if response.status_code == 416:
            forget(partial)
            raise NotNow("the server has no such part of the file any more", 0.0)
        check_status(response, url)
        answer = _answer(response, url)
        goes_on = response.status_code == 206 and known is not None and answer.validator == known.validator
        if response.status_code == 206 and not (goes_on and _begins_at(response, have)):
            remove(partial)
            raise NotNow("the server sent another part than was asked for", 0.0)
        if not goes_on:
            have = 0
            remove(partial)
            partial.parent.mkdir(parents=True, exist_ok=True)
            write_json(_beside(partial), answer.__dict__)
        _check_room(answer, have, partial)
        _write(response, answer, partial, have, report, max_mb_per_second, patience)
    if answer.total not in (None, _size(partial)):
        raise NotNow(f"the connection ended after {_size(partial):,} of {answer.total:,} bytes")
    return answer


def _write(
    response: httpx2.Response,
    answer: Answer,
    partial: Path,
    have: int,
    report: Report,
    max_mb_per_second: float | None,
    patience: Patience,
) -> None:
    """Append what the server sends, at most at the given speed."""
    start, received = patience.clock(), 0
    with report.counting(partial.name, answer.total, have) as advance, partial.open("ab") as file:
        for chunk in response.iter_raw():  # with a size of chunks, the last bytes before a drop would be lost
            if have + received == 0:
                _refuse_page(response, chunk, answer.url)
            file.write(chunk)
            received += len(chunk)
            advance(len(chunk))
            if max_mb_per_second:
                ahead = received / (max_mb_per_second * 10**6) - (patience.clock() - start)
                if ahead > 0:
                    file.flush()
                    patience.sleep(ahead)


def check_status(response: httpx2.Response, url: str) -> None:
    """Raise NotNow or UserError if the status of an answer is not that of success."""
    status = response.status_code
    if status in (200, 206):
        return
    if status in _LATER:
        raise NotNow(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
    if status in (401, 403):
        gated = response.headers.get("x-error-code") == "GatedRepo"
        help_ = (
            "The dataset is gated: ask for access on its page, and log in with `hf auth login` or set HF_TOKEN"
            if gated
            else "The file needs a permission: fetch it by hand, and see the flag --offline of `list` for its place"
        )
        raise UserError(f"{url}: the server answered {status} {response.reason_phrase}. {help_}")
    raise UserError(
        f"{url}: the server answered {status} {response.reason_phrase}. Open the address in a browser, and correct it "
        "in the file of sources"
    )


def _refuse_page(response: httpx2.Response, first: bytes, url: str) -> None:
    """Raise UserError if what begins with these bytes is a web page and not a file."""
    kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
    if _HTML.match(first) or (kind in ("text/html", "application/xhtml+xml") and not first.startswith(_PACKED)):
        raise UserError(
            f"{url}: is a web page ({kind or 'HTML'}), and not the file. It may ask for a login or a consent: open it "
            "in a browser, and give the address of the file itself, or put the file in place by hand (`list --offline`)"
        )


def _answer(response: httpx2.Response, url: str) -> Answer:
    headers = response.headers
    length = headers.get("content-length")
    total = int(length) if length and length.isdigit() and response.status_code == 200 else None
    if match := re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("content-range", "")):
        total = int(match[1])
    return Answer(url, headers.get("etag"), headers.get("last-modified"), total)


def _begins_at(response: httpx2.Response, offset: int) -> bool:
    return str(response.headers.get("content-range", "")).startswith(f"bytes {offset}-")


def _check_room(answer: Answer, have: int, partial: Path) -> None:
    free = free_bytes(partial.parent)
    if answer.total is not None and answer.total - have > free:
        raise NoRoom(
            f"{partial.parent}: no room for {partial.name}, which has {answer.total:,} bytes; {free:,} are free. Free "
            "some space there (or ask for more), then run this again"
        )


def _retry_after(response: httpx2.Response) -> float | None:
    """The seconds that the header Retry-After asks for, given as a number or as a date."""
    value = response.headers.get("retry-after", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _known(partial: Path, url: str) -> tuple[Answer | None, int]:
    """What the server said about the partial file, if it is of the same address, and the file's size."""
    try:
        answer = Answer(**json.loads(_beside(partial).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None, 0
    return (answer, _size(partial)) if answer.url == url else (None, 0)


def _beside(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def forget(partial: Path) -> None:
    """Remove a download in progress."""
    remove(partial)
    remove(_beside(partial))
