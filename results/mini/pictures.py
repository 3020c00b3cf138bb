"""The figures of the study's page, drawn by the project's own figures; no photograph is shown."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claims import SETS

from analysis.figures import per_layer_curves
from analysis.style import Margins, in_style, look, new_figure, styled, wrapped
from reports import figures, jump_picture, mask_pictures
from reports.mask_pictures import LayerMasks

if TYPE_CHECKING:
    from answers import Answer, Kept
    from matplotlib.figure import Figure

    from reports.collect import SuiteReport

_MEASURES = ("mIoU-L", "IoU-gt", "Util", "AP", "PQ", "mIoU")
DRAWN = "shapes"


def draw(kept: "Kept", answers: "Sequence[Answer]", out: Path) -> None:
    """Write what there is data for: ``effects``, ``toggles``, and by set ``jumps-…`` and ``layers-…``, as PNG."""
    out.mkdir(parents=True, exist_ok=True)
    tested = [a for a in answers if a.test is not None]
    claimed = [a for a in tested if a.of.suite in (kept.headline, "study-convergence")]
    if claimed:
        save(effects(claimed, lambda a: f"{a.claim} {a.of.metric.name}"), out / "effects.png")
    toggles = [a for a in tested if a.claim == "C7"]
    if toggles:
        save(effects(toggles, lambda a: toggle(kept, a)), out / "toggles.png")
    for name in SETS:
        report = kept.report(kept.headline, name)
        if report is not None and any(row.done for row in report.rows):
            save(layers(report), out / f"layers-{name}.png")
            picture = jumps(report, images=name == DRAWN)
            if picture is not None:
                save(picture, out / f"jumps-{name}.png")


def toggle(kept: "Kept", answer: "Answer") -> str:
    """A comparison in its rows' own words: "+ point noise", or "MP-Former less guided first"."""
    report = kept.report(answer.of.suite, answer.set)
    labels = {row.name: row.label for row in report.rows} if report else {}
    row = labels[answer.of.row]
    if row.startswith("+"):
        return row
    mine, theirs = row.split(",")[0], labels[answer.of.against].split(",")[0]
    if theirs.startswith(f"{mine} "):
        theirs = f"one {theirs.removeprefix(f'{mine} ')}"
    return f"{mine} less {theirs}"


def save(figure: "Figure", path: Path) -> None:
    """Write a figure on its white ground, which any page may show."""
    with styled():
        figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight", metadata={"Software": None})


@in_style
def effects(answers: "Sequence[Answer]", said: "Callable[[Answer], str]") -> "Figure":
    """A forest of comparisons, in the claim's direction: one axes a set that has runs, a line what ``said`` calls it.

    Each is shown in multiples of its smallest effect that matters, since the metrics have different units. The axes
    stand below each other, so that a phone shows them at a size that can be read.
    """
    answers = sorted(answers, key=lambda answer: answer.claim)
    sets = [name for name in SETS if any(a.set == name for a in answers)]
    lines = [sum(a.set == name for a in answers) for name in sets]
    margins = Margins(left=2.15, right=0.8, top=0.35, bottom=0.5)
    height, shares = 0.85 + 0.2 * sum(lines) / len(lines), {"height_ratios": lines}
    figure, axes = new_figure(len(sets), 1, width=5.6, height=height, margins=margins, gridspec_kw=shares)
    for axis, name in zip(axes, sets, strict=True):
        shown = [(answer, answer.test) for answer in answers if answer.set == name and answer.test is not None]
        colour = look(SETS.index(name))["color"]
        for y, (answer, test) in enumerate(shown):
            unit = 1 / answer.of.smallest
            if test.low is not None and test.high is not None:
                axis.plot([unit * test.low, unit * test.high], [y, y], color=colour, linewidth=1.8)
            axis.plot([unit * test.effect], [y], "s", color=colour, markersize=5)
            axis.annotate(f"n = {answer.n}", (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.axvspan(-1, 1, color="#777777", alpha=0.12, linewidth=0)
        axis.set(title=name, xlabel="effect / smallest that matters", ylim=(len(shown) - 0.5, -0.5))
        axis.set_yticks(range(len(shown)), [wrapped(said(a), 7, 2.0) for a, _ in shown])
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(axis="y", visible=False)
    return figure


def layers(report: "SuiteReport") -> "Figure":
    """Consistency and quality of every layer, the headline's rows over their seeds."""
    lines = [
        (row.label, view.seed, layer, measure, number)
        for row in report.rows
        for view in row.done
        for measure in _MEASURES
        for layer, number in enumerate((view.result or {}).get("layers", {}).get(measure) or ())
        if number is not None
    ]
    return per_layer_curves(figures.frame(lines), rows=[row.label for row in report.rows if row.done])


def jumps(report: "SuiteReport", *, images: bool) -> Any:
    """The jump picture of the first seed whose masks both rows keep; ``images``: on them, else on a plain ground."""
    for (_, theirs), (_, mine) in figures.pairs(report):
        folders = [LayerMasks(view.directory.evaluation(view.eval_id) / "layer_masks") for view in (theirs, mine)]
        if all(folder.images for folder in folders):
            found = mask_pictures.align(folders)
            picture = jump_picture.of_suite(report, found if images else replace(found, pictures={}), [theirs, mine])
            return None if picture is None else next(jump_picture.plans(report, picture)).draw()
    return None
