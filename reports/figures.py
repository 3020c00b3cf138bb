"""The figures of a suite's page, drawn by :mod:`analysis.figures`, each with its files and its data.

A figure is drawn again only when its data, its caption or the code that draws it changed: the data's digest is kept
beside the files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from analysis.style import CELLS, assigned, cell, look_of, styled
from experiments.store.files import read_json, write_json, write_text
from reports.collect import RowRuns, SuiteReport, number
from reports.escape import SPELT, clean, csv, is_spelt
from reports.escape import figure as figure_text
from reports.formats import FIGURES
from reports.mask_pictures import Case
from reports.runs import RunView

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Drawing

MOST_ROWS = 7
MOST_EFFECTS = 40
_LAYER_MEASURES = (
    "mIoU-L",
    "IoU-gt",
    "Util",
    "AP",
    "PQ",
    "mIoU",
    "mIoU-L-last",
    "Util-consecutive",
    "empty_attention_share",
)
BANDS = "Lines: mean over seeds; bands: 95 % interval of the mean, from three seeds on; the legend gives n."


@dataclass(frozen=True)
class Figure:
    """A drawn figure: inline SVG, a caption that says what is shown, and the files written beside the page."""

    name: str
    title: str
    caption: str
    svg: Markup
    files: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()
    """Views (x, y, width, height) of the SVG, one an axes, for a page that is too narrow for all side by side."""
    legend: tuple[tuple[str, str], ...] = ()
    """For the same page, each entry of the legend: the view of its sign, and its text."""
    reason: str = ""
    """Why it cannot be drawn; empty if it is."""


@dataclass(frozen=True)
class Plan:
    """A figure to draw: ``data`` is what its CSV holds, ``draw`` is called only if that changed."""

    name: str
    title: str
    caption: str
    data: "pd.DataFrame"
    draw: Callable[[], "Drawing"]
    reason: str = ""
    """Why there is nothing to draw; empty if there is."""
    file_alone: bool = False
    """Whether the page shows this in a form of its own: it is drawn where files of figures are asked for."""


def why_missing(what: str, error: Exception) -> str:
    """What a page says in the place of a part that could not be made."""
    return f"{what} cannot be shown: {clean(error) or type(error).__name__} ({type(error).__name__})."


def safely(plans: Iterable[Plan]) -> Iterator[Plan]:
    """The plans; what cannot be planned is a plan that says why."""
    import pandas as pd

    try:
        yield from plans
    except Exception as error:  # files of the store may hold anything
        yield Plan("not-planned", "A figure", "", pd.DataFrame(), _nothing, why_missing("It", error))


def _nothing() -> "Drawing":
    raise AssertionError("a plan without data is not drawn")


def suite_figures(
    report: SuiteReport,
    cases: Sequence[Case],
    names: Sequence[str],
    folder: Path,
    kinds: Sequence[str] = tuple(FIGURES),
    further: Iterable[Plan] = (),
) -> list[Figure]:
    """Draw a suite's figures into ``folder``, as ``kinds`` out of FIGURES (what the page shows as SVG always) and with
    their data as CSV.

    ``further`` plans follow after the suite's own. Figures whose data is not there yet are left out; one that cannot be
    drawn says why.
    """
    wanted = tuple(kind for kind in FIGURES if kind == "svg" or kind in kinds)
    files = bool(FIGURES.keys() & set(kinds))
    plans = [plan for plan in (*_plans(report, cases, names), *safely(further)) if files or not plan.file_alone]
    looks = row_looks(report)
    spelt = f" {SPELT}" if any(is_spelt(row.label) for row in report.rows) else ""
    named = [replace(plan, caption=plan.caption + spelt) for plan in plans if plan.reason or not plan.data.empty]
    return [_drawn(plan, folder, wanted, looks) for plan in named]


def _plans(report: SuiteReport, cases: Sequence[Case], names: Sequence[str]) -> Iterator[Plan]:
    """From the first logged iteration on: what there is no data of yet is an empty plan."""
    makers: tuple[Callable[[], Iterable[Plan]], ...] = (
        lambda: [_forest_plan(report)],
        lambda: [_number_plan(report)],
        lambda: [_layers_plan(report)],
        lambda: [_training_plan(report)],
        lambda: _pair_plans(report),
        lambda: [_gallery_plan(cases, names)] if cases else [],
    )
    for make in makers:
        yield from safely(_made(make))


def _made(make: Callable[[], Iterable[Plan]]) -> Iterator[Plan]:
    yield from make()


def shown_rows(report: SuiteReport) -> list[RowRuns]:
    """The rows that a figure has room for: the baseline and the best of the primary metric, in table order."""
    if len(report.rows) <= MOST_ROWS:
        return list(report.rows)
    ranked = sorted(report.rows, key=lambda row: (row is not report.baseline, -_primary_mean(report, row)))
    kept = ranked[:MOST_ROWS]
    return [row for row in report.rows if row in kept]


def left_out(report: SuiteReport) -> str:
    """What a caption says where not all rows are shown."""
    shown = len(shown_rows(report))
    return (
        ""
        if shown == len(report.rows)
        else f" Shown: the baseline and the {shown - 1} best rows of {len(report.rows)}."
    )


def _primary_mean(report: SuiteReport, row: RowRuns) -> float:
    cells = report.table.rows[report.rows.index(row)].cells
    keys = [column.key for column in report.table.columns]
    cell = cells[keys.index(report.table.primary)] if report.table.primary in keys else cells[0]
    return cell.mean if cell.n and cell.mean is not None else -1e9


def label(text: str, most: int = 36) -> str:
    """A label of a figure: one short line (:func:`reports.escape.figure`)."""
    return figure_text(text, most)


def row_labels(rows: Sequence[RowRuns]) -> dict[str, str]:
    """Row name → label; rows whose shortened labels are equal are told apart by name."""
    short = {row.name: label(row.label) for row in rows}
    twice = {text for text in short.values() if list(short.values()).count(text) > 1}
    return {name: f"{text} [{label(name)}]" if text in twice else text for name, text in short.items()}


Looks = Mapping[str, dict[str, Any]]


def row_looks(report: SuiteReport) -> Looks:
    """How every row is drawn in every figure of the suite, by label: colour and marker are the method (what is the same
    but for the schedule), dashes the schedule. The baseline and the row it is compared with in pictures come first.
    """
    labels = row_labels(report.rows)
    first = [row for row, _ in next(pairs(report), ())]
    ranked = sorted(
        same_but_schedule(report.rows), key=lambda rows: min((first.index(r) for r in rows if r in first), default=2)
    )
    found: dict[str, dict[str, Any]] = {}
    with styled():
        for method, rows in enumerate(ranked):
            lengths = sorted({iterations(row) for row in rows}, reverse=True)
            found |= {labels[row.name]: look_of(method, lengths.index(iterations(row))) for row in rows}
            found.setdefault(common_label(rows), look_of(method))
    return found


def same_but_schedule(rows: Sequence[RowRuns]) -> list[list[RowRuns]]:
    """The rows in groups that differ in nothing but their schedule; a row that was never begun is alone."""
    groups: dict[str, list[RowRuns]] = {}
    for row in rows:
        config = next((view.config for view in row.views if view.config), None)
        rest = (
            {name: config[name] for name in ("dataset", "model", "toggles") if name in config} if config else row.name
        )
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    return list(groups.values())


def iterations(row: RowRuns) -> int:
    """The length of the row's schedule; 0 if it is unknown."""
    return max((view.max_iter for view in row.views), default=0)


def common_label(rows: Sequence[RowRuns]) -> str:
    """What the labels of rows begin with, all alike, in whole words."""
    words = [label.split() for label in row_labels(rows).values()]
    alike = []
    for column in zip(*words, strict=False):
        if len(set(column)) > 1:
            break
        alike.append(column[0])
    return " ".join(alike).rstrip(",(") or rows[0].name


def _forest_plan(report: SuiteReport) -> Plan:
    """The differences of the primary metric to each row's baseline."""
    import pandas as pd

    labels, column = row_labels(report.rows), report.table.primary
    found = {}
    for row in report.rows:
        base = report.baseline_of(row)
        theirs = dict(_scores(base, column)) if base else {}
        found[labels[row.name]] = [
            (seed, value - theirs[seed]) for seed, value in _scores(row, column) if seed in theirs
        ]
    ranked = sorted((label for label in found if found[label]), key=lambda label: -abs(_mean(found[label])))[
        :MOST_EFFECTS
    ]
    lines = [(label, seed, value) for label, pairs in found.items() if label in ranked for seed, value in pairs]
    data = pd.DataFrame(lines, columns=["row", "seed", "value"])

    def draw() -> "Drawing":
        from analysis.figures import forest

        own = {row.baseline for row in report.rows}
        return forest(
            data, column, label(report.baseline.label) if report.baseline and len(own) == 1 else "its baseline"
        )

    few = f" Shown: the {MOST_EFFECTS} largest of {len(report.rows) - 1}." if len(ranked) == MOST_EFFECTS else ""
    caption = (
        f"{column}: each row less its baseline, paired by seed. Dots: seeds; squares: their mean; lines: its "
        f"95 % interval (paired t on the arcsine scale), from three pairs on, not corrected for their number (the "
        f"table's stars are).{few}"
    )
    return Plan("effects", "Effects", caption, data, draw)


def _mean(pairs: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in pairs) / len(pairs)


def _scores(row: RowRuns, key: str) -> list[tuple[int, float]]:
    values = ((view.seed, number(view, key, view.result)) for view in row.done)
    return [(seed, value) for seed, value in values if value is not None]


def _number_plan(report: SuiteReport) -> Plan:
    """The primary metric against a configuration's number, where at least three rows differ in nothing else."""
    import pandas as pd

    lines = [
        (key, called, seed, at, score)
        for key, rows in _along_numbers(report.rows)
        for called in [common_label(rows)]
        for row in rows
        for at in [_flat(row)[key]]
        for seed, score in _scores(row, report.table.primary)
    ]
    data = pd.DataFrame(lines, columns=["key", "row", "seed", "number", "value"])

    def draw() -> "Drawing":
        from analysis.figures import against_number

        return against_number(data, report.table.primary)

    caption = f"{report.table.primary} against a number in which alone the rows of a curve differ. {BANDS}"
    return Plan("along", "Along a number", caption, data, draw)


def _along_numbers(rows: Sequence[RowRuns], most: int = 3) -> list[tuple[str, list[RowRuns]]]:
    """(key, rows in the order of its value) of at least three rows that differ in this number alone."""
    trees = {row.name: _flat(row) for row in rows if _flat(row)}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    found = []
    for key in keys:
        if len({str(tree.get(key)) for tree in trees.values()}) < 3:
            continue
        groups: dict[str, list[RowRuns]] = {}
        for row in rows:
            tree = trees.get(row.name, {})
            if isinstance(tree.get(key), int | float) and not isinstance(tree[key], bool):
                rest = json.dumps({name: value for name, value in tree.items() if name != key}, sort_keys=True)
                groups.setdefault(rest, []).append(row)
        found += [(key, sorted(g, key=lambda row: trees[row.name][key])) for g in groups.values() if len(g) >= 3]
    return found[:most]


def _flat(row: RowRuns) -> Mapping[str, Any]:
    """The row's configuration as dotted keys, the seed left out."""
    config = next((view.flat for view in row.views if view.config), {})
    return {key: value for key, value in config.items() if key != "seed"}


MANY = 4
"""From so many rows on, curves are differences to the baseline: among many, nobody sees which is higher."""


def as_differences(report: SuiteReport, rows: Sequence[RowRuns], data: "pd.DataFrame", x: str) -> tuple[Any, str, str]:
    """``data`` less the baseline's values, paired by seed, at the same x and measure, if the figure shows MANY rows or
    more; with the baseline's label, and what the caption says of it. Else the data as it is, and two empty texts.
    """
    labels = row_labels(rows)
    base = report.baseline
    own = {row.baseline for row in rows}
    if len(rows) < MANY or base is None or base not in rows or own != {base.name} or data.empty:
        return data, "", ""
    theirs = data[data["row"] == labels[base.name]].drop(columns="row").rename(columns={"value": "base"})
    paired = data[data["row"] != labels[base.name]].merge(theirs, on=["seed", x, "measure"])
    if paired.empty:
        return data, "", ""
    found = paired.assign(value=paired["value"] - paired["base"]).drop(columns="base")
    return found, labels[base.name], f" Curves are differences to {base.label}, paired by seed."


def _layers_plan(report: SuiteReport) -> Plan:
    rows, few = shown_rows(report), left_out(report)
    labels = row_labels(rows)
    data = frame(
        (labels[row.name], view.seed, layer, measure, value)
        for row in rows
        for view in row.done
        for measure in _LAYER_MEASURES
        for layer, value in enumerate((view.result or {}).get("layers", {}).get(measure) or ())
        if value is not None
    )
    caption = (
        "Consistency of each decoder layer (left) beside the quality of the same layer (right): a decoder that "
        "never refines is "
        f"perfectly consistent. Layer 0: the bare learnable queries. {BANDS}{few}"
    )
    data, baseline, said = as_differences(report, rows, data, "layer")

    def draw() -> "Drawing":
        from analysis.figures import per_layer_curves

        shown = [text for text in labels.values() if text in set(data["row"])]
        return per_layer_curves(data, rows=shown, baseline=baseline)

    return Plan("layers", "Layer by layer", caption + said, data, draw)


def frame(lines: Iterable[tuple[Any, ...]], x: str = "layer") -> "pd.DataFrame":
    """Lines (row, seed, ``x``, measure, value) as the figures of analysis take them."""
    import pandas as pd

    return pd.DataFrame(list(lines), columns=["row", "seed", x, "measure", "value"])


def _training_plan(report: SuiteReport) -> Plan:
    rows, few = shown_rows(report), left_out(report)
    labels = row_labels(rows)
    score = curve_score(report, rows)
    data = frame(
        (
            (labels[row.name], view.seed, iteration, measure, value)
            for row in rows
            for view in row.views
            if under_way(view)
            for iteration, measure, value in curve(view, score)
        ),
        "iteration",
    )
    data, baseline, said = as_differences(report, rows, data, "iteration")
    caption = (
        f"Training loss (left) and {score} at the evaluations during training (right), on the first "
        f"validation images only. {BANDS}{few}"
    )

    def draw() -> "Drawing":
        from analysis.figures import training_curves

        shown = [text for text in labels.values() if text in set(data["row"])]
        return training_curves(data, ("loss", score), shown, baseline)

    return Plan("training", "Training", caption + said, data, draw)


def under_way(view: RunView) -> bool:
    """Whether a run's curves belong into figures: it trains or is done, by the identity scheme of today."""
    return view.standing.state in ("DONE", "RUNNING", "TRAINED") and not view.old_scheme


def curve_score(report: SuiteReport, rows: Sequence[RowRuns]) -> str:
    """The score drawn against iterations: the table's primary metric where the evaluations during training have it."""
    primary = report.table.primary
    lines = (line for row in rows for view in row.views for line in view.evaluations)
    return primary if any(primary in line.get("metrics", {}) for line in lines) else "AP"


def curve(view: RunView, score: str) -> Iterator[tuple[int, str, float]]:
    """Loss and score lines, the loss as means of at most 120 equal blocks."""
    losses = [
        (int(line["iteration"]), float(line["loss"]))
        for line in view.lines
        if line.get("kind") == "train" and line.get("loss")
    ]
    size = max(1, -(-len(losses) // 120))
    for block in (losses[i : i + size] for i in range(0, len(losses), size)):
        yield block[-1][0], "loss", sum(loss for _, loss in block) / len(block)
    for line in view.evaluations:
        # The final evaluation is on other images: it is the table's number, not a point of this curve.
        if not line.get("final") and line.get("metrics", {}).get(score) is not None:
            yield int(line["iteration"]), score, float(line["metrics"][score])


Pair = tuple[tuple[RowRuns, RunView], tuple[RowRuns, RunView]]


def pairs(report: SuiteReport) -> Iterator[Pair]:
    """The baseline and another row, from the last row on, at the first seed that both have done."""
    base = report.baseline
    for row in reversed(report.rows):
        for mine in row.done if base is not None and row is not base else ():
            theirs = next((view for view in base.done if view.seed == mine.seed), None) if base else None
            if theirs is not None and base is not None:
                yield (base, theirs), (row, mine)


def _pair_plans(report: SuiteReport) -> Iterator[Plan]:
    """Figures of one run each of two rows, from ``layers.parquet``; none where the files are not there."""
    chosen = next(pairs(report), ())
    found = {label(row.label): table for row, view in chosen if (table := view.layer_table) is not None}
    if not chosen or len(found) < len(chosen):
        return
    seed = f"One run each, seed {chosen[0][1].seed}."
    yield _transitions_plan(found, seed)
    yield _drops_plan(found, seed)
    yield _usage_plan(found, seed)


def _transitions_plan(found: Mapping[str, Any], seed: str) -> Plan:
    import pandas as pd

    from analysis import layer_table

    matrices = {text: layer_table.transitions(table) for text, table in found.items()}
    lines = [
        (text, i, j, float(value))
        for text, matrix in matrices.items()
        for i, line in enumerate(matrix)
        for j, value in enumerate(line)
    ]
    data = pd.DataFrame(lines, columns=["row", "layer", "other_layer", "same_query"])

    def draw() -> "Drawing":
        from analysis.figures import transition_matrix

        return transition_matrix(matrices)

    caption = f"Percentage of objects that are matched to the same query at two layers; the last column is Util. {seed}"
    return Plan("transitions", "Which layers agree on the query of an object", caption, data, draw)


def _drops_plan(found: Mapping[str, Any], seed: str) -> Plan:
    import pandas as pd

    from analysis import layer_table

    drops = {text: layer_table.iou_drops(table) for text, table in found.items()}
    lines = [(text, *line) for text, mine in drops.items() for line in _drop_summary(mine)]
    data = pd.DataFrame(lines, columns=["row", "layer", "measure", "value"])

    def draw() -> "Drawing":
        from analysis.figures import drop_distribution

        single = [
            (text, layer + 1, float(drop))
            for text, mine in drops.items()
            for layer, of in enumerate(mine)
            for drop in of
        ]
        return drop_distribution(pd.DataFrame(single, columns=["row", "layer", "drop"]).dropna(), list(found))

    caption = (
        f"How far the masks of matched queries move between adjacent layers: 1 − IoU. Pairs of two empty masks are "
        f"left out. {seed}"
    )
    return Plan("drops", "Distribution of IoU drops", caption, data, draw)


def _drop_summary(drops: Any) -> Iterator[tuple[str, str, float]]:
    """(layer, measure, value) of what is drawn of (L, pairs) drops, however many pairs there are."""
    import numpy as np

    known = drops[np.isfinite(drops)]
    for x in np.linspace(0, 1, 51) if known.size else ():
        yield "all", f"% that drop at least {x:.2f}", float(100 * (known >= x).mean())
    for layer, of in enumerate(drops, 1):
        mine = of[np.isfinite(of)]
        for q in (5, 25, 50, 75, 95) if mine.size else ():
            yield str(layer), f"{q}th percentile", float(np.percentile(mine, q))


def _usage_plan(found: Mapping[str, Any], seed: str) -> Plan:
    import pandas as pd

    from analysis import layer_table

    counts = {text: layer_table.query_usage(table) for text, table in found.items()}
    lines = [(text, query, int(count)) for text, values in counts.items() for query, count in enumerate(values)]
    data = pd.DataFrame(lines, columns=["row", "query", "matched"])

    def draw() -> "Drawing":
        from analysis.figures import query_usage

        return query_usage(counts)

    caption = f"How often each learnable query ends up matched to an object, sorted; dashed: even use. {seed}"
    return Plan("query-usage", "Which queries are used", caption, data, draw)


def _gallery_plan(cases: Sequence[Case], names: Sequence[str]) -> Plan:
    from analysis.failure_cases import cases_frame

    labels = [label(name) for name in names]
    cases = [as_figure_text(case) for case in cases]
    data = cases_frame(cases, labels)

    def draw() -> "Drawing":
        from analysis.figures import failure_gallery

        return failure_gallery(cases, labels)

    return Plan("gallery", "Masks between adjacent layers", "", data, draw, file_alone=True)


def as_figure_text(case: Case) -> Case:
    """The case with its class names as a figure shows them."""
    tracks = tuple(
        track and replace(track, steps=tuple(replace(s, class_name=figure_text(s.class_name)) for s in track.steps))
        for track in case.tracks
    )
    return replace(case, class_name=figure_text(case.class_name), tracks=tracks)


@cache
def _code_digest() -> str:
    """What the drawing code is: a figure made by other code is drawn again."""
    import analysis

    folder = Path(analysis.__file__).parent
    names = (
        "figures.py",
        "failure_cases.py",
        "film_strip.py",
        "jumps.py",
        "style.py",
        "style.mplstyle",
        "layer_table.py",
    )
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def _drawn(plan: Plan, folder: Path, kinds: Sequence[str], looks: Looks) -> Figure:
    if plan.reason:
        return Figure(plan.name, plan.title, "", Markup(), reason=plan.reason)
    try:
        return _figure(plan, folder, kinds, looks)
    except OSError:
        raise
    except Exception as error:  # matplotlib may refuse whatever the store holds
        return Figure(plan.name, plan.title, "", Markup(), reason=why_missing("It", error))


def _figure(plan: Plan, folder: Path, kinds: Sequence[str], looks: Looks) -> Figure:
    files = tuple(f"{plan.name}.{suffix}" for suffix in (*kinds, "csv"))
    texts = plan.data.select_dtypes(include=["object", "string"]).map(lambda it: csv(it) if isinstance(it, str) else it)
    text = plan.data.assign(**texts).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    mine = sorted((name, str(look)) for name, look in looks.items() if name in text)
    digest = hashlib.sha256(f"{_code_digest()}\n{mine}\n{text}".encode()).hexdigest()
    record = folder / f".{plan.name}.json"
    known = read_json(record) or {}
    old = [kind for kind in kinds if known.get(kind) != digest or not (folder / f"{plan.name}.{kind}").exists()]
    if old or not (folder / f"{plan.name}.csv").exists():
        with assigned(looks):
            views = _draw(plan, folder / plan.name, old)
        write_text(folder / f"{plan.name}.csv", text)
        known = {**known, **dict.fromkeys(old, digest), **views}
        write_json(record, known)
    svg = inline_svg((folder / f"{plan.name}.svg").read_text(), plan.title, plan.name)
    legend = tuple((view, said) for view, said in known.get("legend") or ())
    return Figure(plan.name, plan.title, plan.caption, svg, files, tuple(known.get("panels") or ()), legend)


def _draw(plan: Plan, stem: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Draw a figure and write it as each kind; returns its panels and its legend."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawing = plan.draw()
    for patch in (drawing.patch, *(axes.patch for axes in drawing.axes)):
        patch.set_gid("ground")  # by which a page finds what would be a white box in the dark
    views: dict[str, Any] = {}
    with styled():
        drawing.dpi = 72  # that of an SVG
        for kind in kinds:
            file = stem.with_name(f"{stem.name}.{kind}")
            drawing.savefig(file, format=kind, metadata=dict(FIGURES[kind]), bbox_inches=drawing.bbox_inches)
            if kind == "svg" and drawing.get_label() == CELLS:
                views = {"panels": _panels(drawing), "legend": _legend(drawing)}
    return views


def _panels(drawing: "Drawing") -> list[str]:
    """Views of a figure whose axes stand in cells, one a cell."""
    return [_view(cell(axes)) for axes in drawing.axes if axes.get_visible()]


def _legend(drawing: "Drawing") -> list[tuple[str, str]]:
    """Each entry of the figure's legend: the view of its sign where it was just drawn, and its text."""
    found, inch, top = [], drawing.dpi, drawing.get_figheight()
    for legend in drawing.legends:
        for sign, said in zip(filter(None, legend.legend_handles), legend.get_texts(), strict=True):
            box = sign.get_window_extent().padded(inch / 36)  # a line without markers has no height
            view = _view([box.x0 / inch, top - box.y1 / inch, box.width / inch, box.height / inch])
            found.append((view, said.get_text().replace(" = ", "\u00a0=\u00a0")))
    return found


def _view(box: Sequence[float]) -> str:
    """A box (left, top, width, height) in inches as the view of an SVG, in points."""
    return " ".join(f"{72 * side:.1f}" for side in box)


_THEME = {
    **dict.fromkeys(("#000000", "#111111", "#222222", "#333333", "#444444"), "--fg"),
    **dict.fromkeys(("#555555", "#666666", "#777777"), "--muted"),
    "#dddddd": "--rule",
}
_INK = re.compile(rf"\b(fill|stroke): ({'|'.join(_THEME)})(?=[;\"])")
_GROUND = re.compile(r'(<g id="ground[^"]*">\s*<path d="[^"]*"[^>]*style=")fill: #ffffff')


def inline_svg(document: str, title: str, prefix: str) -> Markup:
    """An SVG file as an element of a page: no prologue, ids of its own, a name for screen readers, the page's colours
    for text and lines, and no ground.
    """
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = _GROUND.sub(r"\1fill: none", element)
    element = _INK.sub(lambda found: f"{found[1]}: var({_THEME[found[2]]})", element)
    element = re.sub(r'\b(id="|href="#)', rf"\g<1>{prefix}-", element)
    element = re.sub(r"url\(#", f"url(#{prefix}-", element)
    return Markup(element.replace("<svg", str(Markup('<svg role="img" aria-label="{}"').format(title)), 1))
