"""The figures of a suite's page, drawn by :mod:`analysis.figures`, each with its files and its data."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Figure:
    """A drawn figure: inline SVG, a caption that says what is shown, and the files written beside the page."""

    name: str
    title: str
    caption: str
    svg: Markup
    files: tuple[str, ...] = ()


def none() -> Sequence[Figure]:
    return ()
