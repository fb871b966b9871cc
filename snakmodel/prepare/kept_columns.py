"""The columns that shards keep beside the text: their types, and their values in lines of JSON and in tables.

Every shard of a run must have the same columns of the same types, whatever files it was made from. So the types are
decided when the run is planned: the recipe names them, or the schemas of tables and the first lines of JSON files tell.
The values that are read later must agree with them.
"""

from __future__ import annotations

import base64
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from run_contract.errors import UserError
from snakmodel.config.kept_columns import parsed
from snakmodel.prepare.byte_streams import TextFile
from snakmodel.prepare.input_files import InputFile, suffix
from snakmodel.shards.condition import Condition

_TYPES = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "json": pa.large_string(),
}
"""Maps the names of types to Arrow's. Of the two types of strings, large_string is for JSON text."""
_NAMES = {type_: name for name, type_ in _TYPES.items()}
_HEAD = 1 << 20
"""The number of bytes at the beginning of a JSON file from which the types of its keys are told; the line in which they
end is read as well."""
_PREFIX = "arrow:"
_INSIDE = {str: "string", bool: "bool", int: "int", float: "float", dict: "json", list: "json"}
"""The types of JSON values. Objects and lists are kept as JSON text, so that nothing of them is lost."""


@dataclass(frozen=True)
class KeptColumn:
    """A column that shards keep."""

    name: str
    type: Any = None
    """A `pyarrow.DataType`; None only where just the name matters."""
    optional: bool = False
    """Whether files and documents may lack it; they then have null."""

    def __str__(self) -> str:
        """The spelling in the command line, NAME=TYPE; the inverse of `of`."""
        spelled = _NAMES.get(self.type)
        if spelled is None:
            message = pa.schema([("", self.type)]).serialize().to_pybytes()
            spelled = _PREFIX + base64.b64encode(message).decode().rstrip("=")  # names may hold =, types may not
        return f"{self.name}{'?' if self.optional else ''}={spelled}"

    @classmethod
    def of(cls, word: str) -> KeptColumn:
        """The column that a word `NAME=TYPE` of the command line spells. Raises UserError if it spells none."""
        name, _, spelled = word.rpartition("=")
        try:
            found = _TYPES.get(spelled) or _unpacked(spelled)
        except (ValueError, pa.ArrowException) as error:
            raise UserError(f"--keep {word}: write NAME=TYPE; the types are {', '.join(_TYPES)}") from error
        return cls(name.removesuffix("?"), found, name.endswith("?"))

    @property
    def field(self) -> Any:
        """The column's `pyarrow.Field`."""
        return pa.field(self.name, self.type)


def _unpacked(spelled: str) -> Any:
    if not spelled.startswith(_PREFIX):
        raise ValueError(spelled)
    digits = spelled.removeprefix(_PREFIX)
    message = base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    return pa.ipc.read_schema(pa.py_buffer(message)).field(0).type


def names_only(entries: Iterable[Any] | None) -> tuple[KeptColumn, ...]:
    """The columns of `data.keep` without their types."""
    return tuple(KeptColumn(parsed(entry)[0]) for entry in entries or ())


def expected_columns(entries: Iterable[Any]) -> tuple[KeptColumn, ...]:
    """The columns of `data.keep` as long as there are no files; those to which the recipe gives no type are null."""
    wanted = [parsed(entry) for entry in entries]
    return tuple(KeptColumn(name, _TYPES[type_] if type_ else pa.null(), optional) for name, type_, optional in wanted)


def kept_columns(entries: Sequence[Any], files: Sequence[InputFile], encoding: str) -> tuple[KeptColumn, ...]:
    """The columns of `data.keep` with their types, for the files that a run reads.

    An optional column whose type the recipe names need not be in the files' schemas and first lines. Raises UserError
    if a file lacks a column that is not optional, if no file has it, or if two files have it as different types.
    """
    wanted = [parsed(entry) for entry in entries]
    names = [name for name, _, _ in wanted]
    found: dict[str, tuple[Path, Any]] = {}
    near: dict[str, list[str]] = {}
    for file in files if names else []:
        types, others = _types_in(file.path, {name: declared for name, declared, _ in wanted}, encoding)
        if others is None or file.size == 0:
            continue
        for name, _, optional in wanted:
            if name not in types:
                near.setdefault(name, []).extend(others)
                if not optional:
                    raise UserError(_lacking(name, file.path, others))
            else:
                found[name] = file.path, _common(name, found.get(name), (file.path, types[name]))
    rare = {name: _TYPES[declared] for name, declared, optional in wanted if optional and declared}
    if none := [name for name in names if name not in found and name not in rare]:
        there = sorted({*near.get(none[0], ())})
        raise UserError(
            f"data.keep: no file has a column {none[0]!r}; the columns of the files are: {', '.join(there) or 'none'}"
            f'{_nearest(none[0], there)}. If only later documents have it, give its type: `"{none[0]}?": string`'
        )
    types = rare | {name: pa.string() if pa.types.is_null(type_) else type_ for name, (_, type_) in found.items()}
    return tuple(KeptColumn(name, types[name], optional) for name, _, optional in wanted)


def check_condition(where: str | None, kept: Iterable[KeptColumn]) -> None:
    """Raise UserError if `data.where` is given and is no condition on the source and the columns that are kept."""
    if where is not None:
        schema = pa.schema([pa.field("source", pa.string()), *(one.field for one in kept)])
        Condition(where, "data.where").check(schema)


def _lacking(name: str, path: Path, others: Sequence[str]) -> str:
    columns = f"its columns are {', '.join(map(repr, others))}{_nearest(name, others)}"
    has = columns if others else "a text file has no columns"
    return (
        f'data.keep: {path} has no column {name!r}; {has}. Write "{name}?" in data.keep if files or documents may '
        "lack it: the value is then null"
    )


def _nearest(name: str, others: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, others, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _types_in(path: Path, wanted: Mapping[str, str | None], encoding: str) -> tuple[dict[str, Any], list[str] | None]:
    """The types that the wanted columns of a file have in the shards, and the names of all its columns.

    There are no names, but None, if the first lines of a JSON file hold no object. `wanted` maps names to the types
    that the recipe declares; None if the file decides. Raises UserError if the file has values that cannot be kept.
    """
    kind = suffix(path.name) or ""
    if kind in (".parquet", ".arrow"):
        schema = _schema(path)
        if twice := [name for name in wanted if schema.names.count(name) > 1]:
            raise UserError(
                f"data.keep: {path} has {schema.names.count(twice[0])} columns named {twice[0]!r}, and nothing says "
                "which is meant; write the file again with one, or leave the column out of data.keep"
            )
        there = {name: schema.field(name).type for name in wanted if name in schema.names}
        return {name: _kept_as(name, wanted[name], type_, path) for name, type_ in there.items()}, list(schema.names)
    if not kind.startswith(".jsonl"):
        return {}, []
    types: dict[str, Any] = {}
    keys: dict[str, None] = {}
    for number, document in _first_documents(TextFile(path, encoding)):
        keys.update(dict.fromkeys(document))
        for name, declared in wanted.items():
            if declared is not None and name in document:
                types[name] = _TYPES[declared]
            elif name in document:
                place = Path(f"{path}: line {number}")
                types[name] = _common(
                    name, (path, types[name]) if name in types else None, (place, _type_of(document[name]))
                )
    return types, list(keys) or None


def _schema(path: Path) -> Any:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_schema(path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. Fetch the file or write it again") from error


def _kept_as(name: str, declared: str | None, type_: Any, path: Path) -> Any:
    """The type that a column of a table has in the shards. Raises UserError if the declared one cannot hold it."""
    if declared is None:
        return _plain(type_)
    return from_table(KeptColumn(name, _TYPES[declared]), pa.nulls(0, type_), path).type


def _plain(type_: Any) -> Any:
    """The type that a column of a table has in the shards: the same, but for dictionaries and widths."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if any(is_kind(type_) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return pa.string()
    if pa.types.is_integer(type_) and type_ != pa.uint64():
        return pa.int64()
    return pa.float64() if pa.types.is_floating(type_) else type_


def _first_documents(file: TextFile) -> Iterable[tuple[int, dict[str, Any]]]:
    """The objects in the first lines of a JSON file, with the numbers of their lines."""
    with file.open() as content:
        head = content.read(_HEAD) + content.readline()
    for number, line in enumerate(head.split(b"\n"), 1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            yield number, document


def _type_of(value: Any) -> Any:
    return pa.null() if value is None else _TYPES[_INSIDE[type(value)]]


def _common(name: str, before: tuple[Path, Any] | None, now: tuple[Path, Any]) -> Any:
    """The type that holds the values of two places. Raises UserError if there is none."""
    if before is None or before[1] == now[1] or pa.types.is_null(now[1]):
        return now[1] if before is None else before[1]
    if pa.types.is_null(before[1]):
        return now[1]
    if {before[1], now[1]} == {pa.int64(), pa.float64()}:
        return pa.float64()
    raise UserError(
        f"data.keep: column {name!r} holds {_said(before[1])} in {before[0]} and {_said(now[1])} in {now[0]}; one "
        f"column has one type. Correct the files, or write `{name}: json` to keep values of JSON files as they are"
    )


def _said(type_: Any) -> str:
    return _NAMES.get(type_, str(type_))


def from_table(column: KeptColumn, values: Any, path: Path) -> Any:
    """The values of a column of a table in the column's type. Raises UserError if they do not fit."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values if values.type == column.type else values.cast(column.type)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: column {column.name!r} holds {values.type}, which cannot be kept as {_said(column.type)} "
            f"({error}). Correct the file, or the type in data.keep"
        ) from error


def _can_be_held(value: Any) -> bool:
    """Whether Arrow can hold a value: not a whole number of more than 64 bits, nor half of a surrogate pair."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def _moment(text: str) -> datetime:
    """The moment that a text in the form of ISO 8601 names. Raises ValueError if it names none."""
    return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith(("Z", "z")) else text)  # Python 3.10 reads no Z


def _json_text(value: Any) -> str:
    """A value as JSON; if it holds half of a surrogate pair, all its characters beyond ASCII are spelled as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _can_be_held(text) else json.dumps(value)


class Misfit(Exception):
    """A value of JSON that is not of its column's type; the message says what was found, without the place."""


def from_json(column: KeptColumn, document: Mapping[str, Any]) -> Any:
    """The value of a column in an object of JSON, as pyarrow takes it. Raises Misfit if it has another type."""
    if column.name not in document:
        if column.optional:
            return None
        raise Misfit(
            f'has no key {column.name!r}, which data.keep names; write "{column.name}?" there if it may be absent'
        )
    value = document[column.name]
    if value is None:
        return None
    if column.type == _TYPES["json"]:
        return _json_text(value)
    wanted = _NAMES.get(column.type)
    if wanted == _INSIDE[type(value)] and _can_be_held(value):
        return value
    try:
        if wanted == "float" and type(value) is int:
            return float(value)
        if wanted == "date" and isinstance(value, str):
            return _moment(value).date() if len(value) > len("2026-01-31") else date.fromisoformat(value)
        if wanted == "timestamp" and isinstance(value, str):
            moment = _moment(value)
            return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        if wanted == "timestamp" and type(value) in (int, float):
            return datetime.fromtimestamp(value, timezone.utc)
    except (ValueError, OverflowError, OSError):
        pass
    raise Misfit(
        f"has {_json_text(value)[:60]} under {column.name!r}, which is no {wanted or column.type}; "
        f"correct it, or write another type in data.keep, such as `{column.name}: json`"
    )
