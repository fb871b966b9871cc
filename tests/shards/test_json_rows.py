import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.shards import json_rows
from snakmodel.shards.json_rows import further_columns
from snakmodel.shards.json_rows import json_rows as rows

DAY = datetime.date(2024, 2, 29)
FORMS: dict[str, tuple[pa.DataType, Any, Any]] = {
    "an integer": (pa.uint64(), 2**64 - 1, 2**64 - 1),
    "a boolean": (pa.bool_(), True, True),
    "a double": (pa.float64(), 0.1, 0.1),
    "a string": (pa.string(), 'æ "\u2028\n', 'æ "\u2028\n'),
    "a view of a string": (pa.string_view(), "a string that is not short", "a string that is not short"),
    "a date": (pa.date32(), DAY, "2024-02-29"),
    "a date in milliseconds": (pa.date64(), DAY, "2024-02-29"),
    "a timestamp": (pa.timestamp("s"), datetime.datetime(2024, 2, 29, 1, 2, 3), "2024-02-29T01:02:03"),
    "nanoseconds": (pa.timestamp("ns"), 1, "1970-01-01T00:00:00.000000001"),
    "a time zone": (pa.timestamp("us", "Europe/Copenhagen"), 10**6, "1970-01-01T01:00:01+01:00"),
    "a time": (pa.time32("s"), datetime.time(1, 2, 3), "01:02:03"),
    "a decimal": (pa.decimal128(30, 2), decimal.Decimal("12345678901234567890123.10"), "12345678901234567890123.10"),
    "bytes": (pa.binary(), b"\xff\x00", "/wA="),
    "a UUID": (pa.uuid(), bytes(range(16)), "00010203-0405-0607-0809-0a0b0c0d0e0f"),
    "not a number": (pa.float32(), float("nan"), None),
    "infinity in a list": (pa.list_(pa.float64()), [1.5, float("-inf")], [1.5, None]),
    "a struct": (
        pa.struct([("a", pa.list_(pa.date32())), ("b", pa.binary()), ("c", pa.float64())]),
        {"a": [DAY, None], "b": b"x", "c": float("inf")}, {"a": ["2024-02-29", None], "b": "eA==", "c": None}),
    "a map": (pa.map_(pa.string(), pa.int64()), [("k", 1), ("k", 2)], [["k", 1], ["k", 2]]),
    "a dictionary": (pa.dictionary(pa.int8(), pa.string()), "x", "x"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back_as_a_plain_json_value(form: str, tmp_path: Path) -> None:
    """What a strict JSON reader gets for a value, and null for a null."""
    kind, value, expected = FORMS[form]
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    column = pa.array([value, None], storage)
    column = pa.ExtensionArray.from_storage(kind, column) if storage != kind else column
    batch = pa.record_batch([column, pa.array([1, 2])], names=["column", "n"])
    assert further_columns(batch.schema, tmp_path) == [0, 1]

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = [json.loads(row, parse_constant=refuse) for row in rows(batch, tmp_path)]
    assert found == [{"column": expected, "n": 1}, {"column": None, "n": 2}]


def test_rows_are_those_of_json_dumps_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain values in the order of the columns, as Python's json writes them without ensure_ascii."""
    values = [{"b": f"ø{number}", "a": [{"c": number}, None]} for number in range(50)]
    batch = pa.RecordBatch.from_pylist(values)
    for most in (1, 7, 1000):
        monkeypatch.setattr(json_rows, "_AT_ONCE", most)
        assert list(rows(batch, tmp_path)) == [json.dumps(value, ensure_ascii=False).encode() for value in values]


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    """Spans of time, also within a list, two columns of one name, and values beyond Python's name the column."""
    path = tmp_path / "a.arrow"
    for kind in (pa.duration("s"), pa.list_(pa.struct([("a", pa.duration("ms"))])), pa.month_day_nano_interval()):
        with pytest.raises(UserError, match=r"a\.arrow: column 'span' holds (duration|month_day).*no form in JSON"):
            further_columns(pa.schema([("text", pa.string()), ("span", kind)]), path)
    with pytest.raises(UserError, match=r"a\.arrow has several columns named 'id'"):
        further_columns(pa.schema([("text", pa.string()), ("id", pa.int64()), ("id", pa.string())]), path)
    far = pa.record_batch({"id": [1], "when": pa.array([2**60], pa.timestamp("s"))})
    with pytest.raises(UserError, match=r"a\.arrow: a value in column 'when' cannot be written as JSON"):
        list(rows(far, path))
    broken = pa.record_batch({"id": [1], "name": pa.array([b"\xff"]).view(pa.string())})
    with pytest.raises(UserError, match=r"a\.arrow: a value in column 'name' cannot be written as JSON"):
        list(rows(broken, path))
