"""What the finders of personal data have in common: characters inside numbers, packages, and names that are near."""

from __future__ import annotations

import difflib
import importlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from run_contract.errors import UserError

INSTALL = "pip install 'snakmodel-toolkit[filter]'"
"""The command to install the packages of the filters."""

SPACE = " \u00a0\u2009\u202f"
"""Spaces inside numbers (a space, a no-break space and the narrow ones), for a character class."""

DASH = "\\-\u2010-\u2013"
"""Dashes inside numbers, for a character class."""

CONTEXT = 32
"""Characters before a number in which a word may say what it is."""


VERSION = re.compile(
    r"(?:\bversion\w*|\bver|\bv|\brelease\w*|\budgave\w*|\bbuild|\brev|\brevision|\bfirmware|\bafsnit\w*|\bsection|"
    r"\bkapitel|\bchapter|\bpunkt|§)[\s:.=#-]*\Z",
    re.IGNORECASE,
)
"""The end of a text after which numbers with points are a version or a section."""


def _foreign_digits() -> str:
    """The inside of a character class with all decimal digits of Unicode but the ASCII ones, ten of them per script.

    The planes from 0x20000 on hold ideographs and no digits.
    """
    zeros = [code for code in range(0x80, 0x20000) if unicodedata.decimal(chr(code), None) == 0]
    return "".join(f"{chr(zero)}-{chr(zero + 9)}" for zero in zeros)


FOREIGN_DIGITS = _foreign_digits()
_FOREIGN_DIGIT = re.compile(f"[{FOREIGN_DIGITS}]")


def ascii_digits(text: str) -> str:
    """The text of the same length with every decimal digit, such as a full-width or an Arabic one, written in ASCII."""
    return _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)


def needed(module: str, package: str) -> Any:
    """Import a module. Raises UserError with the command to type if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the step pii needs the package {package}, which is not installed. Type: {INSTALL}") from error


def near(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about a wrong name: the valid names that look like it, if any do."""
    close = difflib.get_close_matches(name, list(valid), 3, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
