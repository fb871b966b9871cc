"""Finds national numbers in text, for the step `pii`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from typing import Any

from run_contract.errors import UserError
from snakmodel.filter.pii_support import CONTEXT, DASH, SPACE, near, needed


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


@functools.cache
def module_names() -> list[str]:
    """The names of all modules of python-stdnum."""
    package = needed("stdnum", "python-stdnum")
    return [module.name.removeprefix("stdnum.") for module in pkgutil.walk_packages(package.__path__, "stdnum.")]


def national_module(name: str) -> Any:
    """The module of python-stdnum of this name. Raises UserError if there is none that validates numbers."""
    names = module_names()
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
    PREFILTER = rf"(?:[0-9]{{2}}[{SPACE}.]?){{3}}[{SPACE}{DASH}]{{0,3}}[0-9]{{4}}"
    _FORM = re.compile(
        rf"[0-9](?<!\w[0-9])(?<![0-9][.,\-+/][0-9])(?:[0-9]{{5}}|[0-9]([{SPACE}.])[0-9]{{2}}\1[0-9]{{2}})"
        rf"[{SPACE}{DASH}]{{0,3}}[0-9]{{4}}(?!\w|[.\-/][0-9])"
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

    _DENSE = rf"[0-9](?:[A-Za-z{SPACE}.{DASH}/+]{{0,2}}[0-9]){{4}}"
    """Five digits with little between them, which a number has to have."""
    PREFILTER = _DENSE
    _SEPARATORS = f"{SPACE}.{DASH}/+"
    _RUN = re.compile(rf"[0-9][0-9A-Za-z]*(?:[{_SEPARATORS}](?:[A-Za-z]?[0-9][0-9A-Za-z]*|[A-Za-z]{{1,2}}(?!\w)))*")
    _FIVE_DIGITS = re.compile(_DENSE)
    _PIECE = re.compile(rf"[^{SPACE}/]+")
    _MIXED = re.compile(rf"[^{SPACE}/]*[.{DASH}][^{SPACE}/]*")
    """A piece with a point or a dash inside; two of them are not one number."""
    MOST_PIECES = 8
    LONGEST = 24
    """Characters of a number with its separators."""

    def __init__(self, modules: Sequence[tuple[str, Any]]) -> None:
        self.modules = modules
        self.lengths = frozenset(
            length for length in range(1, self.LONGEST + 1) for _, module in modules if _may_have_length(module, length)
        )

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The numbers: every span of pieces between spaces or slashes is tried, up to MOST_PIECES of them."""
        for match in self._RUN.finditer(text):
            start = match.start()
            while start and text[start - 1].isalnum() and text[start - 1].isascii():
                start -= 1
            pieces = [piece.span() for piece in self._PIECE.finditer(text, start, match.end())]
            pieces = pieces[self._continues(text, start) : len(pieces) - self._is_continued(text, match.end())]
            for first, (begin, _) in enumerate(pieces):
                for _, end in pieces[first : first + self.MOST_PIECES]:
                    written = text[begin:end]
                    if len(written) > self.LONGEST or len(self._MIXED.findall(written)) > 1:
                        break
                    yield from self._valid(written, begin, end)

    @staticmethod
    def _continues(text: str, start: int) -> bool:
        """Whether a letter stands before the first piece, or it is the end of a decimal number."""
        before = text[max(0, start - 2) : start]
        return before[-1:].isalnum() or (before[-1:] in (".", ",") and before[:1].isdigit())

    @staticmethod
    def _is_continued(text: str, end: int) -> bool:
        """Whether a letter stands behind the last piece, or it is the begin of a decimal number."""
        after = text[end : end + 2]
        return after[:1].isalnum() or (after[:1] == "," and after[1:].isdigit())

    def _valid(self, written: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
        """The span, once for each module that takes it for valid."""
        digits = sum(map(str.isdigit, written))
        if not any(map(str.isalpha, written)) and self.lengths.isdisjoint(range(digits, len(written) + 1)):
            return
        if not self._FIVE_DIGITS.search(written):
            return
        for name, module in self.modules:
            if _validates(module, written):
                yield start, end, name


def _validates(module: Any, written: str) -> bool:
    """Whether a module of python-stdnum takes this for valid."""
    try:
        module.validate(written)
    except Exception:  # A module may stumble over what is no number, and the words of its error could repeat the text.
        return False
    return True


def _may_have_length(module: Any, length: int) -> bool:
    """Whether a module of python-stdnum does not refuse digits just because there are so many."""
    try:
        module.validate("1" * length)
    except Exception as error:
        return type(error).__name__ != "InvalidLength"
    return True
