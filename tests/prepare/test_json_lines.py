"""One verdict for each line of JSON, whatever its neighbours are, from the reader of raw files and the tokenizer's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llm.data.document_blocks import Block, columns
from run_contract.errors import UserError
from snakmodel.prepare.byte_streams import TextFile
from snakmodel.prepare.chunks import Faults
from snakmodel.prepare.json_lines import json_lines


def nested(depth: int, start: str = "[", end: str = "]") -> bytes:
    """A line with brackets so deep in one another."""
    return f'{{"n": {start * depth}{end * depth}, "text": "a"}}'.encode()


ACCEPTED = {
    "whole number of 5,000 digits": b'{"n": ' + b"9" * 5000 + b', "text": "a"}',
    "negative number of 5,000 digits": b'{"n": -' + b"9" * 5000 + b', "text": "a"}',
    "fraction of 5,000 digits": b'{"n": 0.' + b"9" * 5000 + b', "text": "a"}',
    "big exponent": b'{"n": 1e999, "text": "a"}',
    "very big exponent": b'{"n": -1E+99999999999, "text": "a"}',
    "very small exponent": b'{"n": 1e-99999999999, "text": "a"}',
    "NaN and Infinity": b'{"n": [NaN, Infinity, -Infinity], "text": "a"}',
    "2,000 brackets": nested(2000),
    "2,000 objects": nested(2000, '{"n": [', "]}"),
    "100,000 brackets behind a byte order mark": b"\xef\xbb\xbf " + nested(100_000),
    "Inf": b'{"n": Inf, "text": "a"}',
    "-Inf": b'{"n": [-Inf ], "text": "a"}',
    "-NaN": b'{"n": -NaN, "text": "a"}',
    "the key twice": b'{"text": 5, "text": "a"}',
    "the key twice, spelled otherwise": b'{"te\\u0078t": "b", "text": "a"}',
    "another key twice": b'{"n": 1, "n": "x", "text": "a"}',
    "lone surrogate in another value": b'{"n": "\\ud800", "text": "a"}',
    "lone surrogate in a key": b'{"\\udc00": 1, "text": "a"}',
    "byte order mark before it": b'\xef\xbb\xbf{"text": "a"}',
    "white space around it": b'\t {"text"\r:"a"} \r',
    "3,000 keys": b"{" + b"".join(b'"%d": 1, ' % number for number in range(3000)) + b'"text": "a"}',
    "an empty key": b'{"": {"text": 5}, "text": "a"}',
}
REFUSED = {
    "100,000 brackets, never closed": b'{"n": ' + b"[" * 100_000,
    "2,000 brackets and a wrong one": nested(2000)[:-1] + b"]}",
    "2,000 brackets as the text": b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "2,000 brackets without the text": b'{"n": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "wide space before it": '\u3000{"text": "a"}'.encode(),
    "form feed before 2,000 brackets": b"\x0c" + nested(2000),
    "two byte order marks": b"\xef\xbb\xbf" * 2 + b'{"text": "a"}',
    "twice a minus": b'{"n": --Infinity, "text": "a"}',
    "nan": b'{"n": nan, "text": "a"}',
    "lone surrogate": b'{"text": "a\\ud800"}',
    "surrogates the wrong way round": b'{"text": "\\udc00\\ud800"}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "invalid UTF-8 elsewhere": b'{"n": "\xff", "text": "a"}',
    "a surrogate as UTF-8": b'{"n": "\xed\xa0\x80", "text": "a"}',
    "trailing garbage": b'{"text": "a"} x',
    "one brace more": b'{"text": "a"}}',
    "byte order mark after it": b'{"text": "a"}\xef\xbb\xbf',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "two objects and null": b'{"text": "a"} null {"text": "b"}',
    "trailing comma": b'{"text": "a",}',
    "tab in a string": b'{"text": "a\tb"}',
    "NUL in a string": b'{"text": "a\x00b"}',
    "NUL after it": b'{"text": "a"}\x00',
    "control character elsewhere": b'{"n": "\x01", "text": "a"}',
    "unknown escape": b'{"text": "\\x41"}',
    "cut escape": b'{"text": "\\u12"}',
    "leading zero": b'{"n": 01, "text": "a"}',
    "no digit after the point": b'{"n": 1., "text": "a"}',
    "comment": b'{"text": "a" /* b */}',
    "single quotes": b"{'text': 'a'}",
    "never closed": b'{"text": "a"',
    "a list": b'["text"]',
    "a string": b'"text"',
    "a number of 5,000 digits": b"9" * 5000,
    "null": b"null",
    "an empty object": b"{}",
    "the text is null": b'{"text": null}',
    "the text is a number of 5,000 digits": b'{"text": ' + b"9" * 5000 + b"}",
    "the text is an object": b'{"text": {"text": "a"}}',
    "the last of two is null": b'{"text": "a", "text": null}',
}
BLANK = {"empty": b"", "carriage return": b"\r", "spaces": b" \t ", "wide space": "\u3000".encode()}
GOOD = b'{"id": [1, {"x": "{"}], "text": "good"}'
PLACES = {"alone": (0, 0), "first": (0, 2), "in the middle": (2, 2), "last": (2, 0)}


def prepared(block: bytes) -> tuple[list[str], int]:
    """What the reader of raw files makes of a block under errors: skip: texts, and the number of lines left out."""
    faults = Faults("skip")
    chunks = json_lines(block, 0, TextFile(Path("a.jsonl")), "text", faults)
    return [text for chunk in chunks for text in chunk.texts.to_pylist()], faults.skipped


def tokenised(block: bytes) -> list[str]:
    """What the tokenizer's reader makes of it."""
    found: list[str] = columns(Block("a.jsonl, line", 1, block), ["text"]).texts["text"].to_pylist()
    return found


@pytest.mark.parametrize("neighbour", [GOOD, GOOD + b" "])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("place", PLACES)
def test_a_line_has_one_verdict_wherever_it_stands(place: str, end: bytes, neighbour: bytes) -> None:
    """Both readers take every line of the first kind and of the third, and refuse the second, in every company.

    The second neighbour, with white space at its end, has each line of its block read alone.
    """
    before, after = PLACES[place]
    line_end = end or b"\n"
    around = ["good"] * before, ["good"] * after
    for kind, lines in (("accepted", ACCEPTED), ("refused", REFUSED), ("blank", BLANK)):
        for name, line in lines.items():
            block = line_end.join([neighbour] * before + [line] + [neighbour] * after) + end
            if not block:
                continue
            kept = [*around[0], *(["a"] if kind == "accepted" else []), *around[1]]
            assert prepared(block) == (kept, int(kind == "refused")), (name, place)
            if kind != "refused":
                assert tokenised(block) == kept, (name, place)
                continue
            with pytest.raises(UserError, match=rf"a\.jsonl, line {before + 1}( is|:) "):
                tokenised(block)


@pytest.mark.parametrize("policy", ["error", "replace"])
def test_a_refused_line_is_refused_by_name(policy: str) -> None:
    """What is left out under `skip` is an error under the other policies, but for what `replace` can mend."""
    mended = {name for name in REFUSED if "UTF-8" in name or "surrogate" in name or "NUL in" in name}
    for name, line in REFUSED.items():
        faults = Faults(policy)
        if policy == "replace" and name in mended:
            continue
        file = TextFile(Path("/dev/null"))
        with pytest.raises(Exception, match=r"/dev/null: (line|byte)"):
            list(json_lines(GOOD + b"\n" + line, 0, file, "text", faults))
    assert len(mended) == 6


def test_ordinary_blocks_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and brackets that Python's parser does not take do not slow a block down."""
    monkeypatch.setattr("snakmodel.prepare.json_lines._each", None)
    monkeypatch.setattr("megatron_llm.data.json_lines.parse_line_by_line", None)
    lines = [GOOD, b'{"text": "a", "n": [-1, NaN, Infinity, Inf]}', nested(2000)]
    block = b"\n".join(lines) + b"\n"
    assert prepared(block)[0] == tokenised(block)
    assert len(tokenised(block)) == len(lines)
