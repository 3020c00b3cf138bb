"""The failure gallery (the paper's Figure 1), by rule: queries whose mask changes most between adjacent decoder
layers, two runs aligned by ground-truth object.

From the records of ``layer_masks/``: among the queries matched at the last layer with a high final score
(:func:`analysis.layer_table.score_floor`), the largest drop of IoU from one *decoder* layer to the next (from layer 1
on: layer 0 is the bare queries); one case an image, the worst of each run, and in every run the query that it matched
to the *same ground-truth object*, never the same query index. Nothing is chosen by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.jumps import THRESHOLD
from analysis.layer_table import score_floor
from analysis.style import BOLD, JUMP, WIDTH, in_style, look, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Mask = NDArray[np.bool_]
DECODER_STEPS = 2
"""The first layer whose step from the layer before lies between two decoder layers."""


@dataclass(frozen=True)
class Step:
    """A query at one layer: mask (h, w) bool; IoUs in [0, 1], None where they do not exist.

    ``iou_gt`` is the IoU with the object that the query ends on, whatever it is matched to at this layer.
    """

    layer: int
    mask: Mask
    score: float
    class_name: str
    iou_previous: float | None
    iou_gt: float | None

    @property
    def jumps(self) -> bool:
        """Whether the mask shares less than half with the one before (:mod:`analysis.jumps`)."""
        return self.iou_previous is not None and self.iou_previous < THRESHOLD


@dataclass(frozen=True)
class Track:
    """The query matched to an object at the last layer, through all layers."""

    query: int
    steps: tuple[Step, ...]

    @property
    def final_score(self) -> float:
        """Score at the last layer."""
        return self.steps[-1].score

    @property
    def jumps(self) -> int:
        """How many of the steps are jumps."""
        return sum(step.jumps for step in self.steps)

    def worst(self, since: int = 1) -> Step | None:
        """The first of the steps to layer ``since`` or later with the smallest IoU to the layer before; None if no such
        IoU exists.
        """
        known = [step for step in self.steps if step.layer >= since and step.iou_previous is not None]
        return min(known, key=lambda step: step.iou_previous or 0.0, default=None)

    def drop(self, since: int = 1) -> float:
        """1 − IoU at the worst step; 0 if there is none."""
        worst = self.worst(since)
        return 0.0 if worst is None or worst.iou_previous is None else 1 - worst.iou_previous


@dataclass(frozen=True)
class Case:
    """One ground-truth object in the runs: ``tracks`` has one entry a run, None where no query is matched to it.

    ``chosen_by`` is the index of the run whose worst case it is; ``picture`` the image's file, if there is one.
    """

    image_id: int
    object: int
    class_name: str
    truth: Mask
    picture: Path | None
    tracks: tuple[Track | None, ...]
    chosen_by: int

    @property
    def chosen(self) -> Track:
        """The track whose drop chose the case."""
        track = self.tracks[self.chosen_by]
        assert track is not None
        return track

    @property
    def layer(self) -> int:
        """The later one of the two decoder layers of that drop."""
        worst = self.chosen.worst(DECODER_STEPS)
        return worst.layer if worst else 0

    @property
    def drop(self) -> float:
        """That drop of IoU."""
        return self.chosen.drop(DECODER_STEPS)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """What is shown of the image: (left, top, right, bottom) in cells, the object with half its longer side round
        it, square where the image allows it.
        """
        rows, columns = (np.flatnonzero(self.truth.any(axis)) for axis in (1, 0))
        if not len(rows):
            return 0, 0, self.truth.shape[1], self.truth.shape[0]
        side = 2 * max(np.ptp(rows) + 1, np.ptp(columns) + 1)
        top, bottom = _window(int(rows[0]), int(rows[-1]) + 1, int(side), self.truth.shape[0])
        left, right = _window(int(columns[0]), int(columns[-1]) + 1, int(side), self.truth.shape[1])
        return left, top, right, bottom


def _window(start: int, stop: int, side: int, whole: int) -> tuple[int, int]:
    """``side`` cells round start … stop, moved inside 0 … whole, or all of it."""
    low = min(max(0, (start + stop - side) // 2), max(0, whole - side))
    return low, min(whole, low + side)


@dataclass(frozen=True)
class Aligned:
    """Layer masks of runs, aligned by ground-truth object: of the images that all runs have.

    ``tracks`` has, by image, one mapping from object to final query's track a run; ``pictures`` the images' files.
    """

    records: Sequence[Mapping[int, Record]]
    tracks: Mapping[int, Sequence[Mapping[int, Track]]]
    pictures: Mapping[int, Path]

    def case(self, image: int, obj: int, chosen_by: int = 0) -> Case:
        """An object in all runs."""
        record = self.records[chosen_by][image]
        found = next(o for o in record["objects"] if int(o["object"]) == obj)
        name = str(found.get("class_name", found.get("class", "")))
        shown = tuple(by_object.get(obj) for by_object in self.tracks[image])
        return Case(image, obj, name, mask_of(record, found["rle"]), self.pictures.get(image), shown, chosen_by)


def aligned(runs: Sequence[Mapping[int, Record]], pictures: Mapping[int, Path] | None = None) -> Aligned:
    """The records of ``layer_masks/`` of runs, each by image id; images that not all runs have are left out."""
    shared = [i for i in runs[0] if all(i in run for run in runs[1:])] if runs else []
    return Aligned(runs, {i: [tracks(run[i]) for run in runs] for i in shared}, pictures or {})


def gallery_cases(found: Aligned, each: int = 3) -> list[Case]:
    """The ``each`` worst cases of every run, shown in all of them.

    An object that is among the worst of two runs is a case of the first.
    """
    chosen: dict[tuple[int, int], int] = {}
    for which in range(len(found.records)):
        for key in _worst(found.tracks, which, each, set(chosen)):
            chosen[key] = which
    return [found.case(image, obj, which) for (image, obj), which in chosen.items()]


def tracks(record: Record) -> dict[int, Track]:
    """The final query of each matched object, by object."""
    truths = {int(o["object"]): mask_of(record, o["rle"]) for o in record["objects"]}
    last = record["layers"][-1]["queries"]
    final = {int(entry["object"]): int(entry["query"]) for entry in last if entry["object"] >= 0}
    return {obj: Track(query, tuple(_steps(record, query, truths[obj]))) for obj, query in final.items()}


def mask_of(record: Record, rle: Any) -> Mask:
    """The mask (h, w) of a run-length string of a record, or of COCO's ``{"counts", "size"}``."""
    from pycocotools import mask as coco_mask

    code = rle if isinstance(rle, dict) else {"size": [record["height"], record["width"]], "counts": rle}
    mask: Mask = coco_mask.decode(code).astype(bool)
    return mask


def _steps(record: Record, query: int, truth: Mask) -> "list[Step]":
    steps = []
    for layer in record["layers"]:
        entry = next((e for e in layer["queries"] if e["query"] == query), None)
        if entry is not None:
            mask = mask_of(record, entry["rle"])
            name = str(entry.get("class_name", entry.get("class", "")))
            score, previous = float(entry["score"]), entry.get("iou_previous")
            steps.append(Step(int(layer["layer"]), mask, score, name, previous, _iou(mask, truth)))
    return steps


def _iou(first: Mask, second: Mask) -> float | None:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else None


def _worst(
    found: Mapping[int, Sequence[Mapping[int, Track]]], which: int, each: int, taken: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(image, object) of a run's largest drops, one an image; ties by image, then object."""
    floor = score_floor([t.final_score for by_run in found.values() for t in by_run[which].values()])
    per_image = []
    for image_id, by_run in found.items():
        confident = [
            (t.drop(DECODER_STEPS), -obj)
            for obj, t in by_run[which].items()
            if t.final_score >= floor and (image_id, obj) not in taken
        ]
        if confident:
            drop, negative = max(confident)
            per_image.append((-drop, image_id, -negative))
    return [(image_id, obj) for drop, image_id, obj in sorted(per_image)[:each] if drop < 0]


def layers_shown(layer: int, layers: int) -> list[int]:
    """The pair of layers and the last one; one decoder layer more before a pair that ends with the last."""
    before = {layer - 2} if layer == layers - 1 and layer > DECODER_STEPS else set()
    return sorted({layer - 1, layer, layers - 1} | before)


def shown(case: Case, track: Track) -> list[Step]:
    """The steps of a run that the gallery shows."""
    wanted = layers_shown(case.layer, track.steps[-1].layer + 1)
    return [step for step in track.steps if step.layer in wanted]


def cases_frame(cases: Sequence[Case], names: Sequence[str]) -> "pd.DataFrame":
    """The gallery's data: one line per case, run and layer shown; ``names`` are the runs'."""
    import pandas as pd

    rows = [
        {
            "image_id": case.image_id,
            "object": case.object,
            "class": case.class_name,
            "chosen_by": names[case.chosen_by],
            "drop": case.drop,
            "run": name,
            "query": track.query,
            "layer": step.layer,
            "score": step.score,
            "iou_previous": step.iou_previous,
            "iou_gt": step.iou_gt,
        }
        for case in cases
        for name, track in zip(names, case.tracks, strict=True)
        if track is not None
        for step in shown(case, track)
    ]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------ drawing


@in_style
def failure_gallery(cases: Sequence[Case], names: Sequence[str]) -> "Figure":
    """Figure 1: one line per case; for each run the query's mask at the two adjacent layers and, right, at the last.

    Filled: the mask; outline: the ground truth, to which the image is cropped; a red frame marks a mask that shares
    less than half with the one before. Raises ValueError without a case.
    """
    from matplotlib.figure import Figure

    if not cases:
        raise ValueError("no case: no matched query of that score changes its mask in the shared images")
    widths = ([1.0] * 3 + [0.12]) * len(names)
    width = WIDTH if len(names) > 1 else 0.55 * WIDTH
    size = width / sum(widths[:-1])
    figure = Figure(figsize=(width, (size + 0.36) * len(cases) + 0.3))
    grid = figure.add_gridspec(
        len(cases), len(widths) - 1, width_ratios=widths[:-1], left=0.05, right=0.995, bottom=0.01,
        top=1 - 0.62 / figure.get_figheight(), hspace=0.36 / size, wspace=0.04,
    )  # fmt: skip
    for line, case in enumerate(cases):
        for run, name in enumerate(names):
            axes = [figure.add_subplot(grid[line, 4 * run + column]) for column in range(3)]
            _draw_track(axes, case, run)
            if line == 0:
                _head(figure, axes, name, _colour(run))
            if run == 0:
                of = wrapped(f"worst of {names[case.chosen_by]}", 6, size + 0.3, 1)
                axes[0].set_ylabel(f"{case.class_name}, image {case.image_id}\n{of}", fontsize=6)
    return figure


def _colour(run: int) -> str:
    return str(look(run)["color"])


def _head(figure: "Figure", axes: Sequence["Axes"], label: str, colour: str) -> None:
    left, right = axes[0].get_position().x0, axes[-1].get_position().x1
    text = wrapped(label, BOLD * 10, (right - left) * figure.get_figwidth(), 1)
    figure.text(
        (left + right) / 2, 1 - 0.06 / figure.get_figheight(), text, color=colour, weight="bold", ha="center", va="top"
    )


def _draw_track(axes: Sequence["Axes"], case: Case, run: int) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(True)
    track = case.tracks[run]
    if track is None:
        axes[1].text(0.5, 0.5, "no query matched", ha="center", va="center", fontsize=7, transform=axes[1].transAxes)
        return
    picture, steps = pixels(case.picture), shown(case, track)
    for axis, step in zip(axes, steps, strict=False):
        _draw_step(axis, case, step, picture, _colour(run))
        if step.jumps:
            for spine in axis.spines.values():
                spine.set(color=JUMP, linewidth=1.8)
    for axis in axes[len(steps) :]:
        axis.set_axis_off()


def pixels(path: Path | None) -> "NDArray[Any] | None":
    """(H, W, 3) uint8; None without a picture that can be read."""
    from PIL import Image

    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError):
        return None


def _draw_step(axis: "Axes", case: Case, step: Step, picture: "NDArray[Any] | None", colour: str) -> None:
    show(axis, case, step.mask, picture, colour)
    change = "" if step.iou_previous is None else f"IoU to layer {step.layer - 1}: {step.iou_previous:.2f}"
    truth = "–" if step.iou_gt is None else f"{step.iou_gt:.2f}"
    axis.set_title(
        f"layer {step.layer}, {step.class_name} {step.score:.2f}\n{change or 'first layer'}\nIoU to truth {truth}",
        fontsize=5.6, weight="normal", loc="center", pad=2.5, linespacing=1.15,
    )  # fmt: skip


def show(
    axis: "Axes",
    case: Case,
    mask: Mask,
    picture: "NDArray[Any] | None",
    colour: str,
    opacity: float = 0.62,
    line: float = 1.0,
) -> None:
    """Draw what the case shows of its image, a mask in colour on it, and the object's outline ``line`` wide; axes in
    cells of the mask. Nothing else of the image is in the file.
    """
    (height, width), (left, top, right, bottom) = mask.shape, case.box
    tall, wide = mask.shape if picture is None else picture.shape[:2]
    x, y = (left * wide // width, -(-right * wide // width)), (top * tall // height, -(-bottom * tall // height))
    inside = mask[np.arange(*y) * height // tall][:, np.arange(*x) * width // wide]
    part = None if picture is None else picture[slice(*y), slice(*x)]
    extent = (x[0] * width / wide, x[1] * width / wide, y[1] * height / tall, y[0] * height / tall)
    axis.imshow(painted(inside, part, colour, opacity), extent=extent, interpolation="none")
    outline(axis, case.truth, line)
    axis.set(xlim=(left, right), ylim=(bottom, top))


def painted(mask: Mask, picture: "NDArray[Any] | None", colour: str, opacity: float) -> "NDArray[np.float64]":
    """A picture (H, W, 3) in light greys with the mask (H, W) in colour: (H, W, 3) in [0, 1]; a plain ground without a
    picture.
    """
    from matplotlib.colors import to_rgb

    grey = np.full(mask.shape, 0.93) if picture is None else 0.45 + 0.55 * picture.mean(2) / 255
    inside = opacity * mask[..., None]
    painted: NDArray[np.float64] = (1 - inside) * grey[..., None] + inside * np.array(to_rgb(colour))
    return painted


def outline(axis: "Axes", mask: Mask, scale: float = 1.0) -> None:
    """The boundary of a mask along its cells' edges, dark on a light halo."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Drawn

    segments = np.array(boundary(mask), dtype=float).reshape(-1, 2)
    if not len(segments):
        return
    path = Drawn(segments, np.tile([Drawn.MOVETO, Drawn.LINETO], len(segments) // 2))  # one path: files stay small
    for colour, width in (("white", 2.0), ("#111111", 0.9)):
        axis.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=scale * width, capstyle="projecting"))


def boundary(mask: Mask) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cell edges between a mask (h, w) and what is not it: segments ((x0, y0), (x1, y1))."""
    padded = np.pad(mask.astype(bool), 1)
    horizontal = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    vertical = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    segments = [((int(x), int(y)), (int(x) + 1, int(y))) for y, x in horizontal]
    return segments + [((int(x), int(y)), (int(x), int(y) + 1)) for y, x in vertical]
