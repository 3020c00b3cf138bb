"""The picture that explains mask piloting: one object layer by layer in each run (film strips), and below it every
object of the validation set as one line (barcodes) with the share of them that jump (:mod:`analysis.jumps`).

The object is chosen by :func:`choose`'s rule, never by hand, and the opposite extreme by that rule stands beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.failure_cases import Aligned, Case, Step, Track, pixels, show
from analysis.jumps import THRESHOLD, checkpoint_interval, jumps
from analysis.statistics import MIN_SEEDS, bounded_interval, paired_t
from analysis.style import BOLD, JUMP, in_style, look, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.layer_table import LayerTable

AREA, GOOD = 0.05, 0.5


def rule(runs: int, *, met: bool) -> str:
    """How :func:`choose` finds the strips' objects among ``runs`` runs, or that none of the images has one."""
    ends = f"{'both runs end' if runs > 1 else 'the run ends'} with IoU and score ≥ {GOOD}"
    large = f"Objects by rule: things of at least {100 * AREA:.0f} % of the image on which {ends}"
    if not met:
        return f"{large}. None of these images has one, so that no strip is shown."
    of_two = "the largest difference in jumps (first run − second), ties by the difference of the worst step"
    most = of_two if runs > 1 else "the most jumps, ties by the worst step"
    beside = "Small: the opposite extreme by the same rule. On target: IoU of the mask with the object (outlined)."
    return f"{large}; {most}. {beside}"


def choose(found: Aligned) -> tuple[Case, ...]:
    """The object with the largest difference in jumps between the first run and the last, and that with the smallest.

    Of one run: with the most jumps and the fewest. One case where one object alone qualifies, none where none does.
    """
    ranked = sorted(
        (_rank(by_run), -image, -obj)
        for image, by_object in found.tracks.items()
        for obj in _candidates(found, image)
        if (by_run := [mine[obj] for mine in by_object])
    )
    ends = dict.fromkeys((ranked[-1], ranked[0])) if ranked else {}
    return tuple(found.case(-image, -obj) for _, image, obj in ends)


def _candidates(found: Aligned, image: int) -> list[int]:
    """Objects of an image that are large enough and end well in every run."""
    objects = {int(o["object"]) for o in found.records[0][image]["objects"] if o.get("thing", True)}
    ending = [{obj for obj, track in mine.items() if _good(track)} for mine in found.tracks[image]]
    return [obj for obj in sorted(objects.intersection(*ending)) if found.case(image, obj).truth.mean() >= AREA]


def _good(track: Track) -> bool:
    last = track.steps[-1]
    return last.score >= GOOD and last.iou_gt is not None and last.iou_gt >= GOOD


def _rank(tracks: Sequence[Track]) -> tuple[int, float]:
    jumped, dropped = [track.jumps for track in tracks], [track.drop() for track in tracks]
    if len(tracks) == 1:
        return jumped[0], dropped[0]
    return jumped[0] - jumped[-1], round(dropped[0] - dropped[-1], 4)


def on_target(step: Step) -> str:
    """``on target 87 %``: the IoU of the step's mask with the object."""
    return "on target –" if step.iou_gt is None else f"on target {100 * step.iou_gt:.0f} %"


def layer_name(layer: int) -> str:
    """``start`` for the bare queries, else ``layer 3``."""
    return f"layer {layer}" if layer else "start"


# ------------------------------------------------------------------ barcodes and rates


@dataclass(frozen=True)
class RunJumps:
    """A run of a row: its ``layers.parquet``, and the rates (percent) of the row's seeds, this run's among them."""

    name: str
    seed: int
    table: "LayerTable"
    once: Mapping[int, float]
    late: Mapping[int, float]

    def rate(self, *, late: bool = False) -> "Rate":
        """The row's rate: mean over seeds, with an interval over seeds where there are three or more; else this run's,
        with an interval over the images of its checkpoint.
        """
        values = list((self.late if late else self.once).values())
        over_seeds = bounded_interval(values)
        low, high = over_seeds or checkpoint_interval(self.table, late=late)
        if over_seeds is None:
            values = [(self.late if late else self.once)[self.seed]]
        return Rate(float(np.mean(values)), low, high, len(values))


@dataclass(frozen=True)
class Rate:
    """A share in percent with its 95 % interval, over ``seeds`` seeds or, below three, over one checkpoint's images."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.0f} %"

    @property
    def interval(self) -> str:
        """Such as ``41 … 62 %, 3 seeds`` or ``51 … 55 %, images of this checkpoint``."""
        of = f"{self.seeds} seeds" if self.seeds >= MIN_SEEDS else "images of this checkpoint"
        return f"{self.low:.0f} … {self.high:.0f} %, {of}"


def claim(runs: Sequence[RunJumps]) -> tuple[str, str]:
    """What may be said of two runs' jump rates, and on what ground: (title, the interval that it rests on)."""
    if len(runs) == 1:
        return f"{runs[0].name}: {runs[0].rate()} of the objects’ masks jump on the way", ""
    first, second = runs[0], runs[-1]
    try:
        effect, low, high, ground = _difference(first, second)
    except ValueError as error:
        return f"{first.name} and {second.name}: no comparison", str(error)
    of = "Of these two checkpoints, " if "checkpoints" in ground else ""
    interval = f"95 % interval {_signed(low)} … {_signed(high)}, {ground}"
    points = f"{_signed(effect)} points of objects that jump at least once ({interval})"
    if low <= 0 <= high:
        return f"{first.name} and {second.name}: no difference shown in how many masks jump", points
    word = "fewer" if high < 0 else "more"
    return f"{of}{second.name} has {word} masks that jump than {first.name}", points


def _difference(first: RunJumps, second: RunJumps) -> tuple[float, float, float, str]:
    if len(first.once.keys() & second.once.keys()) >= MIN_SEEDS:
        test = paired_t(first.once, second.once, (-100.0, 100.0))
        assert test.low is not None
        assert test.high is not None
        return test.effect, test.low, test.high, f"{test.n} paired seeds"
    low, high = checkpoint_interval(first.table, second.table)
    effect = second.once[second.seed] - first.once[first.seed]
    return effect, low, high, "bootstrap over images of two checkpoints, not two methods"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


MOST_LINES = 1200
_CALM, _FAINT, _DEEP = (120, 140, 165, 56), (240, 140, 110, 255), (170, 20, 40, 255)


@dataclass(frozen=True)
class Barcode:
    """Every matched object of a run as a line, a column a step between layers.

    ``order`` has the objects' places in :meth:`analysis.layer_table.LayerTable.grid`, those that jump latest first;
    ``pixels`` (lines, L, 4) uint8, RGBA, is what is drawn: ``per_line`` objects a line, their mean colour.
    """

    order: np.ndarray
    pixels: np.ndarray
    per_line: int


def barcode(table: "LayerTable", most: int = MOST_LINES) -> Barcode:
    """The barcode of a run, at most ``most`` lines high; red: jumps, the deeper the less the masks share."""
    steps, ious = jumps(table), np.nan_to_num(table.grid("iou_previous")[1:], nan=1.0)
    order = np.lexsort((*(ious), *(~steps)))  # the last key counts most: whether the last step jumps
    depth = np.clip(1 - ious / THRESHOLD, 0, 1)[..., None]
    red = (1 - depth) * np.array(_FAINT) + depth * np.array(_DEEP)
    colours = np.where(steps[..., None], red, np.array(_CALM, dtype=float))[:, order].transpose(1, 0, 2)
    per_line = max(1, -(-len(order) // most))
    starts = np.arange(0, len(order), per_line)
    sizes = np.diff([*starts, len(order)])
    lines = np.add.reduceat(colours, starts) / sizes[:, None, None] if len(order) else colours
    return Barcode(order, lines.round().astype(np.uint8), per_line)


# ------------------------------------------------------------------ drawing

_WIDTH, _LABEL, _HALF = 9.0, 1.05, 0.45


@in_style
def jump_figure(runs: Sequence[RunJumps], cases: Sequence[Case], note: str = "") -> "Figure":
    """Film strips of the chosen object (left) and of the opposite extreme (right, smaller) over the barcodes of all
    objects. ``note`` is added to the caption. Draws the barcodes alone without a case.
    """
    from matplotlib.figure import Figure

    layers = runs[0].table.layers
    tile = (_WIDTH - _LABEL - 0.35) / (layers * (1 + _HALF))
    strips = (tile + 0.3) * len(runs) + 0.45 if cases else 0.0
    height = 0.75 + strips + 3.3
    figure = Figure(figsize=(_WIDTH, height))
    title, ground = claim(runs)
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=min(14, 14 * 64 / len(title)), weight="bold", va="top")
    figure.text(0.012, 1 - 0.42 / height, ground, fontsize=8.5, color="#555555", va="top")
    for case, left, size in zip(cases, (_LABEL, _LABEL + layers * tile + 0.3), (tile, _HALF * tile), strict=False):
        _strips(figure, case, [run.name for run in runs], left, 1 - 0.75 / height, size, tile)
    _barcodes(figure, runs, (0.75 + strips) / height)
    note = wrapped(note, 6.5, 0.97 * _WIDTH, 4)
    figure.text(0.012, 0.06 / height, note, fontsize=6.5, color="#666666", va="bottom")
    return figure


def _strips(
    figure: "Figure", case: Case, names: Sequence[str], left: float, top: float, size: float, pitch: float
) -> None:
    """One row of pictures a run; left, size and pitch (the height that a row is given) in inches, top a share."""
    width, height = figure.get_size_inches()
    small = size < pitch
    heading = f"{case.class_name}, image {case.image_id}" + (" (the opposite extreme)" if small else "")
    figure.text(left / width, top, heading, fontsize=8, color="#555555", va="top")
    picture = pixels(case.picture)
    for run, (name, track) in enumerate(zip(names, case.tracks, strict=True)):
        bottom = top - (0.4 + pitch + run * (pitch + 0.3)) / height + (pitch - size) / 2 / height
        colour = str(look(run)["color"])
        if not small:
            middle = bottom + size / 2 / height
            called = wrapped(name, BOLD * 8, left - 0.16, 3)
            figure.text(0.012, middle, called, color=colour, weight="bold", fontsize=8, va="bottom")
            figure.text(0.012, middle, f"query {track.query}" if track else "", color="#666666", fontsize=8, va="top")
        for step in track.steps if track else ():
            axis = figure.add_axes(
                ((left + (step.layer + 0.04) * size) / width, bottom, 0.92 * size / width, 0.92 * size / height)
            )
            _tile(axis, case, step, picture, colour, small)
            if run == 0 and not small:
                axis.set_title(layer_name(step.layer), fontsize=8, weight="normal", loc="center", pad=3)


def _tile(axis: "Axes", case: Case, step: Step, picture: Any, colour: str, small: bool) -> None:
    show(axis, case, step.mask, picture, colour, opacity=0.9, line=0.45 if small else 0.9)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(
            visible=True,
            color=JUMP if step.jumps else "#c4cad1",
            linewidth=(1.6 if small else 2.4) if step.jumps else 0.5,
        )
    text = on_target(step) if not small else on_target(step).removeprefix("on target ")
    axis.set_xlabel(text, fontsize=5 if small else 5.4, labelpad=2, color=JUMP if step.jumps else "#333333")


def _barcodes(figure: "Figure", runs: Sequence[RunJumps], above: float) -> None:
    """The barcodes side by side in what is left below; ``above`` is the share of the figure over them."""
    width, height = figure.get_size_inches()
    bottom, top = 0.95 / height, 1 - above - 0.35 / height
    share = 1 / len(runs)
    for number, run in enumerate(runs):
        colour = str(look(number)["color"])
        axis = figure.add_axes((number * share + 0.6 / width, bottom, share - 2.2 / width, top - bottom))
        found = barcode(run.table)
        steps = found.pixels.shape[1]
        axis.imshow(found.pixels, aspect="auto", interpolation="none", extent=(0.5, steps + 0.5, len(found.order), 0))
        axis.set_title(wrapped(run.name, BOLD * 10, width * share - 0.7, 1), color=colour, fontsize=10)
        axis.set_xticks(range(1, steps + 1), [f"{i - 1}→{i}" for i in range(1, steps + 1)])
        axis.set(xlabel="step between layers", ylabel="objects, each run sorted by itself" if number == 0 else "")
        axis.grid(False)
        _numbers(figure, run, colour, (number + 1) * share - 1.5 / width, top)


def _numbers(figure: "Figure", run: RunJumps, colour: str, left: float, top: float) -> None:
    height = figure.get_figheight()
    for line, (rate, words) in enumerate(
        ((run.rate(), "of objects jump\nat least once"), (run.rate(late=True), "after layer 1"))
    ):
        y = top - 1.15 * line / height
        figure.text(left, y, str(rate), color=colour, fontsize=21 - 5 * line, weight="bold", va="top")
        figure.text(
            left,
            y - (0.36 - 0.06 * line) / height,
            f"{words}\n{rate.interval.replace(', ', chr(10))}",
            fontsize=7,
            color="#444444",
            va="top",
        )
