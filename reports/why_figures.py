"""Figures of why mask piloting works: how stable the matching is, where attention masks miss, how exact gradients are,
and scores of full-length and shortened schedules.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from reports.collect import RowRuns, SuiteReport
from reports.figures import (
    BANDS,
    Plan,
    common_label,
    curve,
    curve_score,
    frame,
    iterations,
    left_out,
    row_labels,
    same_but_schedule,
    shown_rows,
    under_way,
)
from reports.runs import RunView

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Drawing

_ATTENTION = {
    "empty_attention_share": "empty_attention_share",
    "attention_miss_share": "attention_miss_share",
    "gradient_cosine": "cosine",
    "gradient_relative_error": "relative_error",
}
"""Names of values of ``result.json``'s layers → names of what is drawn."""
_OVER_TRAINING = ("Util", "stability", "mIoU-L", "IoU-gt", "empty_attention_share")


def plans(report: SuiteReport) -> Iterator[Plan]:
    """The figures that the suite's runs have data for; a plan without data is empty."""
    rows, few = shown_rows(report), left_out(report)
    if any(row.done for row in rows):
        yield _stability_plan(rows, few)
        yield _attention_plan(rows, few)
    if any(view.lines for row in rows for view in row.views):
        yield _probes_plan(rows, few)
    yield from _schedule_plan(report)


def _stability_plan(rows: Sequence[RowRuns], few: str) -> Plan:
    labels = row_labels(rows)
    data = frame(
        (labels[row.name], view.seed, layer, measure, value)
        for row in rows
        for view in row.done
        for measure, values in _matching(view).items()
        for layer, value in enumerate(values)
        if value is not None
    )
    caption = (
        "Stability of the matching. Left: share of the queries that keep their object from this layer to the next. "
        "Right: share of (image, object) pairs whose query is the same as at the evaluation before, at the end of "
        f"training, on a few images. {BANDS}{few}"
    )
    return _over_layers("stability", "Stability of the matching", caption, data, ("Util-consecutive", "stability"))


def _matching(view: RunView) -> dict[str, list[float | None]]:
    """Per layer: stability towards the next layer, and towards the evaluation before."""
    layers = (view.result or {}).get("layers", {})
    found = {"Util-consecutive": list(layers.get("Util-consecutive") or ())}
    probes = view.probes
    if probes is not None and not probes.empty:
        last = probes[probes["iteration"] == probes["iteration"].max()].sort_values("layer")
        found["stability"] = [None if value != value else float(value) for value in last["stability"]]
    return found


def _attention_plan(rows: Sequence[RowRuns], few: str) -> Plan:
    labels = row_labels(rows)
    data = frame(
        (labels[row.name], view.seed, layer, _ATTENTION[name], value)
        for row in rows
        for view in row.done
        for name in _ATTENTION
        for layer, value in enumerate((view.result or {}).get("layers", {}).get(name) or ())
        if value is not None
    )
    images = max((int((view.result or {}).get("gradient_images", 0)) for row in rows for view in row.done), default=0)
    where = f" on {images} images" if images else ""
    caption = (
        "Predicted attention masks and what they do to gradients. Top: masks made at this layer that are empty (of all "
        "queries), and that have no cell of the object on which their query ends (of matched queries, empty ones "
        "included). Bottom: gradients of a matched query's mask loss with respect to its mask embedding, attending "
        f"through predicted masks against attending through the ground truth (1 and 0: the same){where}. {BANDS}{few}"
    )
    title = "Attention masks and gradients"
    return _over_layers("attention", title, caption, data, tuple(_ATTENTION.values()))


def _over_layers(name: str, title: str, caption: str, data: "pd.DataFrame", measures: tuple[str, ...]) -> Plan:
    def draw() -> "Drawing":
        from analysis.figures import over_layers

        return over_layers(data, measures, list(dict.fromkeys(data["row"])), columns=2)

    return Plan(name, title, caption, data, draw)


def _probes_plan(rows: Sequence[RowRuns], few: str) -> Plan:
    labels = row_labels(rows)
    data = frame(
        (
            (labels[row.name], view.seed, iteration, measure, value)
            for row in rows
            for view in row.views
            if under_way(view)
            for iteration, measure, value in _over_training(view)
        ),
        "iteration",
    )
    measures = [measure for measure in _OVER_TRAINING if measure in set(data["measure"])]
    caption = (
        "Utilisation and stability of the matching over training time, with the quality of the masks beside them: "
        "means over the decoder layers, at the evaluations during training, on a few images. Util leaves out the last "
        f"layer, where it is 100 by definition. {BANDS}{few}"
    )

    def draw() -> "Drawing":
        from analysis.figures import over_iterations

        return over_iterations(data, measures, [text for text in labels.values() if text in set(data["row"])])

    return Plan("matching-over-training", "Matching over training time", caption, data, draw)


def _over_training(view: RunView) -> Iterator[tuple[int, str, float]]:
    probes = view.probes
    if probes is None or probes.empty:
        return
    measured = [measure for measure in _OVER_TRAINING if measure in probes.columns]
    means = probes.groupby("iteration")[measured].mean()
    if "Util" in measured:
        means["Util"] = probes[probes["layer"] < probes["layer"].max()].groupby("iteration")["Util"].mean()
    for measure in measured:
        yield from ((int(i), measure, float(value)) for i, value in means[measure].dropna().items())


def _schedule_plan(report: SuiteReport) -> Iterator[Plan]:
    """Score against iterations where rows differ in nothing but the length of their schedule."""
    groups = [rows for rows in same_but_schedule(report.rows) if len({iterations(row) for row in rows}) > 1]
    if not groups:
        return
    import pandas as pd

    score = curve_score(report, report.rows)
    lines = [
        (common_label(rows), f"{iterations(row)} iterations", view.seed, iteration, value)
        for rows in groups
        for row in rows
        for view in row.views
        if under_way(view)
        for iteration, measure, value in curve(view, score)
        if measure == score
    ]
    data = pd.DataFrame(lines, columns=["row", "schedule", "seed", "iteration", "value"])

    def draw() -> "Drawing":
        from analysis.figures import schedule_curves

        return schedule_curves(data, score)

    caption = f"{score} against iterations for schedules of different length, each run to its own end. {BANDS}"
    yield Plan("schedules", "Full-length and shortened schedules", caption, data, draw)
