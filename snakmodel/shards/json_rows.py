"""Further columns of a shard, beside text and source, as JSON.

Numbers, strings and booleans stay what they are; lists, structs and dictionaries are followed into their values. Dates,
times and timestamps become strings in ISO 8601 (times to the microsecond), decimals and UUIDs strings with all their
digits, and bytes strings in base64. A map becomes a list of [key, value] pairs. Numbers that JSON lacks (NaN and the
infinities) become null.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa

from run_contract.errors import UserError

_AT_ONCE = 1 << 12
"""The number of rows that are Python objects at a time."""


def further_columns(schema: Any, path: Path) -> list[int]:
    """The places of a shard's columns beside `text` and `source`, in order.

    Raises UserError if two of them have the same name, or if one holds what has no form in JSON; `path` is the shard's.
    """
    places = [place for place, name in enumerate(schema.names) if name not in ("text", "source")]
    for place in places:
        name, kind = schema.names[place], schema.field(place).type
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has several columns named {name!r}, which a JSON object cannot have; rename one")
        if odd := _without_json(kind):
            raise UserError(
                f"{path}: column {name!r} holds {odd}, which has no form in JSON; write it as a number or a string, or "
                "leave the column out"
            )
    return places


def _without_json(kind: Any) -> Any:
    """The first type within an Arrow type that has no form in JSON, or None."""
    if pa.types.is_duration(kind) or pa.types.is_interval(kind):
        return kind
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    inner += [kind.value_type] if pa.types.is_dictionary(kind) else []
    inner += [kind.storage_type] if isinstance(kind, pa.BaseExtensionType) else []
    return next((found for one in inner if (found := _without_json(one)) is not None), None)


def json_rows(columns: Any, path: Path) -> Iterator[bytes]:
    """Yield the rows of a `pyarrow.RecordBatch`, each as one JSON object.

    Raises UserError if a value cannot be written, such as a timestamp beyond the year 9999; `path` is the shard's.
    """
    for start in range(0, columns.num_rows, _AT_ONCE):
        yield from _objects(columns.slice(start, _AT_ONCE), path)


def _objects(columns: Any, path: Path) -> list[bytes]:
    try:
        return [_encoded(row) for row in columns.to_pylist()]
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        if columns.num_columns > 1:  # find out which column it is
            for name in columns.schema.names:
                _objects(columns.select([name]), path)
        raise UserError(
            f"{path}: a value in column {columns.schema.names[0]!r} cannot be written as JSON ({error}); write it as "
            "a number or a string, or leave the column out"
        ) from error


def _encoded(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except ValueError:  # a number that is not finite, which hardly any shard has
        return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> str:
    """A value that json does not know, as a string."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
