"""Reading large JSON files element by element, so that only a few of them are in memory at a time. No torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ARRAY = object()
"""Stands for the beginning of an array."""
_CHUNK = 1 << 22
_SPACE = " \t\n\r"
_AFTER = frozenset(",:]}" + _SPACE)
"""What may follow a value."""


class _Text:
    """The text of a file from where it is read on; grows when a value is cut."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        chunk = self._file.read(_CHUNK)
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Step over the next character, which must be one of those wanted; raises ValueError."""
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError(f"{' or '.join(wanted)} is expected, not {found or 'the end'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, whole; raises ValueError."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # a number at the end of what was read may go on ("0." is read as 0)
            if self._text[end : end + 1] in _AFTER or not self._more():
                self._at = end
                return value


def elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield of the object in a file (key, ARRAY) and then (key, element) for each array, and (key, value) for what
    else it has.

    Raises ValueError if the file is not JSON or holds no object, OSError if it cannot be read.
    """
    with path.open(encoding="utf-8") as file:
        text = _Text(file)
        text.take("{")
        if text.peek() == "}":
            return
        while True:
            key = text.value()
            text.take(":")
            if text.peek() == "[":
                yield key, ARRAY
                yield from ((key, element) for element in _array(text))
            else:
                yield key, text.value()
            if text.take(",}") == "}":
                return


def _array(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return
