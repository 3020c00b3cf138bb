"""How every figure looks and is written: one style sheet, colour-blind safe, and bytes that do not change from run
to run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
FORMATS = ("svg", "pdf", "png")
#: Width in inches of a figure that spans a page.
WIDTH = 7.0
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

    with matplotlib.rc_context(fname=str(STYLE)):
        matplotlib.rcParams["font.sans-serif"] = list(families())
        yield


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


def new_figure(
    rows: int, columns: int, *, width: float = WIDTH, height: float = 2.6, **options: Any
) -> tuple["Figure", list["Axes"]]:
    """A figure of rows × columns axes (``height`` inches a row), not registered with pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


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
    """One legend for all axes, above them, of the artists of ``axes``; no legend without any.

    At most ``columns`` columns, fewer where long labels would not fit the figure's width.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        inches = 0.6 + 0.068 * max(map(len, labels))
        fitting = max(1, int(figure.get_figwidth() / inches))
        figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels), fitting))


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
