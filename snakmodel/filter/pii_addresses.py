"""Finds e-mail addresses, IP addresses and IBANs in text, for the step `pii`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from snakmodel.filter.pii_support import SPACE, VERSION, needed

LONGEST_LOCAL_PART = 64
"""Characters before the @ of an e-mail address (RFC 5321)."""


class Emails:
    """Finds e-mail addresses, with letters of any script."""

    prefilter = r"\S@\S"
    _DOMAIN = re.compile(r"(?:[^\W_][\w-]*\.)+(?:xn--[0-9A-Za-z-]+|[^\W\d_]{2,24})(?!\w)")
    _PICTURE = re.compile(r"[0-9.]+x\.(?:png|jpe?g|gif|webp|svg|avif)\Z", re.IGNORECASE)
    """What follows the @ in the names of pictures for sharp screens, such as logo@2x.png."""

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The addresses; the local part is read backwards from each @, so that long words cost nothing."""
        at = text.find("@")
        while at >= 0:
            start = at
            while start > max(0, at - LONGEST_LOCAL_PART) and (
                text[start - 1].isalnum() or text[start - 1] in "._%+-'&"
            ):
                start -= 1
            while start < at and not (text[start].isalnum() or text[start] == "_"):
                start += 1
            domain = self._DOMAIN.match(text, at + 1) if start < at else None
            if domain and not self._PICTURE.match(domain[0]):
                yield start, domain.end(), "email"
            at = text.find("@", at + 1)


class IpAddresses:
    """Finds public IPv4 and IPv6 addresses.

    Private, loopback and documentation addresses name no one, and every manual is full of them. Four numbers are taken
    for a version or a section if a word such as "version" stands before them, or if all are below 20: one public
    address in 25,000 is of that form (among them 8.8.8.8 and 1.1.1.1), and nearly all versions are.
    """

    prefilter = (
        r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"
        r"|[0-9][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:"
    )
    _V4 = re.compile(r"[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.\w)")
    _V6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]+(?![\w:])")
    _SMALL = 20

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The addresses, without ports and lengths of prefixes."""
        for match in self._V4.finditer(text):
            parts = match[0].split(".")
            if any(int(part) >= self._SMALL for part in parts) and is_public(match[0]):
                start = match.start()
                if not VERSION.search(text[max(0, start - 16) : start]):
                    yield start, match.end(), "ip"
        for match in self._V6.finditer(text):
            address = match[0] if match[0].endswith("::") else match[0].rstrip(":")
            if is_public(address):
                yield match.start(), match.start() + len(address), "ip"


def is_public(address: str) -> bool:
    """Whether this is the text of a valid address that is reachable from anywhere."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


class Ibans:
    """Finds IBANs by their form per country and their checksum; needs python-stdnum."""

    _SEPARATOR = f"[{SPACE}-]?"
    prefilter = rf"[A-Za-z]{{2}}[0-9]{{2}}{_SEPARATOR}[0-9A-Za-z]{{4}}"
    _FORM = re.compile(rf"[A-Za-z](?<!\w[A-Za-z])[A-Za-z][0-9]{{2}}(?:{_SEPARATOR}[0-9A-Za-z]){{11,30}}(?!\w)")
    _START = re.compile(rf"[0-9]{{2}}(?={_SEPARATOR}[0-9A-Za-z]{{4}})")
    _WORD_END = re.compile(r"[0-9A-Za-z](?![0-9A-Za-z])")
    _SHORTEST = 15

    def __init__(self) -> None:
        self.module = needed("stdnum.iban", "python-stdnum")

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The IBANs. Words may follow after a space, so every end of a word is tried, the last one first."""
        for start in self._starts(text):
            match = self._FORM.match(text, start)
            if match is None:
                continue
            ends = [end.end() for end in self._WORD_END.finditer(text, start, match.end())]
            for end in reversed(ends):
                if end - start < self._SHORTEST:
                    break
                if self.module.is_valid(text[start:end], check_country=False):
                    yield start, end, "iban"
                    break

    def _starts(self, text: str) -> Iterator[int]:
        """Where two letters stand before what may be the digits of an IBAN; digits are rarer than letters."""
        for match in self._START.finditer(text):
            start = match.start() - 2
            if start >= 0 and text[start : start + 2].isalpha() and text[start : start + 2].isascii():
                yield start
