"""The figures, from plain data: no run store, no model, no torch. Each returns a matplotlib Figure; :func:`save`
writes it with its data.

Wherever several seeds are drawn, the line is their mean and the band its 95 % interval, from three seeds on; below
that, and where not every seed has a value, each seed is a thin line. The legend says n. Colours, markers and dashes all
differ between rows, so that a figure survives grey printing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.failure_cases import failure_gallery
from analysis.film_strip import jump_figure
from analysis.jumps import THRESHOLD
from analysis.statistics import MIN_SEEDS, bounded_interval, mean_interval
from analysis.style import WIDTH, Margins, in_style, legend_above, looks, new_figure, save, text_width, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "drop_distribution",
    "failure_gallery",
    "jump_figure",
    "over_iterations",
    "over_layers",
    "over_thresholds",
    "per_layer_curves",
    "query_usage",
    "save",
    "schedule_curves",
    "seed_bands",
    "training_curves",
    "transition_matrix",
]

#: Each consistency measure stands beside a quality of the same layer: a decoder that never refines is perfectly
#: consistent.
PAIRS = (("mIoU-L", "IoU-gt"), ("Util", "AP"))
TITLES = {
    "mIoU-L": "IoU with the layer before",
    "mIoU-L-last": "IoU with the last layer",
    "Util": "Util: matched as at the last layer",
    "Util-consecutive": "Util: matched as at the next layer",
    "IoU-gt": "IoU with the ground truth",
    "empty_attention_share": "Attention masks that are empty",
    "empty_pair_share": "Pairs of two empty masks",
    "attention_miss_share": "Attention masks that miss their object",
    "cosine": "Gradient direction: cosine",
    "relative_error": "Gradient: relative error",
    "loss": "Training loss",
    "jump-rate": "Objects that jump at least once",
    "jump-rate-late": "Objects that jump after layer 1",
    "stability": "Matched as at the evaluation before",
}
_UNITLESS = {"loss", "cosine", "relative_error", "effective_queries"}
_RANGES = {
    "cosine": (-1.0, 1.0),
    "difference": (-100.0, 100.0),
    **dict.fromkeys(("loss", "relative_error", "effective_queries")),
}
"""What a measure can be; 0 … 100 (percent) unless it stands here, None: no bounds."""


def seed_bands(frame: "pd.DataFrame", x: str) -> "pd.DataFrame":
    """Mean over seeds with its 95 % interval: columns row, x, mean, low, high, n (low and high NaN below three seeds).

    ``frame`` has columns row, seed, x and value; lines whose value is NaN or None are left out. Where it names one
    measure, the interval stays in what that can be (:func:`analysis.statistics.bounded_interval`).
    """
    import pandas as pd

    rows = []
    found = frame.dropna(subset=["value"])
    measures = set(frame["measure"]) if "measure" in frame else set()
    bounds = _RANGES.get(measures.pop(), (0.0, 100.0)) if len(measures) == 1 else None
    every = found["value"].to_numpy(float)
    groups = found.groupby(["row", x], sort=False).indices  # a frame a group would take most of the time
    for (row, at), group in sorted(groups.items(), key=lambda item: item[1][0]):
        values = every[group].tolist()
        low, high = (bounded_interval(values, *bounds) if bounds else mean_interval(values)) or (np.nan, np.nan)
        rows.append((row, at, float(np.mean(values)), low, high, len(values)))
    return pd.DataFrame(rows, columns=["row", x, "mean", "low", "high", "n"])


@in_style
def per_layer_curves(
    frame: "pd.DataFrame",
    pairs: Sequence[tuple[str, str]] = PAIRS,
    rows: Sequence[str] | None = None,
    baseline: str = "",
) -> "Figure":
    """Consistency of each layer (left) beside the quality of the same layer (right). With ``baseline`` the values are
    differences to the row that is called so.

    ``frame`` has columns row, seed, layer, measure, value (percent). ``pairs`` are (consistency, quality) measures,
    one line of axes each; a measure that the frame lacks leaves its axes with a note. ``rows`` orders the rows.
    """
    return _grid(frame, "layer", [measure for pair in pairs for measure in pair], rows, 2, baseline)


@in_style
def over_layers(
    frame: "pd.DataFrame", measures: Sequence[str], rows: Sequence[str] | None = None, columns: int = 3
) -> "Figure":
    """Any measures per layer, side by side: columns row, seed, layer, measure, value; for example ``cosine`` and
    ``relative_error``.
    """
    return _grid(frame, "layer", measures, rows, columns=min(columns, len(measures)))


@in_style
def training_curves(
    frame: "pd.DataFrame",
    measures: Sequence[str] = ("loss", "AP"),
    rows: Sequence[str] | None = None,
    baseline: str = "",
) -> "Figure":
    """Loss and scores against iterations: columns row, seed, iteration, measure, value. Long curves are drawn as
    means of equal blocks. With ``baseline`` the values are differences to the row that is called so.
    """
    return _grid(_thin(frame), "iteration", measures, rows, 2, baseline)


@in_style
def over_iterations(frame: "pd.DataFrame", measures: Sequence[str], rows: Sequence[str] | None = None) -> "Figure":
    """Any measures over training time, such as Util, stability, empty_attention_share; columns as in
    :func:`training_curves`.
    """
    return _grid(_thin(frame), "iteration", measures, rows, columns=min(2, len(measures)))


@in_style
def over_thresholds(frame: "pd.DataFrame", rows: Sequence[str] | None = None) -> "Figure":
    """The jump rate, at least once and after layer 1, against its threshold: columns row, seed, threshold, measure
    (``jump-rate`` or ``jump-rate-late``), value.
    """
    figure = _grid(frame, "threshold", ("jump-rate", "jump-rate-late"), rows, columns=2)
    for axis in figure.axes:
        axis.axvline(THRESHOLD, color="#777777", linewidth=0.8, linestyle=(0, (4, 2)))
    return figure


def _grid(
    frame: "pd.DataFrame",
    x: str,
    measures: Sequence[str],
    rows: Sequence[str] | None,
    columns: int,
    baseline: str = "",
) -> "Figure":
    labels = list(rows or dict.fromkeys(frame["row"]))
    lines = -(-len(measures) // columns)
    figure, axes = new_figure(lines, columns, height=2.3 if lines > 1 else 2.6)
    for axis, measure in zip(axes, measures, strict=False):
        one = frame[frame["measure"] == measure]
        _curves(axis, one.assign(measure="difference") if baseline and _RANGES.get(measure, True) else one, x, labels)
        _dress(axis, x, measure)
        if baseline:
            axis.axhline(0, color="#777777", linewidth=0.8, linestyle=(0, (4, 2)))
            room = axis.get_position().height * figure.get_figheight()
            axis.set_ylabel(wrapped(f"less {baseline}", 8.5, room, 1))
        axis.set_xlim(*_limits(frame[x]))
    for axis in axes[len(measures) :]:
        axis.set_visible(False)
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    legend_above(figure, fullest)
    return figure


def _limits(values: "pd.Series") -> tuple[float, float]:
    """The same x range for all axes of a figure, although some measures start later."""
    low, high = (0.0, 1.0) if values.empty else (min(0.0, float(values.min())), float(values.max()))
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _curves(axis: "Axes", frame: "pd.DataFrame", x: str, labels: Sequence[str]) -> None:
    if frame["value"].isna().all():
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="#777777")
        return
    known, bands = (dict(list(of.groupby("row"))) for of in (frame.dropna(subset=["value"]), seed_bands(frame, x)))
    for label, style in looks(labels).items():
        if label in known:
            _curve(axis, known[label], bands[label], x, label, style)


def _curve(
    axis: "Axes", frame: "pd.DataFrame", bands: "pd.DataFrame", x: str, label: str, style: Mapping[str, Any]
) -> None:
    """Mean and band of one row where all its seeds have a value, its seeds as thin lines wherever that is not enough.

    A mean over whichever seeds have a value at x would jump with their number, not with what was measured.
    """
    seeds = frame["seed"].nunique()
    shared = _shared(bands, seeds, x)
    axis.plot(shared[x], shared["mean"], label=f"{label} (n = {seeds})", markevery=_every(len(shared)), **style)
    if seeds >= MIN_SEEDS:
        _band(axis, shared, x, style["color"])
    if 1 < seeds < MIN_SEEDS or len(shared) < frame[x].nunique():
        for _, seed in frame.groupby("seed"):
            line = seed.sort_values(x)
            axis.plot(line[x], line["value"], color=style["color"], linewidth=0.6, alpha=0.6)


def _band(axis: "Axes", bands: "pd.DataFrame", x: str, colour: Any) -> None:
    """What ``fill_between`` draws, in a fifth of its time."""
    from matplotlib.patches import Polygon

    at, low, high = (bands[name].to_numpy(float) for name in (x, "low", "high"))
    corners = np.column_stack([np.append(at, at[::-1]), np.append(low, high[::-1])])
    axis.add_artist(Polygon(corners, color=colour, alpha=0.18, linewidth=0))
    axis.update_datalim(corners)


def _every(points: int) -> int:
    """Which points of a curve have a marker: every one, or a dozen where they would run together."""
    return 1 if points <= 40 else points // 12


def _shared(bands: "pd.DataFrame", seeds: int, x: str) -> "pd.DataFrame":
    """:func:`seed_bands` of one row at the x where every seed has a value, by rising x."""
    return bands[bands["n"] == seeds].sort_values(x)


def _dress(axis: "Axes", x: str, measure: str) -> None:
    from matplotlib.ticker import MaxNLocator

    scored = f"{measure} of the layer's predictions" if x == "layer" else f"{measure} over training"
    axis.set_title(TITLES.get(measure, scored))
    axis.set_ylabel(measure.replace("_", " ") + ("" if measure in _UNITLESS else " (%)"))
    axis.set_xlabel({"layer": "decoder layer (0: bare queries)", "threshold": "IoU below which it is a jump"}.get(x, x))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10 if x == "layer" else 6, integer=x != "threshold"))


def _thin(frame: "pd.DataFrame", most: int = 120) -> "pd.DataFrame":
    """At most about ``most`` points a curve: means of equal blocks of consecutive lines, placed at the block's last
    iteration.
    """
    import pandas as pd

    keys = ["row", "seed", "measure"]
    known = frame.dropna(subset=["value"])
    groups, parts = known.groupby(keys, sort=False), []
    if groups.size().le(most).all():
        return known
    for key, group in groups:
        group = group.sort_values("iteration")
        if len(group) <= most:
            parts.append(group)
            continue
        block = np.arange(len(group)) // -(-len(group) // most)
        thin = group.groupby(block).agg(iteration=("iteration", "last"), value=("value", "mean"))
        parts.append(thin.assign(**dict(zip(keys, key, strict=True))))
    return pd.concat(parts, ignore_index=True) if parts else frame.iloc[:0]


@in_style
def forest(frame: "pd.DataFrame", measure: str, baseline: str) -> "Figure":
    """Differences to the baseline by row: columns row, seed, value (paired by seed).

    Dots: seeds; square: their mean; line: its 95 % interval (paired t), from three seeds on.
    """
    labels = list(dict.fromkeys(frame["row"]))
    found = [frame.loc[frame["row"] == label, "value"].to_numpy(float) for label in labels]
    intervals = [bounded_interval(values.tolist(), -100.0, 100.0) for values in found]
    said = [_effect(*pair) for pair in zip(found, intervals, strict=True)]
    width, side = 3.5, 0.15  # inches: a phone's page is no wider, and shows the figure at its own size
    of_name = width - 2 * side - text_width(said, 8) - 0.1
    figure, (axis,) = new_figure(
        1, 1, width=width, height=0.75 + 0.55 * len(labels), margins=Margins(side, side, top=0.1)
    )
    colours = [style["color"] for style in looks(labels).values()]
    low, high = np.array([bounds or (np.nan, np.nan) for bounds in intervals]).T
    places = np.arange(len(labels))
    of = np.repeat(places, [len(values) for values in found])
    axis.vlines(np.zeros(len(labels)), places - 0.12, places + 0.32, color="#777777", linewidth=0.8)
    axis.hlines(places, low, high, colors=colours, linewidth=1.8)
    axis.scatter(np.concatenate(found), of + 0.2, 9, [colours[place] for place in of], alpha=0.6, linewidths=0)
    axis.scatter([values.mean() for values in found], places, 25, colours, marker="s", linewidths=0)
    for place, (label, text) in enumerate(zip(labels, said, strict=True)):
        for x, words, side_of in ((0, wrapped(label, 8, of_name), "left"), (1, text, "right")):
            axis.annotate(
                words, (x, place - 0.18), xycoords=("axes fraction", "data"), ha=side_of, va="bottom", fontsize=8
            )
    axis.set(ylim=(len(labels) - 0.5, -0.75), xlabel=f"{measure}: difference to {baseline} (points)")
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)
    return figure


def _effect(values: np.ndarray, bounds: tuple[float, float] | None) -> str:
    """``+2.5 (−2.0 … +7.0), n = 3``."""
    said = f"{values.mean():+.1f}" + (f" ({bounds[0]:+.1f} … {bounds[1]:+.1f})" if bounds else "")
    return f"{said.replace('-', '−')}, n = {len(values)}"


@in_style
def against_number(frame: "pd.DataFrame", measure: str) -> "Figure":
    """A score against the number along which rows differ: columns key, row, seed, number, value; axes by key."""
    keys = list(dict.fromkeys(frame["key"]))
    figure, axes = new_figure(1, len(keys), width=WIDTH if len(keys) > 1 else 0.6 * WIDTH)
    for axis, key in zip(axes, keys, strict=True):
        one = frame[frame["key"] == key]
        for label, style in looks(list(dict.fromkeys(one["row"]))).items():
            mine = one[one["row"] == label]
            _curve(axis, mine, seed_bands(mine, "number"), "number", label, style)
        axis.set(xlabel=key.rsplit(".", 1)[-1].replace("_", " "), ylabel=f"{measure} (%)")
        axis.legend(loc="best", fontsize=7)
    return figure


@in_style
def schedule_curves(frame: "pd.DataFrame", measure: str = "AP", rows: Sequence[str] | None = None) -> "Figure":
    """A score against iterations for full-length and shortened schedules.

    ``frame`` has columns row, schedule, seed, iteration, value. Colour is for the row, dashes are for the schedule (the
    longest is solid); the last value of each curve is marked and written.
    """
    labels = list(rows or dict.fromkeys(frame["row"]))
    lengths = frame.groupby("schedule")["iteration"].max().sort_values(ascending=False)
    figure, (axis,) = new_figure(1, 1, width=WIDTH * 0.72, height=3.2)
    for label, style in looks(labels).items():
        for dashes, schedule in zip(("-", (0, (4, 1.5)), (0, (1, 1.2))), lengths.index, strict=False):
            one = frame[(frame["row"] == label) & (frame["schedule"] == schedule)]
            if not one.empty:
                bands, unmarked = seed_bands(one, "iteration"), {**style, "linestyle": dashes, "marker": None}
                _curve(axis, one, bands, "iteration", f"{label}, {schedule}", unmarked)
                _mark_end(axis, _shared(bands, one["seed"].nunique(), "iteration"), style)
    _dress(axis, "iteration", measure)
    axis.set_title(f"{measure} over training")
    axis.margins(x=0.08)
    legend_above(figure, axis, columns=2)
    return figure


def _mark_end(axis: "Axes", bands: "pd.DataFrame", style: Mapping[str, Any]) -> None:
    if bands.empty:
        return
    last = bands.loc[bands["iteration"].idxmax()]
    axis.plot(last["iteration"], last["mean"], color=style["color"], marker=style["marker"], markersize=5)
    axis.annotate(
        f"{last['mean']:.1f}",
        (last["iteration"], last["mean"]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=style["color"],
        fontsize=8,
    )


@in_style
def transition_matrix(matrices: Mapping[str, np.ndarray]) -> "Figure":
    """How often an object has the same query at two layers, in percent: row label → (A, A) of
    :func:`analysis.layer_table.transitions`.
    """
    columns = min(3, len(matrices))
    lines = -(-len(matrices) // columns)
    size = WIDTH / max(2, columns)
    figure, axes = new_figure(lines, columns, width=size * columns, height=size)
    for axis, (label, matrix) in zip(axes, matrices.items(), strict=False):
        _numbers(axis, matrix)
        axis.set_title(label)
        axis.set(xlabel="layer (numbers: same query, %)", ylabel="layer")
    for axis in axes[len(matrices) :]:
        axis.set_visible(False)
    return figure


def _numbers(axis: "Axes", matrix: np.ndarray) -> None:
    """The cells of a matrix of percentages, coloured and with their numbers; NaN is an empty cell.

    At 53 % dark and white letters have the same contrast.
    """
    axis.pcolormesh(np.ma.masked_invalid(matrix), vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ink, size = "#262626" if value > 53 else "white", 6.5 if len(matrix) <= 10 else 5
            axis.text(j + 0.5, i + 0.5, f"{value:.0f}", color=ink, size=size, ha="center", va="center")
    names = [str(layer) for layer in range(len(matrix))]
    middle = np.arange(len(matrix)) + 0.5
    axis.set_xticks(middle, names)
    axis.set_yticks(middle, names)
    axis.set(aspect="equal", ylim=(len(matrix), 0))
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


@in_style
def drop_distribution(frame: "pd.DataFrame", rows: Sequence[str] | None = None) -> "Figure":
    """IoU drops of matched queries between adjacent layers: columns row, layer (the later one), drop in [0, 1] or NaN.

    Left: share of all (query, layer) pairs that drop at least x. Right: per layer, quartiles as a box, 5th to 95th
    percentile as whiskers.
    """
    labels = list(rows or dict.fromkeys(frame["row"]))
    known = frame.dropna(subset=["drop"])
    figure, (left, right) = new_figure(1, 2)
    styles = looks(labels)
    for label, style in styles.items():
        drops = np.sort(known.loc[known["row"] == label, "drop"].to_numpy())
        at = np.unique(np.linspace(0, drops.size - 1, min(drops.size, 400)).astype(int))
        drops, share = drops[at], 100 * (1 - at / max(1, drops.size))
        left.plot(drops, share, label=label, markevery=_every(drops.size), **style)
    left.set(
        xlabel="IoU drop x between adjacent layers", ylabel="pairs that drop at least x (%)", xlim=(0, 1), ylim=(0, 100)
    )
    left.set_title("All layers")
    if len(known):
        _boxes(right, known, styles)
    right.set(xlabel="decoder layer", ylabel="IoU drop to this layer", ylim=(0, 1))
    right.set_title("By layer")
    legend_above(figure, left)
    return figure


_HATCHES = ("", "////", "....", "xx", "\\\\\\\\", "++", "oo")
"""By which boxes of rows are told apart without their colour: in grey print too."""


def _boxes(axis: "Axes", frame: "pd.DataFrame", styles: Mapping[str, Mapping[str, Any]]) -> None:
    """A box for each layer and row, those of a layer side by side."""
    from matplotlib.cbook import boxplot_stats

    layers, pitch = np.unique(frame["layer"].to_numpy(int)), 0.75 / len(styles)
    line: dict[str, Any] = {"color": "#444444", "linewidth": 0.7}
    for place, (label, style) in enumerate(styles.items()):
        mine = frame[frame["row"] == label].groupby("layer")["drop"]
        found = [(layer, mine.get_group(layer).to_numpy()) for layer in layers if layer in mine.groups]
        box = {"facecolor": style["color"], "edgecolor": line["color"], "linewidth": 0.7, "hatch": _HATCHES[place % 7]}
        axis.bxp(
            boxplot_stats([drops for _, drops in found], whis=(5, 95)),
            positions=[layer + (place - (len(styles) - 1) / 2) * pitch for layer, _ in found],
            widths=0.88 * pitch, capwidths=0.44 * pitch, showfliers=False, patch_artist=True, manage_ticks=False,
            boxprops=box, medianprops=line, whiskerprops=line, capprops=line,
        )  # fmt: skip
    axis.set(xticks=layers, xlim=(layers[0] - 0.5, layers[-1] + 0.5))
    axis.grid(axis="x", visible=False)


@in_style
def query_usage(counts: Mapping[str, np.ndarray]) -> "Figure":
    """How unevenly queries are used: row label → (Q,) counts of :func:`analysis.layer_table.query_usage`, drawn by
    falling use.

    The dashed line is even use; the title gives the share ever used and the effective number, exp of the entropy.
    """
    from analysis.layer_table import effective_queries

    columns = min(3, len(counts))
    lines = -(-len(counts) // columns)
    figure, axes = new_figure(lines, columns, height=2.4, margins=Margins(top=0.5), sharey=True)
    for (label, values), style, axis in zip(counts.items(), looks(list(counts)).values(), axes, strict=False):
        share = 100 * np.sort(values)[::-1] / max(1, values.sum())
        axis.bar(np.arange(1, len(share) + 1), share, width=0.85, color=style["color"])
        axis.axhline(100 / len(share), color="#444444", linewidth=0.8, linestyle=(0, (4, 2)))
        axis.set_title(
            f"{label}\n{(values > 0).sum()} of {len(values)} used, effective {effective_queries(values):.1f}"
        )
        axis.set_xlabel("query, by falling use")
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("share of matched objects (%)")
    for axis in axes[len(counts) :]:
        axis.set_visible(False)
    return figure
