"""Products of axes: ``grid({"toggles.point_noise": [0, 0.2], "toggles.flip_noise": [0, 0.2]})`` is four rows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.suites.rows import Row
from mpformer.config.schema import toggle_names, unread, valid_keys
from mpformer.runtime.errors import UserError


def grid(
    axes: Mapping[str, Sequence[Any]],
    *,
    common: Mapping[str, Any] | None = None,
    prefix: str = "",
    title: str = "",
    not_applicable: str = "",
) -> list[Row]:
    """Return a row per combination of the axes' values, the last axis varying fastest.

    An axis is a toggle's name, any dotted configuration key, or ``seed``, which gives each row those seeds instead of
    multiplying rows. ``common`` changes hold for every row. Names read ``point_noise=0.2,flip_noise=0``, with
    ``prefix`` before them; labels ``point noise 0.2, flip noise 0``, with ``title`` (else the prefix) before them.
    Raises UserError for an unknown axis or an empty one.
    """
    keys = {_key(axis): values for axis, values in axes.items()}
    empty = [axis for axis, values in axes.items() if not list(values)]
    if empty:
        raise UserError(f"axis {empty[0]!r} of the grid has no values")
    seeds = tuple(int(seed) for seed in keys.pop("seed", ()))
    rows = []
    for values in itertools.product(*keys.values()):
        changes = dict(zip(keys, values, strict=True))
        name = prefix + ",".join(f"{_short(key)}={_text(value)}" for key, value in changes.items())
        label = ", ".join(filter(None, (title or prefix.strip(" ,"), _label(changes))))
        rows.append(Row(name, label, {**(common or {}), **changes}, not_applicable, seeds))
    return rows


def _key(axis: str) -> str:
    if axis in toggle_names():
        return f"toggles.{axis}"
    if axis in valid_keys():
        return axis
    if axis.partition(".")[0] == "extra_cfg":
        raise unread(axis)
    raise UserError(f"unknown axis {axis!r}; valid: {', '.join((*toggle_names(), 'seed'))}, or a dotted key")


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _label(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{_short(key).replace('_', ' ')} {_text(value)}" for key, value in changes.items())
