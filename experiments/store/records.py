"""Records: frozen dataclasses as JSON files. Read and written in this room alone, each class by one module.

A record's fields are its JSON keys. A key that a file lacks has the field's default; a key that the class does not
know is kept in its field ``more``, where it has one, and left out otherwise. What a file says is checked against the
field's type, so that whoever holds a record need not ask again. Nothing here knows what a record is about.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from experiments.store.files import read_json, write_json
from mpformer.runtime.errors import UserError

MORE = "more"
"""Field that keeps the keys of a file that its class does not name."""


class RecordError(UserError):
    """A record that cannot be read: one line with its file, what is wrong with it, and what to do."""


class NewerRecordError(RecordError):
    """A record written by a newer version of this project."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of all records; ``remedy`` says what a user does about a damaged one."""

    schema: ClassVar[int] = 1
    remedy: ClassVar[str] = "move it away to go on without it"


R = TypeVar("R", bound=Record)


def load(kind: type[R], path: Path) -> R | None:
    """Return the record in a file, None if there is no file; raises RecordError if it is damaged or newer."""
    content = read_json(path)
    if content is None and not path.exists():
        return None
    return decode(kind, content, str(path))


def load_sound(kind: type[R], path: Path) -> R | None:
    """Return the record in a file, None if it is absent or damaged; raises NewerRecordError if it is newer."""
    content = read_json(path)
    if content is None:
        return None
    try:
        return decode(kind, content, str(path))
    except NewerRecordError:
        raise
    except RecordError:
        return None


def save(path: Path, record: Record) -> None:
    """Write a record atomically; raises OSError, and ValueError for numbers that are not finite."""
    write_json(path, encode(record))


def encode(record: Record) -> dict[str, Any]:
    """Return a record as plain data, its schema first."""
    plain = {"schema": record.schema, **_plain(record)}
    more = plain.pop(MORE, {})
    return plain | more


def decode(kind: type[R], content: Any, where: str) -> R:
    """Return plain data as a record; raises RecordError that names ``where`` it is from and the first wrong key."""
    if not isinstance(content, Mapping):
        raise _damaged(kind, where, "not a JSON object")
    schema = content.get("schema", 1)
    if not isinstance(schema, int):
        raise _damaged(kind, where, f"schema is {schema!r}")
    if schema > kind.schema:
        raise NewerRecordError(
            f"{where} was written by a newer mpformer (schema {schema}, this one reads {kind.schema}): update this one"
        )
    return _built(kind, content, where)


def _damaged(kind: type[Record], where: str, why: str) -> RecordError:
    return RecordError(f"{where} is damaged ({why}): {kind.remedy}")


def _built(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    try:
        values = _values(kind, content)
    except (TypeError, ValueError) as error:
        raise _damaged(kind, where, str(error)) from None
    if MORE in kind.__dataclass_fields__:
        values[MORE] = {key: value for key, value in content.items() if key not in values and key != "schema"}
    return kind(**values)


def _values(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that plain data has; raises ValueError that names the first wrong one."""
    values: dict[str, Any] = {}
    for name, read, required in _fields(kind):
        if required and name not in content:
            raise ValueError(f"{name} is missing")
        if name in content:
            try:
                values[name] = read(content[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
    return values


_Reader = Callable[[Any], Any]


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, _Reader, bool], ...]:
    """Each field's name, what reads its value, and whether a file must have it."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return tuple(
        (field.name, _reader(hints[field.name]), field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
        if field.name != MORE
    )


def _reader(hint: Any) -> _Reader:
    """What turns JSON into a value of a type, or raises TypeError or ValueError with what is wrong."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (some,) = (one for one in inner if one is not type(None))
        read = _reader(some)
        return lambda value: None if value is None else read(value)
    if origin is tuple:
        each = _reader(inner[0])
        return lambda value: tuple(each(item) for item in _checked(value, list))
    if origin is Mapping and dataclasses.is_dataclass(inner[1]):
        one = _reader(inner[1])
        return lambda value: {key: one(item) for key, item in _checked(value, dict).items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return functools.partial(_member, hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(_nested, hint)
    return _READERS.get(origin or hint, lambda value: value)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TypeError(f"{value!r:.60} is no {_NAMES[kind]}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.60} is no number")
    return float(value)


_NAMES = {str: "text", int: "whole number", bool: "yes or no", list: "list", dict: "object"}

_READERS: Mapping[Any, _Reader] = {
    float: _number,
    Mapping: lambda value: _checked(value, dict),
} | {kind: functools.partial(_checked, kind=kind) for kind in (str, int, bool)}


def _member(kind: type[Enum], value: Any) -> Enum:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value!r:.60} is none of {', '.join(repr(one.value) for one in kind)}") from None


def _nested(kind: Any, value: Any) -> Any:
    return kind(**_values(kind, _checked(value, dict)))


def _plain(value: Any) -> Any:
    """A field's value as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
