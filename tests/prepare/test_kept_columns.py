"""Columns that shards keep: the same for every cut, equal to what Python and pyarrow read, and what is refused."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_contract.errors import UserError
from snakmodel.prepare.input_files import input_files, plan_shards
from snakmodel.prepare.kept_columns import KeptColumn, Misfit, check_condition, from_json, kept_columns
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard import prepare
from snakmodel.prepare.shard_writer import Cleaning, Columns, ShardCounts
from snakmodel.shards.condition import Condition

UTC = datetime.timezone.utc
DAY, MOMENT = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30, tzinfo=UTC)


def columns_of(folder: Path, *keep: Any, encoding: str = "utf-8") -> tuple[KeptColumn, ...]:
    """The columns to keep of all files of a folder, as the command line passes them on."""
    kept = kept_columns(keep, input_files(folder, None), encoding)
    assert tuple(KeptColumn.of(str(one)) for one in kept) == kept
    return kept


def shards(
    folder: Path, *keep: Any, number: int = 1, errors: str = "error", where: str | None = None, encoding: str = "utf-8"
) -> tuple[pa.Table, ShardCounts]:
    """All shards of a folder, one after the other, and the sum of their counts."""
    kept = columns_of(folder, *keep, encoding=encoding)
    columns = Columns(kept, folder, Condition(where, "data.where") if where else None)
    tables, total = [], ShardCounts()
    for index, parts in enumerate(plan_shards(folder, None, number, 1, encoding=encoding)):
        output = folder.parent / f"shard-{number}-{index}"
        reading = Reading(errors=errors, keep=kept, encoding=encoding)
        total.add(prepare(parts, output, reading, Cleaning(), columns))
        with pa.ipc.open_stream(f"{output}.arrow") as reader:
            tables.append(reader.read_all())
    assert all(table.schema.equals(columns.schema) for table in tables)
    return pa.concat_tables(tables), total


def json_file(folder: Path, values: Sequence[Any], name: str = "a.jsonl") -> Path:
    """A file with these values under x; those that are bytes are whole lines."""
    path = folder / "raw" / name
    path.parent.mkdir(exist_ok=True)
    lines = [one if isinstance(one, bytes) else json.dumps({"text": f"nr {i}", "x": one}).encode()
             for i, one in enumerate(values)]  # fmt: skip
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path.parent


def write_table(path: Path, table: pa.Table, rows: int = 2) -> Path:
    """Write a table in row groups or record batches of a few rows."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path.parent


def table_file(folder: Path, values: pa.Array, name: str = "a.parquet") -> Path:
    """A table with these values in the column x."""
    texts = pa.array([f"nr {i}" for i in range(len(values))])
    return write_table(folder / "raw" / name, pa.table({"text": texts, "x": values}))


def mixed(folder: Path) -> tuple[Path, dict[str, tuple[Any, Any]]]:
    """A folder with a file of each format, and the score and date of each document by its id."""
    raw, expected = folder / "raw", {}
    (raw / "b").mkdir(parents=True)
    rows = [{"text": f"Linje {i} æ\nnr 2", "score": i / 3 if i % 5 else None, "date": f"20{i % 30:02d}"}
            for i in range(120)]  # fmt: skip
    for row in rows[::4]:
        row.pop("date")
    position = 0
    with (raw / "a.jsonl").open("wb") as plain, gzip.open(raw / "b" / "c.jsonl.gz", "wb") as packed:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            plain.write(line)
            packed.write(line)
            for name in ("a.jsonl", "b/c.jsonl.gz"):
                expected[f"{name}:{position}"] = row["score"], row.get("date")
            position += len(line)
    table = pa.Table.from_pylist(
        rows, pa.schema([("date", pa.string()), ("score", pa.float32()), ("text", pa.string())])
    )
    for name in ("b/d.parquet", "b/e.arrow"):
        write_table(raw / name, table, 7)
        scores = table["score"].to_pylist()
        expected |= {f"{name}:{i}": (scores[i], row.get("date")) for i, row in enumerate(rows)}
    (raw / "f.txt").write_text("en\nto\n\ntre\n")
    expected |= dict.fromkeys(["f.txt:0", "f.txt:3", "f.txt:7"], (None, None))
    return raw, expected


@pytest.mark.parametrize("number", [1, 2, 5])
def test_files_of_all_formats(tmp_path: Path, number: int) -> None:
    """Each document has its own values and a way back to it, whatever the number of shards and the format."""
    raw, expected = mixed(tmp_path)
    found, _ = shards(raw, "score?", "date?", number=number)
    assert found.column_names == ["text", "source", "id", "score", "date"]
    rows = found.to_pylist()
    assert [row["id"] for row in rows] == list({row["id"]: None for row in rows})
    assert {row["id"]: (row["score"], row["date"]) for row in rows} == expected
    for row in rows:
        name, _, position = row["id"].rpartition(":")
        if name.endswith(".txt"):
            assert (raw / name).read_text()[int(position) :].startswith(row["text"])
        elif ".jsonl" in name:
            content = (raw / name).read_bytes()
            content = gzip.decompress(content) if name.endswith(".gz") else content
            assert json.loads(content[int(position) :].split(b"\n")[0])["text"] == row["text"]
        else:
            assert row["text"].startswith(f"Linje {position} ")
    assert found == shards(raw, "score?", "date?", number=3)[0]


def test_a_condition_on_kept_columns(tmp_path: Path) -> None:
    """Documents for which it does not hold are counted and left out, with all their columns."""
    raw, expected = mixed(tmp_path)
    found, counts = shards(raw, "score?", "date?", number=4, where="score > 10 and date is not None")
    wanted = {key for key, (score, date) in expected.items() if score is not None and score > 10 and date is not None}
    assert set(found["id"].to_pylist()) == wanted
    assert (counts.documents, counts.unwanted) == (len(wanted), len(expected) - len(wanted))
    check_condition("score > 10 and source == 'b'", columns_of(raw, "score?"))
    with pytest.raises(UserError, match=r"data\.where: .*'scores', but .* source, score; did you mean score\?"):
        check_condition("scores > 10", columns_of(raw, "score?"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800æ"),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_json_values_are_kept_whole(value: Any) -> None:
    """What is kept as JSON reads back as the value that Python's parser gives, also halves of surrogate pairs."""
    read = json.loads(json.dumps(value))
    text = pa.array([from_json(KeptColumn("x", pa.large_string()), {"x": read})], pa.large_string())[0].as_py()
    assert (text is None) if value is None else repr(json.loads(text)) == repr(read)


FITTING: dict[str, tuple[list[Any], Any, list[Any]]] = {
    "whole numbers": ([1, None, -(2**63), 2**63 - 1], pa.int64(), [1, None, -(2**63), 2**63 - 1]),
    "numbers": ([1, 0.5, None, 1e300], pa.float64(), [1.0, 0.5, None, 1e300]),
    "truth values": ([True, None, False], pa.bool_(), [True, None, False]),
    "texts": (["æ", "", None, "a\0b"], pa.string(), ["æ", "", None, "a\0b"]),
    "nulls": ([None, None], pa.string(), [None, None]),
    "objects and lists": ([{"b": [1], "a": None}, [2**70]], pa.large_string(), ['{"b": [1], "a": null}', f"[{2**70}]"]),
}


@pytest.mark.parametrize("case", FITTING)
def test_types_that_json_files_tell(tmp_path: Path, case: str) -> None:
    """A key has the type of the values in the first lines, and its values are those of the file."""
    values, type_, kept = FITTING[case]
    found, _ = shards(json_file(tmp_path, values), "x")
    assert (found["x"].type, found["x"].to_pylist()) == (type_, kept)


DECLARED: dict[str, tuple[str, list[Any], list[Any], list[Any]]] = {
    "whole numbers": ("int", [1, None], [1, None], [2**63, -(2**63) - 1, 1.0, "1", True]),
    "numbers": ("float", [1, 2**70, 0.1], [1.0, float(2**70), 0.1], [10**400, "1", True, [1]]),
    "texts": ("string", ["1", None], ["1", None], ["\ud800", 1, {}, []]),
    "truth values": ("bool", [True, False], [True, False], [1, 0, "true"]),
    "days": (
        "date",
        ["2024-02-29", "2024-02-29T23:00:00+01:00", "2024-02-29 12:00", "2024-02-29T12:30:00Z", None],
        [DAY, DAY, DAY, DAY, None],
        ["2023-02-29", "29.2.2024", 2024, ""],
    ),
    "moments": (
        "timestamp",
        ["2024-02-29T12:30", "2024-02-29T13:30:00+01:00", "2024-02-29T12:30:00Z", MOMENT.timestamp(), 0, -1.5, None],
        [MOMENT, MOMENT, MOMENT, MOMENT, datetime.datetime(1970, 1, 1, tzinfo=UTC),
         datetime.datetime(1969, 12, 31, 23, 59, 58, 500_000, UTC), None],
        ["", "noon", 1e20, True, "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00", [0]],
    ),
    "anything": ("json", ["1", 1, None, [None], True], ['"1"', "1", None, "[null]", "true"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
def test_declared_types_of_json(tmp_path: Path, case: str) -> None:
    """Values that fit are kept; the others are refused with file, line and key, or left out if the policy is skip."""
    name, fitting, kept, others = DECLARED[case]
    found, counts = shards(json_file(tmp_path, [*fitting, *others]), {"x": name}, errors="skip")
    assert found["x"].to_pylist() == kept
    assert (counts.skipped, counts.documents) == (len(others), len(fitting))
    for value in others:
        with pytest.raises(UserError, match=rf"a\.jsonl: line 2 has .* under 'x', which is no {name}"):
            shards(json_file(tmp_path, [fitting[0], value]), {"x": name})


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """Python's parser reads NaN and infinities; so they are kept as floats."""
    raw = json_file(tmp_path, [0.5, math.inf, -math.inf, math.nan])
    assert repr(shards(raw, "x")[0]["x"].to_pylist()) == "[0.5, inf, -inf, nan]"


def test_lines_that_cannot_be_read_for_their_columns(tmp_path: Path) -> None:
    """Numbers and nesting beyond Python's limits end in a message, or are left out."""
    deep = b'{"text": "t", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    long = b'{"text": "t", "x": ' + b"9" * 5_000 + b"}"
    raw = json_file(tmp_path, [1, deep, long, 2])
    found, counts = shards(raw, "x", errors="skip")
    assert (found["x"].to_pylist(), counts.invalid) == ([1, 2], {"column that cannot be read": 2})
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 holds values that cannot be kept in columns"):
        shards(raw, "x")


def test_marks_and_double_keys(tmp_path: Path) -> None:
    """A byte order mark before a line does no harm, and of two equal keys the last one counts, as in Python."""
    mark = b"\xef\xbb\xbf"
    raw = json_file(tmp_path, [mark + b'{"text": "t", "x": 1}', mark + b'{"text": "t", "x": 2, "x": 3}', b""])
    assert shards(raw, "x")[0]["x"].to_pylist() == [1, 3]


def test_json_in_another_encoding(tmp_path: Path) -> None:
    """The keys of a file in UTF-16 are found and kept."""
    raw = json_file(tmp_path, ["æ"])
    (raw / "a.jsonl").write_text('{"text": "å", "x": "æ"}\n{"text": "ø", "x": "☃"}\n', encoding="utf-16")
    assert shards(raw, "x", encoding="utf-16")[0]["x"].to_pylist() == ["æ", "☃"]


def test_a_first_line_that_is_longer_than_the_head(tmp_path: Path) -> None:
    """The types are told from whole lines, however long the first one is."""
    raw = json_file(tmp_path, [json.dumps({"text": "t" * (1 << 21), "x": 1}).encode(), 2])
    assert shards(raw, "x")[0]["x"].to_pylist() == [1, 2]


def test_files_without_documents(tmp_path: Path) -> None:
    """Empty files, and those of blank lines, lack no column."""
    raw = json_file(tmp_path, [1])
    for name in ("empty.jsonl", "empty.txt"):
        (raw / name).write_bytes(b"")
    (raw / "blank.jsonl").write_bytes(b"\n\n")
    assert shards(raw, "x")[0]["x"].to_pylist() == [1]


def test_absent_keys(tmp_path: Path) -> None:
    """A document without a key has null if the key is optional; otherwise it is refused, with the way out."""
    raw = json_file(tmp_path, [1, b'{"text": "t"}'])
    assert shards(raw, "x?")[0]["x"].to_pylist() == [1, None]
    assert shards(raw, "x", errors="skip")[1].invalid == {"column that does not fit": 1}
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 has no key 'x', which data\.keep names; write \"x\?\""):
        shards(raw, "x")


TABLES: dict[str, tuple[pa.Array, Any]] = {
    "a dictionary": (pa.array(["a", None, "b", "a"]).dictionary_encode(), pa.string()),
    "a dictionary of numbers": (pa.array([1, None, 1]).dictionary_encode(), pa.int64()),
    "strings": (pa.array(["æ", None, ""]), pa.string()),
    "large strings": (pa.array(["æ", None, ""], pa.large_string()), pa.string()),
    "views": (pa.array(["æ", None, "a string that is not short"], pa.string_view()), pa.string()),
    "bytes": (pa.array([b"\xff", None, b""]), pa.binary()),
    "small numbers": (pa.array([1, None, -128], pa.int8()), pa.int64()),
    "large numbers": (pa.array([1, None, 2**64 - 1], pa.uint64()), pa.uint64()),
    "floats": (pa.array([0.1, None, 3.0], pa.float32()), pa.float64()),
    "truth values": (pa.array([True, None, False]), pa.bool_()),
    "nulls": (pa.nulls(3), pa.string()),
    "days": (pa.array([DAY, None]), pa.date32()),
    "moments": (pa.array([MOMENT, None], pa.timestamp("us", "Europe/Copenhagen")), None),
    "local moments": (pa.array([MOMENT.replace(tzinfo=None), None], pa.timestamp("us")), None),
    "times": (pa.array([datetime.time(1, 2), None]), None),
    "decimals": (pa.array([decimal.Decimal("1.50"), None]), None),
    "lists": (pa.array([[1, None], None, []]), None),
    "structs": (pa.array([{"a": {"b": [0.5]}}, None, {"a": None}]), None),
    "maps": (pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())), None),
    "UUIDs": (pa.array([uuid.UUID(int=7).bytes, None], pa.uuid()), None),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("case", TABLES)
def test_columns_of_tables(tmp_path: Path, case: str, suffix: str) -> None:
    """Values are those that pyarrow reads, in the same type but for dictionaries, widths and nulls."""
    values, type_ = TABLES[case]
    raw = table_file(tmp_path, values, f"a.{suffix}")
    found, _ = shards(raw, "x")
    assert found["x"].to_pylist() == values.to_pylist()
    assert found["x"].type == (values.type if type_ is None else type_)
    assert found["id"].to_pylist() == [f"a.{suffix}:{i}" for i in range(len(values))]
    assert shards(raw, "x", number=2)[0] == found


def test_rows_that_are_left_out(tmp_path: Path) -> None:
    """The other rows keep their own values and numbers."""
    table = pa.table({"text": ["a", None, "c", " ", "e"], "x": [1, 2, None, 4, 5]})
    for suffix in ("parquet", "arrow"):
        found, _ = shards(write_table(tmp_path / suffix / f"a.{suffix}", table), "x", errors="skip")
        assert found.select(["id", "x"]).to_pylist() == [
            {"id": f"a.{suffix}:0", "x": 1}, {"id": f"a.{suffix}:2", "x": None}, {"id": f"a.{suffix}:4", "x": 5}
        ]  # fmt: skip


def test_types_in_several_files(tmp_path: Path) -> None:
    """Whole numbers and floats become floats, and nulls take the type of the others."""
    table_file(tmp_path, pa.array([1, 2]))
    table_file(tmp_path, pa.nulls(1), "b.arrow")
    raw = json_file(tmp_path, [0.5, None], "c.jsonl")
    assert shards(raw, "x")[0]["x"].to_pylist() == [1.0, 2.0, None, 0.5, None]


def test_nested_columns_of_several_tables(tmp_path: Path) -> None:
    """Parquet names the values of lists otherwise than Arrow; the type is the same."""
    values = pa.array([[{"a": [1]}], None])
    table_file(tmp_path, values, "a.parquet")
    raw = table_file(tmp_path, values, "b.arrow")
    assert shards(raw, "x")[0]["x"].to_pylist() == values.to_pylist() * 2


def test_declared_types_of_tables(tmp_path: Path) -> None:
    """Values are cast where Arrow can do it without a loss; what it cannot is refused, with the file."""
    raw = table_file(tmp_path, pa.array(["2024-02-29", None]))
    assert shards(raw, {"x": "date"})[0]["x"].to_pylist() == [DAY, None]
    with pytest.raises(UserError, match=r"a\.parquet: column 'x' holds string, which cannot be kept as int"):
        shards(raw, {"x": "int"})
    table_file(tmp_path, pa.array([1.0, 0.5]))
    with pytest.raises(UserError, match=r"a\.parquet: column 'x' holds double, which cannot be kept as int"):
        shards(raw, {"x": "int"})
    table_file(tmp_path, pa.array([{"a": 1}]))
    with pytest.raises(UserError, match=r"a\.parquet: column 'x' holds struct<a: int64>, which cannot be kept as json"):
        columns_of(raw, {"x": "json"})


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    """A file without a column is named with the columns that it has, and so is a column that no file has."""
    raw = json_file(tmp_path, [1])
    with pytest.raises(
        UserError, match=r"data\.keep: .*a\.jsonl has no column 'xx'; its columns are 'text', 'x' \(did"
    ):
        columns_of(raw, "xx")
    with pytest.raises(UserError, match=r"no file has a column 'xx'; .* are: text, x \(did you mean 'x'\?\)"):
        columns_of(raw, "xx?")
    (raw / "b.txt").write_text("Tekst\n")
    with pytest.raises(UserError, match=r"data\.keep: .*b\.txt has no column 'x'; a text file has no columns\. Write"):
        columns_of(raw, "x")
    kept = columns_of(raw, "x?")
    parts = plan_shards(raw, None, 1, 1)[0]
    needed = (KeptColumn("x", kept[0].type),)
    with pytest.raises(UserError, match=r"b\.txt is a text file, which has no column 'x'; write \"x\?\""):
        prepare(parts, tmp_path / "out", Reading(keep=needed), Cleaning(), Columns(needed, raw))
    assert not (tmp_path / "out.arrow").exists()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_lost_a_column(tmp_path: Path, suffix: str) -> None:
    """A table without a column is refused when it is read, too; with a `?` its documents have nulls."""
    table_file(tmp_path, pa.array([1]), f"a.{suffix}")
    raw = write_table(tmp_path / "raw" / f"b.{suffix}", pa.table({"text": ["b"]}))
    assert shards(raw, "x?")[0]["x"].to_pylist() == [1, None]
    needed = (KeptColumn("x", pa.int64()),)
    with pytest.raises(UserError, match=rf"b\.{suffix} has no column 'x', which data\.keep names; its columns"):
        prepare(
            plan_shards(raw, None, 1, 1)[0], tmp_path / "out", Reading(keep=needed), Cleaning(), Columns(needed, raw)
        )


def test_two_types_of_one_column(tmp_path: Path) -> None:
    """Two types in one file are named with the line, two in two files with both files; json keeps them all the same."""
    raw = json_file(tmp_path, [1, None, "a"])
    with pytest.raises(UserError, match=r"'x' holds int in .*a\.jsonl and string in .*a\.jsonl: line 3; one column"):
        columns_of(raw, "x")
    assert shards(raw, {"x": "json"})[0]["x"].to_pylist() == ["1", None, '"a"']
    json_file(tmp_path, [1])
    json_file(tmp_path, [True], "b.jsonl")
    with pytest.raises(UserError, match=r"'x' holds int in .*a\.jsonl and bool in .*b\.jsonl; one column has one type"):
        columns_of(raw, "x")
    assert shards(raw, {"x": "json"})[0]["x"].to_pylist() == ["1", "true"]


def test_a_table_that_is_damaged(tmp_path: Path) -> None:
    """A file that is no table is named when the run is planned."""
    for suffix in ("parquet", "arrow"):
        raw = tmp_path / suffix
        raw.mkdir()
        (raw / f"a.{suffix}").write_bytes(b"no table at all")
        with pytest.raises(UserError, match=rf"a\.{suffix} cannot be read"):
            columns_of(raw, "x")


@pytest.mark.parametrize("word", ["x", "x=", "x=integer", "x=arrow:", "x=arrow:###", "x=arrow:AAAA"])
def test_words_that_spell_no_column(word: str) -> None:
    """The command line names the types that there are."""
    with pytest.raises(UserError, match=r"--keep .*: write NAME=TYPE; the types are string, int, float, bool, date"):
        KeptColumn.of(word)


@pytest.mark.parametrize("name", ["a=b", "æ ø", "=", "a?b", "a:b"])
def test_odd_names(name: str) -> None:
    """Names survive the command line, whatever they hold and whatever the length of the spelled type."""
    for type_ in (pa.int64(), *(pa.decimal128(n, 2) for n in (5, 6)), *(pa.timestamp("s", "A" * n) for n in (1, 2, 3))):
        for optional in (True, False):
            column = KeptColumn(name, type_, optional)
            assert KeptColumn.of(str(column)) == column


def test_a_misfit_says_no_place() -> None:
    """The message is completed by who knows the place."""
    with pytest.raises(Misfit, match=r"^has 1 under 'x', which is no string"):
        from_json(KeptColumn("x", pa.string()), {"x": 1})


def test_a_column_that_a_table_has_twice(tmp_path: Path) -> None:
    """Nothing says which of the two is meant, so it is refused when the run is planned."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["u"]), pa.array(["v"])], names=["text", "url", "url"])
    (tmp_path / "web").mkdir()
    pa.parquet.write_table(table, tmp_path / "web" / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns named 'url'"):
        kept_columns(["url"], input_files(tmp_path, None), "utf-8")


def test_a_key_that_only_later_documents_have(tmp_path: Path) -> None:
    """Beyond the part of a file that planning reads, an optional key is kept if the recipe names its type."""
    (tmp_path / "web").mkdir()
    many = [{"text": "x" * 1000}] * 1100
    lines = [json.dumps(one) for one in (*many, {"text": "last", "url": "u"})]
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(lines) + "\n")
    files = input_files(tmp_path, None)
    with pytest.raises(UserError, match=r'no file has a column .url..*give its type: `"url\?": string`'):
        kept_columns(["url?"], files, "utf-8")
    kept = kept_columns([{"url?": "string"}], files, "utf-8")
    (parts,) = plan_shards(tmp_path, None, 1, 1)
    prepare(parts, tmp_path / "out", Reading(keep=kept), Cleaning(), Columns(kept, tmp_path))
    with pa.ipc.open_stream(str(tmp_path / "out.arrow")) as reader:
        urls = reader.read_all().column("url").to_pylist()
    assert urls == [None] * 1100 + ["u"]
