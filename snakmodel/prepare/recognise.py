"""Recognises a file by its first bytes: as text in some encoding, or as something that is not text."""

from __future__ import annotations

import codecs
import unicodedata

ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be")
"""The known encodings. utf-16 is for files that begin with a byte order mark, which says which of the other two it
is."""
HEAD = 1 << 14
"""The number of bytes at the beginning of a file that are looked at."""
_MAGIC = {
    b"\x1f\x8b": ("gzip", "rename it so that its name ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "rename it so that its name ends in .zst"),
    b"BZh91AY&SY": ("bzip2", "unpack it"),
    b"\xfd7zXZ\0": ("xz", "unpack it"),
    b"PK\x03\x04": ("zip", "unpack it"),
    b"PAR1\x15": ("Parquet", "rename it so that its name ends in .parquet"),
}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f"))
_MOST_CONTROLS = 0.2
"""The largest share of control characters in what is taken for UTF-8. In UTF-16 that passes for UTF-8, about every
other byte is one."""
_MOST_STRANGE = 0.01
"""The largest share of characters that no text holds in what is taken for UTF-16."""
_LEAST_ALPHABETIC = 0.75
"""The smallest share of characters of alphabetic scripts in UTF-16 that is also valid UTF-8."""


def mismatch(head: bytes, encoding: str) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do about it; None if it may be text in the encoding."""
    for magic, packed in _MAGIC.items():
        if head.startswith(magic):
            return packed
    mark = next((mark for mark in _MARKS if head.startswith(mark)), None)
    found = _MARKS[mark] if mark else _guessed(head)
    setting = "utf-16" if mark and found != "utf-32" else found
    if not head or encoding in (found, setting) or (found is None and encoding != "utf-16"):
        return None
    if found is None:
        return "without a byte order mark", "set data.encoding to utf-16-le or utf-16-be, whichever it is"
    convert = f"convert it (iconv -f {found} -t utf-8)"
    if found == "utf-8":
        return "UTF-8", f"data.encoding is {encoding}, for all text files: convert the others to UTF-8 instead"
    if found == "utf-32":
        return "UTF-32", convert
    return found.upper(), f"set data.encoding to {setting} if all text files are like it, or {convert}"


def _guessed(head: bytes) -> str | None:
    """The encoding of text without a byte order mark; None if it is not one of ours or not text."""
    is_utf8 = _is_utf8(head)
    if is_utf8 and len(head) - len(head.translate(None, _CONTROLS)) <= _MOST_CONTROLS * len(head):
        return "utf-8"
    if b"\0" not in head:  # UTF-16 has them in line feeds and spaces at least
        return None
    strange, minus_alphabetic, encoding = min(_shares(head, encoding) for encoding in ("utf-16-le", "utf-16-be"))
    likely = strange <= _MOST_STRANGE and (not is_utf8 or -minus_alphabetic >= _LEAST_ALPHABETIC)
    return encoding if likely else None


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # accepts a character that is cut off at the end
    except UnicodeDecodeError:
        return False
    return True


def _shares(head: bytes, encoding: str) -> tuple[float, float, str]:
    """Measures of the bytes when they are read in an encoding.

    Returns the share of characters that no text holds, minus the share of characters of alphabetic scripts, and the
    name of the encoding, so that the most likely encoding has the smallest tuple.
    """
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    strange = sum(unicodedata.category(one) in ("Cc", "Cn", "Co") and one not in "\t\n\r\f" for one in text)
    size = max(1, len(text))
    return (strange + text.count("\ufffd")) / size, -sum(one < "\u2000" for one in text) / size, encoding
