"""Nested mappings by dotted keys, such as ``schedule.max_iter``."""

from collections.abc import Iterator, Mapping
from typing import Any


class Missing:
    """Stands for "there is no such key" where None is a value."""


MISSING = Missing()


def value_at(tree: Mapping[str, Any], key: str, default: Any = MISSING) -> Any:
    """Return the value under a key, or ``default``."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value under a key; nodes on the way that are not there are made, of the tree's own type."""
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, type(tree)())
    tree[last] = value


def difference(one: Mapping[str, Any], other: Mapping[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two flat mappings differ, each with both values; ``absent`` where one lacks the key."""
    both = {key: (one.get(key, absent), other.get(key, absent)) for key in (*one, *other)}
    return {key: pair for key, pair in both.items() if pair[0] != pair[1]}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is no mapping, or an empty one."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
