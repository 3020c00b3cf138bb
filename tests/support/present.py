"""Values that may be absent in general and are there in a test."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value; fails if it is None."""
    assert value is not None
    return value
