"""Every key of the configuration in words: its type, its default, what it means; and two configurations compared."""

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpformer.config import dotted
from mpformer.config.dotted import MISSING, leaves, value_at
from mpformer.config.schema import NEVER_SET, Config, models_in

_PLAIN = {int: "integer", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}
_NULL = " | null"
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class Key:
    """One dotted key of the configuration."""

    name: str
    type: str
    default: Any
    """What it is unless it is set; what a base has, if one was given. ``MISSING``: it has to be set."""
    meaning: str


def keys(base: Config | None = None) -> tuple[Key, ...]:
    """Return every key that can be set, in the order of the configuration; those of ``base``, with its values."""
    listed = _each_once(_keys("", Config))
    if base is None:
        return listed
    tree = base.model_dump(mode="json")
    of_base = {key.name: value_at(tree, key.name) for key in listed}
    return tuple(replace(key, default=of_base[key.name]) for key in listed if of_base[key.name] is not MISSING)


def difference(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configurations differ, each with both values; None for a key that one lacks."""
    return dotted.difference(*(dict(leaves(config.model_dump(mode="json"))) for config in (one, other)))


def _each_once(found: Iterable[Key]) -> tuple[Key, ...]:
    """What alternative sections share, such as the kind of a backbone, is one key; the first one's default holds."""
    once: dict[str, Key] = {}
    for key in found:
        first = once.setdefault(key.name, key)
        if key.type not in (first.type, *first.type.split(" | ")):
            once[key.name] = replace(first, type=f"{first.type} | {key.type}")
    return tuple(once.values())


def _keys(prefix: str, model: type[BaseModel], alternative: str = "") -> Iterator[Key]:
    for name, field in model.model_fields.items():
        inner = [] if name in NEVER_SET else models_in(field.annotation)
        for section in inner:
            of = f"{section.model_fields['kind'].default}: " if len(inner) > 1 else alternative
            yield from _keys(f"{prefix}{name}.", section, of)
        if not inner and name not in NEVER_SET:
            meaning = field.description or ""
            yield Key(
                prefix + name, _type(field), _default(field), meaning if name == "kind" else alternative + meaning
            )


def _default(field: FieldInfo) -> Any:
    value = MISSING if field.is_required() else field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _type(field: FieldInfo) -> str:
    limits = {name: getattr(item, name) for item in field.metadata for name, _ in _BOUNDS if hasattr(item, name)}
    bounds = ", ".join(f"{sign} {limits[name]:g}" for name, sign in _BOUNDS if name in limits)
    name = _name(field.annotation)
    plain, null = name.removesuffix(_NULL), name.endswith(_NULL)
    return f"{plain} {bounds}".strip() + _NULL * null


def _name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin is tuple:
        return f"list of {_name(inner[0])}" if Ellipsis in inner else f"{len(inner)} x {_name(inner[0])}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_name(part) for part in inner)
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))
