"""Conditions on columns: held against Python's own comparisons, and what is refused."""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_contract.errors import UserError
from snakmodel.shards.condition import Condition

KEY = "data.where"
TYPES = {
    "score": pa.float64(),
    "size": pa.int64(),
    "name": pa.string(),
    "good": pa.bool_(),
    "day": pa.date32(),
    "year": pa.string(),
}
SCHEMA = pa.schema(list(TYPES.items()))
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
Holds = Callable[[dict[str, Any]], bool]
"""Says whether a row fulfils a condition."""

SMALL = st.integers(-3, 3)
FRACTIONS = st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0, float("inf")])
WORDS = st.sampled_from(["", "a", "b", "æ", "a'b", 'a"b', "\n", "é"])
DAYS = st.sampled_from([datetime.date(year, month, 28) for year in (1999, 2000, 2001) for month in (1, 12)])
ROW = st.fixed_dictionaries(
    {
        "score": st.none() | FRACTIONS | st.just(float("nan")),
        "size": st.none() | SMALL,
        "name": st.none() | WORDS,
        "good": st.none() | st.booleans(),
        "day": st.none() | DAYS,
        "year": st.none() | st.sampled_from(["1999", "2000-01-05", "2001-1"]),
    }
)


def of_column(name: str) -> st.SearchStrategy[tuple[str, Any, Callable[[Any], Any]]]:
    """A column with a value to compare it with, and what is compared of the values of the column."""
    itself: Callable[[Any], Any] = lambda value: value  # noqa: E731
    values = {
        "score": SMALL | FRACTIONS.filter(lambda value: value != float("inf")),
        "size": SMALL | st.sampled_from([-1.5, 0.5, 2.0]),
        "name": WORDS,
        "good": st.booleans(),
        "day": st.integers(1998, 2002),
        "year": st.integers(1998, 2002),
    }
    seen = {"day": lambda day: day.year, "year": lambda text: int(text[:4])}.get(name, itself)
    return values[name].map(lambda value: (name, value, seen))


COLUMN = st.sampled_from(list(TYPES)).flatmap(of_column)


@st.composite
def comparison(draw: st.DrawFn) -> tuple[str, Holds]:
    """A comparison, and what it means: it holds for no null."""
    name, value, seen = draw(COLUMN)
    written = draw(st.sampled_from([*OPERATORS, "in", "not in", "is None", "is not None", "chain", "alone"]))
    if written == "is None":
        return f"{name} is None", lambda row: row[name] is None
    if written == "is not None":
        return f"{name} is not None", lambda row: row[name] is not None
    if written == "alone":
        return "good", lambda row: row["good"] is True
    if written in ("in", "not in"):
        values = [value, draw(of_column(name))[1]]
        inside = written == "in"
        return (
            f"{name} {written} {values!r}",
            lambda row: row[name] is not None and (seen(row[name]) in values) is inside,
        )
    if written == "chain":
        other = draw(of_column(name))[1]
        return (
            f"{value!r} <= {name} < {other!r}",
            lambda row: row[name] is not None and value <= seen(row[name]) < other,
        )
    holds = OPERATORS[written]
    left, right = (name, repr(value)) if draw(st.booleans()) else (repr(value), name)
    sign = written if left == name else MIRRORED[written]
    return f"{left} {sign} {right}", lambda row: row[name] is not None and holds(seen(row[name]), value)


def joined(parts: st.SearchStrategy[tuple[str, Holds]]) -> st.SearchStrategy[tuple[str, Holds]]:
    """Conditions of conditions."""

    def both(word: str, how: Callable[[list[bool]], bool]) -> Callable[[list[tuple[str, Holds]]], tuple[str, Holds]]:
        return lambda some: (
            f" {word} ".join(f"({text})" for text, _ in some),
            lambda row: how([holds(row) for _, holds in some]),
        )

    several = st.lists(parts, min_size=2, max_size=3)
    negated = parts.map(lambda one: (f"not ({one[0]})", lambda row: not one[1](row)))
    return several.map(both("and", all)) | several.map(both("or", any)) | negated


@settings(max_examples=300, deadline=None)
@given(st.recursive(comparison(), joined, max_leaves=5), st.lists(ROW, max_size=12))
def test_what_a_condition_keeps(condition: tuple[str, Holds], rows: list[dict[str, Any]]) -> None:
    """The mask is that of Python's comparisons, row by row, and does not depend on the other rows."""
    text, holds = condition
    found = Condition(text, KEY)
    found.check(SCHEMA)
    columns = {name: pa.array([row[name] for row in rows], type_) for name, type_ in TYPES.items()}
    assert found.mask(columns).tolist() == [holds(row) for row in rows]
    assert set(found.columns) <= set(TYPES)


UTC = datetime.timezone.utc
NEW_YEAR = datetime.datetime(2020, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "values", "kept"),
    [
        ("x >= '2020-01-01'", pa.array([NEW_YEAR, None, NEW_YEAR.replace(year=2019)], pa.timestamp("us", "UTC")), [0]),
        ("x >= '2020-01-01 00:30'", pa.array([NEW_YEAR], pa.timestamp("us", "UTC")), []),
        ("x >= '2020-01-01 00:30+01:00'", pa.array([NEW_YEAR], pa.timestamp("us", "UTC")), [0]),
        ("x >= '2020-01-01'", pa.array([NEW_YEAR.replace(tzinfo=None)], pa.timestamp("s")), [0]),
        ("x < 2020", pa.array([NEW_YEAR, NEW_YEAR.replace(year=2019)], pa.timestamp("us", "UTC")), [1]),
        ("x == '2020-01-01'", pa.array([NEW_YEAR.date(), None]), [0]),
        ("x > 5", pa.array([4, None, 2**64 - 1], pa.uint64()), [2]),
        ("x == 18446744073709551615", pa.array([4, None, 2**64 - 1], pa.uint64()), [2]),
        ("x > 0.5", pa.array([2**62 + 1, None, 0]), [0]),
        ("x < 100000000000000000000", pa.array([1e20, 1e19, None]), [1]),
        ("x != 1", pa.array([None, 1, 2], pa.int8()), [2]),
        ("x is None", pa.array([None, [], ["a"]], pa.list_(pa.string())), [0]),
        ("x == 'a'", pa.array(["a", None], pa.large_string()), [0]),
        ("x == 'a'", pa.array(["a", "b"]).dictionary_encode(), [0]),
    ],
)
def test_columns_of_other_types(text: str, values: Any, kept: list[int]) -> None:
    """Moments, large whole numbers, mixed numbers and lists are compared as their values say."""
    condition = Condition(text, KEY)
    condition.check(pa.schema([("x", values.type)]))
    assert condition.mask({"x": values}).nonzero()[0].tolist() == kept


def test_a_slice_of_a_column() -> None:
    """Only the rows of the slice count."""
    values = pa.array([True, False, None, True, True])
    assert Condition("x", KEY).mask({"x": values.slice(2, 2)}).tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no condition"),
        ("score >", "is no condition"),
        ("score = 1", "is no condition"),
        ("score == 'a\0'", "is no condition"),
        ("(" * 300 + "good" + ")" * 300, "is no condition"),
        ("good" + " and (not good" * 150 + ")" * 150, "is n"),
        ("not " * 900 + "good", "is nested more than 100 levels deep"),
        ("not " * 30_000 + "good", "is n"),
        ("size == " + "-" * 1_000 + "1", "is nested more than 100 levels deep"),
        ("1", "which is no comparison"),
        ("'score > 1'", "which is no comparison"),
        ("score + 1 > 2", "not a column with a value"),
        ("score > size", "not a column with a value"),
        ("score.real > 1", "not a column with a value"),
        ("name[0] == 'a'", "not a column with a value"),
        ("len(name) > 1", "not a column with a value"),
        ("score > max(1, 2)", "which is no value"),
        ("name == f'{name}'", "which is no value"),
        ("name == b'a'", "neither text nor a number"),
        ("score == 1j", "neither text nor a number"),
        ("score in {1: 2}", "neither text nor a number"),
        ("score in [[1]]", "neither text nor a number"),
        ("len(name)", "which is no comparison"),
        ("__import__('os').remove(name)", "which is no comparison"),
        ("name.upper()", "which is no comparison"),
        ("lambda: good", "which is no comparison"),
        ("[good]", "which is no comparison"),
        ("(good := True)", "which is no comparison"),
        ("good if good else good", "which is no comparison"),
        ("-good", "which is no comparison"),
        ("'a' in name", "`in` needs a column on its left and a list of values on its right"),
        ("name in 'abc'", "`in` needs a column on its left and a list of values on its right"),
        ("name in []", "`in` needs a column on its left and a list of values on its right"),
        ("name in ['a', None]", "with None in the list; write `name is None` for it"),
        ("name is 'a'", "`is` is for None only"),
        ("name == None", "None needs `is`"),
        ("name == ['a']", "a list needs `in`"),
        ("size", "'size' alone, which holds int64"),
        ("size > 'a'", "compares the column 'size', which holds int64, with 'a'"),
        ("size == True", "compares the column 'size', which holds int64, with True"),
        ("size in [1, 'a']", "compares the column 'size', which holds int64, with 'a'"),
        ("size > 9223372036854775808", "compares the column 'size', which holds int64, with 9223372036854775808"),
        ("good > 0", "compares the column 'good', which holds bool, with 0"),
        ("score == 'high'", "compares the column 'score', which holds double, with 'high'"),
        ("name > 0.5", "compares the column 'name', which holds string, with 0.5"),
        (r"name == '\ud800'", "compares the column 'name'"),
        ("day > '2020-13'", "compares the column 'day', which holds date32[day], with '2020-13'"),
        ("day > 2020.5", "compares the column 'day', which holds date32[day], with 2020.5"),
        ("scores > 1", "names the column 'scores', but the columns there are score, size, name"),
        ("scores > 1", "did you mean score?"),
    ],
)
def test_what_is_refused_before_a_run_starts(text: str, says: str) -> None:
    """The text alone, or the types of the columns, tell that a condition is unfit; the message names the key."""
    with pytest.raises(UserError) as error:
        Condition(text, KEY).check(SCHEMA)
    assert str(error.value).startswith(f"{KEY}: ")
    assert says in str(error.value)


@pytest.mark.parametrize(
    "type_", [pa.time64("us"), pa.duration("s"), pa.list_(pa.int64()), pa.struct([("a", "int64")])]
)
def test_types_that_have_no_order(type_: Any) -> None:
    """Times of day, durations, lists and structs are not compared with numbers."""
    with pytest.raises(UserError, match=r"data\.where: 'x > 5' compares the column 'x'"):
        Condition("x > 5", KEY).check(pa.schema([("x", type_)]))


def test_strings_without_a_year() -> None:
    """A string that does not begin with a year is named; nulls and years pass."""
    condition = Condition("name >= 2020", KEY)
    assert condition.mask({"name": pa.array(["2020", None, "2019-05"])}).tolist() == [True, False, False]
    with pytest.raises(UserError, match=r"data\.where: .*it holds 'May 2020', which does not begin with a year"):
        condition.mask({"name": pa.array(["2020", None, "May 2020"])})
