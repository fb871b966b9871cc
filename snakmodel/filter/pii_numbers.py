"""Finds phone numbers and national numbers in text, for the step `pii`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from run_contract.errors import UserError
from snakmodel.filter.pii_addresses import SPACE, needed

_DASH = "\\-\u2010-\u2013"
CONTEXT = 32
"""Characters before a number in which a word may say what it is."""


def near(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about a wrong name: the valid names that look like it, if any do."""
    close = difflib.get_close_matches(name, list(valid), 3, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class PhoneNumbers:
    """Finds phone numbers, by the rules of `phonenumbers` and some about what only looks like one.

    Numbers of the given regions are found as they are written there, and those of all countries with a plus sign. The
    form of a number without plus sign, and the words around it, tell whether it is an order, a company or a price.
    """

    _SEPARATOR = f"(?:(?![{SPACE}]{{2}})[{SPACE}().{_DASH}/]){{0,3}}"
    _CANDIDATE = re.compile(f"[0-9](?<![0-9][0-9])(?:{_SEPARATOR}[0-9]){{6,}}")
    prefilter = f"\\p{{Nd}}(?:[{SPACE}().{_DASH}/]{{0,3}}\\p{{Nd}}){{6}}"

    _OTHER_NUMBER = re.compile(
        r"(?:\b(?:cvr|se|p|ean|gtin|isbn|issn|doi|pmid|id|ref|sku|lot|imei|kto|konto|account)|ordre|order|bestilling|faktura|"
        r"invoice|rechnung|"
        r"(?:kunde|sag|sags|vare|journal|serie|model|parti|bilag|medlem|kontrakt|police|artikel|reg|bestell|art|j)"
        r"[ .\-]{0,2}(?:n(?:umme)?r|no|id))"
        r"(?:s?[ .\-]{0,2}(?:n(?:umme)?r|no|number|num|id))?\.?[\s:#=]{0,3}\Z",
        re.IGNORECASE,
    )
    """Words before a number that belongs to a company, an order, a book, an account or the like."""
    _MONEY_BEFORE = re.compile(r"(?:\bkr\.?|\bdkk|\bsek|\bnok|\beur|\busd|\bgbp|[$€£])\s?\Z", re.IGNORECASE)
    _MONEY_AFTER = re.compile(r"\s?(?:,-|%|[$€£]|(?:kr|kroner|dkk|sek|nok|eur|euro|usd|gbp|mio)\b)", re.IGNORECASE)
    _NO_PHONE = re.compile(
        r"[0-9]+\.[0-9]+"  # a decimal number, such as a coordinate
        r"|[0-9]{1,3}(?:\.[0-9]{3})+"  # thousands, by points
        rf"|[0-9]{{1,2}}(?:[{SPACE}][0-9]{{3}})+"  # thousands, by spaces
        r"|(?:19|20)[0-9]{2}\D{1,3}(?:19|20)[0-9]{2}"  # years from … to …
        r"|(?:19|20)[0-9]{2}([ ./-]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])"  # a date, year first
        r"|(?:0[1-9]|[12][0-9]|3[01])([ ./-])(?:0[1-9]|1[0-2])\2(?:19|20)[0-9]{2}"  # a date, day first
        r"|(?:[0-9]\D+){3,}[0-9]+"  # single digits in a row
    )
    _IN_LINK = "/=_&#?"

    def __init__(self, regions: Sequence[str]) -> None:
        self.phonenumbers = needed("phonenumbers", "phonenumbers")
        self.regions = [region.upper() for region in regions]
        for region in self.regions:
            if region not in self.phonenumbers.SUPPORTED_REGIONS:
                raise UserError(
                    f"--region {region!r} is not a region of phonenumbers; it takes codes of two letters, such as DK"
                    f"{near(region, sorted(self.phonenumbers.SUPPORTED_REGIONS))}"
                )

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The phone numbers; the same span may come several times."""
        for match in self._CANDIDATE.finditer(text):
            start = match.start()
            while start and text[start - 1] in "+(＋":
                start -= 1
            plus = "+" in text[start : match.end()] or "＋" in text[start : match.end()]
            # One character before and three behind are what the matcher looks at; more could be another number.
            first = max(0, start - 1)
            window = text[first : match.end() + 3]
            for region in self.regions or ([None] if plus else []):
                for number in self.phonenumbers.PhoneNumberMatcher(window, region):
                    begin, end = first + number.start, first + number.end
                    if begin < match.end() and self._plausible(text, begin, end):
                        yield begin, end, "phone"

    def _plausible(self, text: str, start: int, end: int) -> bool:
        """Whether a number that could be dialled is likely to be meant as one."""
        number = text[start:end]
        if number[0] in "+＋" or number.startswith(("(+", "00")):
            return True
        if self._NO_PHONE.fullmatch(number):
            return False
        if start > 1 and text[start - 1] in ".," and text[start - 2].isdigit():
            return False
        after = text[end : end + 8]
        if after[:1] and after[0] in ".," and after[1:2].isdigit():
            return False
        if number.isdigit() and (
            text[start - 1 : start] in (*self._IN_LINK, "-") or after[:1] in (*self._IN_LINK, "-")
        ):
            return False
        before = text[max(0, start - CONTEXT) : start]
        return not (
            self._OTHER_NUMBER.search(before) or self._MONEY_BEFORE.search(before) or self._MONEY_AFTER.match(after)
        )


class NationalNumbers:
    """Finds the numbers that modules of python-stdnum take for valid, such as `dk.cpr` or `se.personnummer`."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = [(name, national_module(name)) for name in dict.fromkeys(modules)]
        self.prefilter = "|".join(
            sorted({Cpr.PREFILTER if name == Cpr.NAME else PieceNumbers.PREFILTER for name, _ in self.modules})
        )
        pieces = PieceNumbers([(name, module) for name, module in self.modules if name != Cpr.NAME])
        self.parts: list[Cpr | PieceNumbers] = [pieces] if pieces.modules else []
        self.parts += [Cpr(module) for name, module in self.modules if name == Cpr.NAME]

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The numbers, each counted under the name of its module."""
        for part in self.parts:
            yield from part.find(text)


def national_module(name: str) -> Any:
    """The module of python-stdnum of this name. Raises UserError if there is none that validates numbers."""
    package = needed("stdnum", "python-stdnum")
    names = [module.name.removeprefix("stdnum.") for module in pkgutil.walk_packages(package.__path__, "stdnum.")]
    module = importlib.import_module(f"stdnum.{name}") if name in names else None
    if not callable(getattr(module, "validate", None)):
        inside = [other for other in names if other.startswith(f"{name}.")]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else near(name, names)
        raise UserError(
            f"--national {name!r} is not a module of python-stdnum that validates numbers; it takes names such as "
            f"dk.cpr or se.personnummer{hint}"
        )
    return module


class Cpr:
    """Finds Danish CPR numbers, DDMMYY-SSSS.

    The date has to exist. The modulus-11 checksum cannot be asked of every number: since October 2007 the register
    also issues numbers without it, nearly all of them for birthdays on 1 January from 1960 on
    (https://www.cpr.dk/cpr-systemet/personnumre-uden-kontrolciffer-modulus-11-kontrol/). So ten digits in one run have
    to pass it, unless the birthday is one of these or the word CPR or personnummer stands before them; with a dash or a
    space after the date the form is proof enough. The module's own check that a birthday is past is left
    out, because the output would depend on the day.
    """

    NAME = "dk.cpr"
    PREFILTER = rf"\p{{Nd}}{{2}}[{SPACE}.]?\p{{Nd}}{{2}}[{SPACE}.]?\p{{Nd}}{{2}}[{SPACE}{_DASH}]{{0,3}}\p{{Nd}}{{4}}"
    _FORM = re.compile(
        rf"[0-9](?<![\w.,\-+/][0-9])(?:[0-9]{{5}}|[0-9]([{SPACE}.])[0-9]{{2}}\1[0-9]{{2}})"
        rf"[{SPACE}{_DASH}]{{0,3}}[0-9]{{4}}(?![\w]|[.,\-/][0-9])"
    )
    _WORD = re.compile(
        r"(?:cpr|personn(?:umme)?r)[^\W\d]*[ .\-]{0,2}(?:n(?:umme)?r)?[^\w]{0,3}(?:er\s)?\Z", re.IGNORECASE
    )
    _FIRST_WITHOUT_CHECKSUM = 1960

    def __init__(self, module: Any) -> None:
        self.module = module

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The CPR numbers."""
        for match in self._FORM.finditer(text):
            before = text[max(0, match.start() - CONTEXT) : match.start()]
            if self._is_number(match[0], before):
                yield match.start(), match.end(), self.NAME

    def _is_number(self, written: str, before: str) -> bool:
        """Whether this is a CPR number, as it is written and with what stands before it."""
        digits = "".join(filter(str.isdigit, written))
        try:
            born = self.module.get_birth_date(digits)
        except self.module.ValidationError:
            return False
        if written != digits or self.module.checksum(digits) == 0:
            return True
        first_of_year = born.month == born.day == 1 and born.year >= self._FIRST_WITHOUT_CHECKSUM
        return first_of_year or self._WORD.search(before) is not None


class PieceNumbers:
    """Finds numbers that are made of pieces with digits and of separators, by asking modules whether they are valid."""

    PREFILTER = rf"\p{{Nd}}(?:[A-Za-z{SPACE}.{_DASH}/+]{{0,2}}\p{{Nd}}){{4}}"
    _SEPARATORS = f"{SPACE}.{_DASH}/+"
    _RUN = re.compile(
        rf"[0-9][0-9A-Za-z]*(?:[{_SEPARATORS}](?:[A-Za-z]?[0-9][0-9A-Za-z]*|[A-Za-z]{{1,2}}(?![0-9A-Za-z])))*"
    )
    _PIECE = re.compile(rf"[^{SPACE}/]+")
    MOST_PIECES = 8
    FEWEST_DIGITS = 5
    LENGTHS = range(6, 25)

    def __init__(self, modules: Sequence[tuple[str, Any]]) -> None:
        self.modules = modules

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The numbers: every span of pieces between spaces or slashes is tried, up to MOST_PIECES of them."""
        for match in self._RUN.finditer(text):
            start = match.start()
            while start and text[start - 1].isalnum() and text[start - 1].isascii():
                start -= 1
            if not self._alone(text, start, match.end()):
                continue
            pieces = [piece.span() for piece in self._PIECE.finditer(text, start, match.end())]
            for first, (begin, _) in enumerate(pieces):
                for _, end in pieces[first : first + self.MOST_PIECES]:
                    yield from self._valid(text[begin:end], begin, end)

    @staticmethod
    def _alone(text: str, start: int, end: int) -> bool:
        """Whether no letter touches the number, and it is not the end of a decimal number or followed by one."""
        before, after = text[max(0, start - 2) : start], text[end : end + 2]
        inside = before[-1:].isalnum() or (before[-1:] in (".", ",") and before[:1].isdigit())
        return not inside and not after[:1].isalnum() and not (after[:1] == "," and after[1:].isdigit())

    def _valid(self, written: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
        """The span, once for each module that takes it for valid."""
        if len(written) not in self.LENGTHS or sum(map(str.isdigit, written)) < self.FEWEST_DIGITS:
            return
        for name, module in self.modules:
            try:
                module.validate(written)
            except Exception:  # A module may stumble over what is no number, and its words could repeat the text.
                continue
            yield start, end, name
