"""Finds phone numbers in text, for the step `pii`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from run_contract.errors import UserError
from snakmodel.filter.pii_support import CONTEXT, DASH, SPACE, VERSION, near, needed


def _between(boundary: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a span of a text between the boundaries."""
    for match in boundary.finditer(text, start, end):
        yield start, match.start()
        start = match.end()
    yield start, end


def _unclosed(number: str) -> bool:
    """Whether a number has more opening than closing brackets."""
    return sum(number.count(bracket) for bracket in "([（［") > sum(number.count(bracket) for bracket in ")]）］")


class PhoneNumbers:
    """Finds phone numbers, by the rules of `phonenumbers` and some about what only looks like one.

    Numbers of the given regions are found as they are written there, and those of all countries with a plus sign. The
    form of a number without plus sign, and the words around it, tell whether it is an order, a company or a price.
    """

    _SEPARATOR = f"(?:(?![{SPACE}]{{2}})[{SPACE}().{DASH}/]){{0,3}}"
    _CANDIDATE = re.compile(f"[0-9](?<![0-9][0-9])(?:{_SEPARATOR}[0-9]){{6,}}")
    prefilter = f"[0-9](?:[{SPACE}().{DASH}/]{{0,3}}[0-9]){{6}}"

    _OTHER_NUMBER = re.compile(
        r"(?:\b(?:cvr|ean|gtin|isbn|issn|doi|pmid|id|ref|sku|lot|imei|kto|konto|account)|ordre|order|faktura|invoice|"
        r"rechnung|(?:\bse|\bp|\bj|kunde|sags?|vare|journal|serie|model|parti|bilag|medlem|kontrakt|police|artikel|reg|"
        r"bestillings?|bestell|\bart)[ .\-]{0,2}(?:n(?:umme)?r|no|id))"
        r"(?:s?[ .\-]{0,2}(?:n(?:umme)?r|no|number|num|id))?\.?[\s:#=]{0,3}\Z",
        re.IGNORECASE,
    )
    """Words before a number that belongs to a company, an order, a book, an account or the like."""
    _PHONE_WORD = re.compile(
        r"(?:\b(?:tlf|tel|mob|sms|ring)|telefon|phone|mobil|(?:tele)?fax)(?:n(?:umme)?r|number|en)?"
        r"[^\w\n]{0,3}(?:på |to )?\Z",
        re.IGNORECASE,
    )
    """Words before a phone number; it may then look like a date."""
    _MONEY_BEFORE = re.compile(r"(?:\bkr\.?|\bdkk|\bsek|\bnok|\beur|\busd|\bgbp|[$€£])\s?\Z", re.IGNORECASE)
    _MONEY_AFTER = re.compile(r"\s?(?:,-|%|[$€£]|(?:kr|kroner|dkk|sek|nok|eur|euro|usd|gbp|mio)\b)", re.IGNORECASE)
    _NO_PHONE = re.compile(
        r"[0-9]+\.[0-9]+"  # a decimal number, such as a coordinate
        r"|(?![0-9]{2}(?:\.[0-9]{2}){3,4}\Z)[0-9]{1,3}(?:\.[0-9]{1,3}){3,}(?:/[0-9]+)?"  # an IP address or a version
        r"|[0-9]{1,3}(?:\.[0-9]{3})+"  # thousands, by points
        rf"|[0-9]{{1,2}}(?:[{SPACE}][0-9]{{3}})+"  # thousands, by spaces
        r"|(?:19|20)[0-9]{2}\D{1,3}(?:19|20)[0-9]{2}"  # years from … to …
        r"|(?:1[5-9]|20)[0-9]{2}[ ./-]?(?:0?[1-9]|1[0-2])[ ./-]?(?:0?[1-9]|[12][0-9]|3[01])"  # a date, year first
        r"|(?:0?[1-9]|[12][0-9]|3[01])[ ./-]{1,2}(?:0?[1-9]|1[0-2])[ ./-]{1,2}(?:1[5-9]|20)[0-9]{2}"  # day first
        r"|(?:.*(?<![0-9])[0-9](?![0-9])){2,}.*"  # several single digits
        r"|[0-9].*[^0-9][0-9]"  # a check digit of its own, as of an ISBN
    )
    _ISBN_END = re.compile(r"-[Xx]\b")
    _IN_LINK = "=_&#?-"
    _NOT_IN_LINK = re.compile(r"[0-9 ]{6,}/\Z")
    """What stands before a number between slashes that is not part of a link: another number."""
    _LISTED = re.compile(rf"[{SPACE}]?/[{SPACE}]?|[{SPACE}][{DASH}][{SPACE}]")
    _SPACES = re.compile(rf"[{SPACE}]+")
    MOST_DIGITS = 20
    """More digits than a phone number has, with all prefixes (E.164 allows 15)."""

    def __init__(self, regions: Sequence[str]) -> None:
        self.phonenumbers = needed("phonenumbers", "phonenumbers")
        self.regions = [region.upper() for region in regions]
        for region in self.regions:
            if region not in self.phonenumbers.SUPPORTED_REGIONS:
                raise UserError(
                    f"--region {region!r} is not a region of phonenumbers; it takes codes of two letters, such as DK"
                    f"{near(region, sorted(self.phonenumbers.SUPPORTED_REGIONS))}"
                )
        self.lengths = frozenset(length for region in self.regions for length in self._lengths(region))

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The phone numbers; the same span may come several times."""
        for match in self._CANDIDATE.finditer(text):
            for start, end in self._parts(text, *match.span()):
                while start and text[start - 1] in "+(＋":
                    start -= 1
                plus = "+" in text[start:end] or "＋" in text[start:end] or text.startswith("00", start)
                if plus or not self.lengths.isdisjoint(self._sizes(text[start:end])):
                    yield from self._in_part(text, start, end, self.regions or ([None] if plus else []))

    def _in_part(
        self, text: str, start: int, end: int, regions: Sequence[str | None]
    ) -> Iterator[tuple[int, int, str]]:
        """The phone numbers in a part of a text that holds little but digits and separators."""
        # One character before and three behind are what the matcher looks at; more could be another number.
        first = max(0, start - 1)
        window = text[first : end + 3]
        for region in regions:
            for number in self.phonenumbers.PhoneNumberMatcher(window, region):
                begin, stop = first + number.start, first + number.end
                # The matcher takes the bracket before a number that ends within it for a part of the number.
                begin += number.raw_string[0] in "([（［" and _unclosed(number.raw_string)
                if begin < end and self._plausible(text, begin, stop):
                    yield begin, stop, "phone"

    def _parts(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The candidate or, if it has more digits than any number, its parts between slashes and dashes, or words.

        This is what the matcher would find out by many attempts, in rows of a table for example.
        """
        parts = [(start, end)]
        for boundary in (self._LISTED, self._SPACES):
            if all(stop - begin <= self.MOST_DIGITS for begin, stop in parts):
                break
            parts = [
                part
                for begin, stop in parts
                for part in (
                    _between(boundary, text, begin, stop)
                    if sum(map(str.isdigit, text[begin:stop])) > self.MOST_DIGITS
                    else [(begin, stop)]
                )
            ]
        return iter(parts)

    def _sizes(self, part: str) -> set[int]:
        """The numbers of digits of a part, and of what is between its slashes, dashes and spaces."""
        pieces = [part, *self._LISTED.split(part), *self._SPACES.split(part)]
        return {sum(map(str.isdigit, piece)) for piece in pieces}

    def _lengths(self, region: str) -> set[int]:
        """How many digits numbers of a region have, with and without the national prefix or the country code."""
        data = self.phonenumbers.PhoneMetadata.metadata_for_region(region)
        country = len(str(data.country_code))
        before = [0, len(data.national_prefix or ""), country, 2 + country, 3 + country]
        return {length + more for length in data.general_desc.possible_length for more in before}

    def _plausible(self, text: str, start: int, end: int) -> bool:
        """Whether a number that could be dialled is likely to be meant as one."""
        number = text[start:end]
        if number[0] in "+＋" or number.startswith("(+"):
            return True
        before = text[max(0, start - CONTEXT) : start]
        if start > 1 and text[start - 1] in ".," and text[start - 2].isdigit():
            return False
        after = text[end : end + 8]
        if after[:1] and after[0] in ".," and after[1:2].isdigit():
            return False
        if number.isdigit() and self._in_link(before, after):
            return False
        if self._PHONE_WORD.search(before):
            return True
        other = self._OTHER_NUMBER.search(before) or ("." in number and VERSION.search(before))
        money = self._MONEY_BEFORE.search(before) or self._MONEY_AFTER.match(after)
        return not (other or money or self._NO_PHONE.fullmatch(number) or self._ISBN_END.match(after))

    def _in_link(self, before: str, after: str) -> bool:
        """Whether the text around a run of digits looks like a link or a name of a file."""
        if before.endswith("/") and not self._NOT_IN_LINK.search(before):
            return True
        return before.endswith(tuple(self._IN_LINK)) or after.startswith(tuple(self._IN_LINK))
