"""Texts of figures that nothing lays out: they are cut to the room that they have."""

import pytest

from analysis.style import text_width, wrapped


@pytest.mark.parametrize(
    "text", ["MP-Former", "point noise 0.25, flip noise 0.2, all layers guided", "w" * 90, "i" * 90]
)
@pytest.mark.parametrize("lines", [1, 3])
def test_wrapped_text_keeps_to_its_room(text: str, lines: int) -> None:
    found = wrapped(text, 8, 0.9, lines).split("\n")
    assert len(found) <= lines
    assert text_width(found, 8) <= 1.15 * 0.9
    assert "".join(found).rstrip("…").replace(" ", "") in text.replace(" ", "")


def test_a_text_with_room_stays_as_it_is() -> None:
    assert wrapped("MP-Former", 8, 2.0) == "MP-Former"
    assert wrapped("", 8, 2.0) == ""
