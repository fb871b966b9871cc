"""Conditions on the columns of documents, such as `score > 0.5 and date >= 2020`, as a recipe writes them.

A condition is written like one of Python: comparisons (== != < <= > >=, `in`, `is None`) of columns with values, joined
by `and`, `or`, `not` and parentheses. A document for which a comparison meets a null fails that comparison. A column of
strings or dates is compared with a whole number by its year, so that `date >= 2020` means what it says. A column of
moments is compared with a text such as "2020-01-31 12:00", which is in UTC if it names no other zone. A column of whole
numbers and a number with a fraction are compared in double precision, and so are a column of floats and any number.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from run_contract.errors import UserError

_COMPARISONS: Mapping[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
"""Maps comparisons to the names of Arrow's functions."""
_MIRRORED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_HELP = (
    "write comparisons of columns with values, such as: score > 0.5 and date >= 2020 and licence in ['cc0', 'cc-by']"
)
_YEAR = r"^(?P<year>\d{4})(?:-|$)"
_MOST_LEVELS = 100
"""The number of levels to which a condition may be nested. Python's stack has room for some ten times as many."""


class Condition:
    """A condition that documents fulfil or not."""

    def __init__(self, text: str, key: str) -> None:
        """`key` names the setting in messages. Raises UserError if the text is no condition."""
        self.text, self.key = text, key
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"{key}: {text!r} is no condition ({error}); {_HELP}") from error
        if _levels(self._tree) > _MOST_LEVELS:
            raise UserError(f"{key}: the condition is nested more than {_MOST_LEVELS} levels deep; {_HELP}")
        self.columns = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)})
        self._check(self._tree)

    def check(self, schema: Any) -> None:
        """Raise UserError if a column is not in a `pyarrow.Schema`, or cannot be compared as the condition does."""
        for name in self.columns:
            if name not in schema.names:
                near = difflib.get_close_matches(name, schema.names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"{self.key}: {self.text!r} names the column {name!r}, but the columns there are "
                    f"{', '.join(schema.names)}{hint}"
                )
        self.mask({one.name: pa.nulls(0, one.type) for one in schema})

    def mask(self, columns: Mapping[str, Any]) -> NDArray[np.bool_]:
        """A mask of the documents that fulfil the condition, (n,).

        `columns` maps names to `pyarrow.Array`s of n values. Raises UserError if a column cannot be compared so.
        """
        return self._mask(self._tree, columns)

    def _refused(self, problem: str) -> UserError:
        return UserError(f"{self.key}: {self.text!r} {problem}; {_HELP}")

    def _check(self, node: ast.expr) -> None:
        """Raise UserError unless a node is a condition that `_mask` knows."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Compare):
            for left, one, right in _pairs(node):
                self._check_comparison(left, one, right)
        elif not isinstance(node, ast.Name):
            raise self._refused(f"holds {ast.unparse(node)!r}, which is no comparison")

    def _check_comparison(self, left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> None:
        written = f"{ast.unparse(left)} … {ast.unparse(right)}"
        if isinstance(left, ast.Name) == isinstance(right, ast.Name):
            raise self._refused(f"compares {written!r}, not a column with a value")
        value = self._value(right if isinstance(left, ast.Name) else left)
        if isinstance(comparison, (ast.In, ast.NotIn)):
            if not isinstance(left, ast.Name) or not isinstance(value, list) or not value:
                raise self._refused(
                    f"holds {written!r}; `in` needs a column on its left and a list of values on its right"
                )
        elif isinstance(comparison, (ast.Is, ast.IsNot)):
            if value is not None:
                raise self._refused(f"holds {written!r}; `is` is for None only")
        elif isinstance(value, list) or value is None:
            raise self._refused(f"compares {written!r}; a list needs `in`, and None needs `is`")
        if isinstance(value, list) and None in value:
            raise self._refused(f"holds {written!r}, with None in the list; write `{ast.unparse(left)} is None` for it")

    def _value(self, node: ast.expr) -> Any:
        try:
            found = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise self._refused(f"holds {ast.unparse(node)!r}, which is no value") from None
        found = list(found) if isinstance(found, (tuple, list, set)) else found
        values = found if isinstance(found, list) else [found]
        if any(not isinstance(value, (str, int, float, bool, type(None))) for value in values):
            raise self._refused(f"holds {ast.unparse(node)!r}, which is neither text nor a number")
        return found

    def _mask(self, node: ast.expr, columns: Mapping[str, Any]) -> NDArray[np.bool_]:
        if isinstance(node, ast.BoolOp):
            parts = [self._mask(value, columns) for value in node.values]
            together = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            found: NDArray[np.bool_] = together.reduce(parts)
            return found
        if isinstance(node, ast.UnaryOp):
            return ~self._mask(node.operand, columns)
        if isinstance(node, ast.Name):
            values = columns[node.id]
            if pa.types.is_null(values.type):
                return np.zeros(len(values), dtype=bool)
            if not pa.types.is_boolean(values.type):
                raise self._refused(f"has {node.id!r} alone, which holds {values.type}, not true and false")
            return _as_mask(values)
        assert isinstance(node, ast.Compare)
        chain: NDArray[np.bool_] = np.logical_and.reduce([self._comparison(*one, columns) for one in _pairs(node)])
        return chain

    def _comparison(
        self, left: ast.expr, comparison: ast.cmpop, right: ast.expr, columns: Mapping[str, Any]
    ) -> NDArray[np.bool_]:
        kind = type(comparison)
        if isinstance(right, ast.Name):
            left, right, kind = right, left, _MIRRORED.get(kind, kind)
        assert isinstance(left, ast.Name)
        values, wanted = columns[left.id], self._value(right)
        if kind in (ast.Is, ast.IsNot):
            found = _as_mask(values.is_null())
            return found if kind is ast.Is else ~found
        if kind in (ast.In, ast.NotIn):
            masks = [self._compared(left.id, values, "equal", one) for one in wanted]
            inside: NDArray[np.bool_] = np.logical_or.reduce(masks)
            return inside if kind is ast.In else ~inside & ~_as_mask(values.is_null())
        return self._compared(left.id, values, _COMPARISONS[kind], wanted)

    def _compared(self, name: str, values: Any, comparison: str, wanted: Any) -> NDArray[np.bool_]:
        """A mask of the values for which a comparison with a value holds; it holds for no null."""
        if pa.types.is_null(values.type):  # of a column of whose type nothing is known yet
            return np.zeros(len(values), dtype=bool)
        if type(wanted) is int and _is_text(values.type):
            values = self._years(name, values)
        elif type(wanted) is int and (pa.types.is_date(values.type) or pa.types.is_timestamp(values.type)):
            values = pc.year(values)
        elif type(wanted) is float and pa.types.is_integer(values.type):
            values = values.cast(pa.float64(), safe=False)
        try:
            found = pc.call_function(comparison, [values, _scalar(wanted, values.type)])
        except (pa.ArrowException, NotImplementedError, ValueError, OverflowError) as error:
            raise self._refused(f"compares the column {name!r}, which holds {values.type}, with {wanted!r}") from error
        return _as_mask(found)

    def _years(self, name: str, values: Any) -> Any:
        """The years with which strings begin. Raises UserError if a string does not begin with one."""
        years = pc.struct_field(pc.extract_regex(values, _YEAR), "year")
        if bad := values.filter(pc.and_(years.is_null(), values.is_valid())).slice(0, 1).to_pylist():
            raise self._refused(
                f"compares the column {name!r} with a number, but it holds {bad[0][:40]!r}, which does not begin with "
                f"a year. Write the value in quotes to compare texts, or `{name}: float` in data.keep"
            )
        return years.cast(pa.int64())


def _pairs(node: ast.Compare) -> list[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """The comparisons of neighbours that a chain such as `0 < score < 1` stands for."""
    return list(zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True))


def _levels(tree: ast.expr) -> int:
    """The number of levels to which an expression is nested."""
    found, level = 0, [*ast.iter_child_nodes(tree)]
    while level:
        found, level = found + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return found


def _scalar(wanted: Any, type_: Any) -> Any:
    """A value as the `pyarrow.Scalar` with which a column of a type is compared. Raises ValueError if it has none."""
    if type(wanted) is int and type_ == pa.uint64():
        return pa.scalar(wanted, type_)
    if type(wanted) is int and pa.types.is_floating(type_):
        return pa.scalar(float(wanted))
    if not isinstance(wanted, str) or not pa.types.is_temporal(type_):
        return pa.scalar(wanted)
    text = pa.scalar(wanted)
    if pa.types.is_timestamp(type_) and type_.tz is not None:
        try:
            return text.cast(type_)
        except pa.ArrowInvalid:  # it names no zone
            return text.cast(pa.timestamp(type_.unit)).cast(type_)
    return text.cast(type_)


def _is_text(type_: Any) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _as_mask(values: Any) -> NDArray[np.bool_]:
    """The values of a `pyarrow.BooleanArray`, (n,), with False for null."""
    found: NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)
    return found
