"""How every figure looks and is written: one style sheet, colour-blind safe, and bytes that do not change from run
to run.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib import RcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
FORMATS = ("svg", "pdf", "png")
#: Width in inches of a figure that spans a page.
WIDTH = 7.0
BOLD = 1.13  # how much wider bold letters are
#: The colour of a jump, and of nothing else.
JUMP = "#b2182b"
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), "-", (0, (5, 1.5)), (0, (1.2, 1.2)))
#: Writers put the time of day into their files unless their metadata says otherwise.
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Creator": "mpformer", "Producer": None},
    "png": {"Software": None},
}

P = ParamSpec("P")


@contextmanager
def styled() -> Iterator[None]:
    """The style sheet, for the time of a ``with`` block; pyplot's state and the caller's rcParams are left alone."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcParams.update(_sheet())
        yield


@cache
def _sheet() -> "RcParams":
    """The style sheet's parameters, with the fonts that are installed."""
    import matplotlib

    given = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    given["font.sans-serif"] = list(families())
    return given


_EAST_ASIAN = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Source Han Sans SC"),
    *(
        "WenQuanYi Micro Hei",
        "WenQuanYi Zen Hei",
        "Droid Sans Fallback",
        "PingFang SC",
        "Hiragino Sans",
        "Apple SD Gothic Neo",
    ),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic", "IPAexGothic", "NanumGothic"),
)


@cache
def families() -> tuple[str, ...]:
    """The fonts of a figure: DejaVu Sans, then those installed that have Chinese, Japanese and Korean letters."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _EAST_ASIAN if name in installed))


@cache
def drawable() -> frozenset[int]:
    """The code points that a figure can show."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(code for name in families() for code in FT2Font(findfont(name)).get_charmap())


def in_style(draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    """Decorator: run a drawing function with the style sheet."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        with styled():
            return draw(*args, **kwargs)

    return wrapper


@dataclass(frozen=True)
class Margins:
    """Room for the labels round each axes of a figure, in inches."""

    left: float = 0.64
    right: float = 0.14
    top: float = 0.3
    bottom: float = 0.46


CELLS = "cells"
"""Label of the figures whose axes stand in cells (:func:`new_figure`)."""


def new_figure(
    rows: int,
    columns: int,
    *,
    width: float = WIDTH,
    height: float = 2.6,
    margins: Margins = Margins(),
    **options: Any,
) -> tuple["Figure", list["Axes"]]:
    """A figure of rows × columns axes, each with the same margins in a cell of its own (``height`` inches), not
    registered with pyplot. Nothing is measured to lay it out: that takes longer than drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), label=CELLS)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    across, down = margins.left + margins.right, margins.top + margins.bottom
    figure.subplots_adjust(
        left=margins.left / width,
        right=1 - margins.right / width,
        bottom=margins.bottom / (height * rows),
        top=1 - margins.top / (height * rows),
        wspace=across / (width / columns - across),
        hspace=down / (height - down),
    )
    return figure, list(axes.ravel())


def cell(axes: "Axes") -> tuple[float, float, float, float]:
    """The cell of an axes of :func:`new_figure`: left, top, width, height in inches."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    (width, height), given, box = figure.get_size_inches(), figure.subplotpars, axes.get_position(original=True)
    size = box.width * width * (1 + given.wspace), box.height * height * (1 + given.hspace)
    return (box.x0 - given.left) * width, (1 - box.y0 + given.bottom) * height - size[1], *size


def text_width(texts: Sequence[str], size: float) -> float:
    """Inches that the longest of some texts takes at a font size in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size)
    widths = (text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] for text in texts)
    return max(widths, default=0.0) / 72


def wrapped(text: str, size: float, inches: float, lines: int = 2) -> str:
    """A text at a font size in points on at most ``lines`` lines of about ``inches``; what is cut ends in an ellipsis.

    Words that are longer than a line are broken. Letters count as wide as the text's mean.
    """
    letters = max(2, int(inches * len(text) / text_width([text], size))) if text.strip() else 2
    found = textwrap.wrap(text, letters)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: letters - 1] + "…"]
    return "\n".join(found)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the index-th row of a comparison: they differ in all three."""
    import matplotlib

    colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    number = index % len(colours)
    return {"color": colours[number], "marker": _MARKERS[number], "linestyle": _DASHES[number]}


def look_of(method: int, schedule: int = 0) -> dict[str, Any]:
    """Colour and marker tell the method, dashes the schedule (0: the longest, solid)."""
    return {**look(method), "linestyle": _DASHES[schedule % len(_DASHES)]}


_ASSIGNED: ContextVar[Mapping[str, dict[str, Any]]] = ContextVar("looks", default=MappingProxyType({}))


@contextmanager
def assigned(given: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """For the time of a ``with`` block, labels have these looks (of :func:`look_of`) in every figure."""
    token = _ASSIGNED.set(given)
    try:
        yield
    finally:
        _ASSIGNED.reset(token)


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The look of each label: the assigned one, else :func:`look` by its place."""
    given = _ASSIGNED.get()
    return {label: given.get(label) or look(index) for index, label in enumerate(labels)}


def legend_above(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    """One legend for all axes, above them, of the artists of ``axes``; no legend without any. The figure grows by it.

    At most ``columns`` columns, fewer where long labels would not fit the figure's width.
    """
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    width, height = figure.get_size_inches()
    fitting = max(1, int(width / (0.6 + text_width(labels, 8))))
    columns = min(columns, len(labels), fitting)
    figure.legend(handles, labels, loc="upper center", ncols=columns, borderaxespad=0.2)
    whole = height + 0.12 + 0.17 * -(-len(labels) // columns)
    given = figure.subplotpars
    figure.set_size_inches(width, whole)
    figure.subplots_adjust(bottom=given.bottom * height / whole, top=given.top * height / whole)


def save(figure: "Figure", data: "pd.DataFrame", stem: Path) -> list[Path]:
    """Write ``stem``.svg, .pdf, .png and, with the numbers that are drawn, .csv; returns the paths.

    The same figure and data give the same bytes on every run (same library versions).
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with styled():
        for kind in FORMATS:
            path = stem.with_name(f"{stem.name}.{kind}")
            figure.savefig(path, format=kind, metadata=_METADATA[kind])
            written.append(path)
    table = stem.with_name(f"{stem.name}.csv")
    data.to_csv(table, index=False, float_format="%.6g", lineterminator="\n")
    return [*written, table]
