"""The failure gallery (the paper's Figure 1): one query's masks at adjacent layers, chosen by rule, two runs
aligned by object.

Cases come from :func:`analysis.tables.worst_changes`, the worst of each run, never by hand; the other run shows the
query that it matched to the *same ground-truth object* at its last layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.style import WIDTH, in_style, looks
from analysis.tables import LayerTable, worst_changes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Frame:
    """One query at one layer: mask (h, w) bool; IoUs in [0, 1], None where they do not exist."""

    layer: int
    mask: np.ndarray
    score: float
    class_name: str
    iou_previous: float | None
    iou_gt: float | None


@dataclass(frozen=True)
class Strip:
    """A run's query that ends on the object: its frames at three layers at most, the two adjacent ones among them."""

    label: str
    query: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Case:
    """One line of the gallery. ``strips`` holds one entry per run, None if the run matched no query to the object."""

    image_id: int
    object: int
    class_name: str
    chosen_by: str
    layer: int
    drop: float
    outline: np.ndarray  # (h, w) bool, the ground truth
    image: np.ndarray | None  # (H, W, 3) uint8
    strips: tuple[Strip | None, ...]


@dataclass(frozen=True)
class GalleryRun:
    """What the gallery needs of a run: its layers.parquet and the records of its layer_masks/ by image id."""

    label: str
    table: LayerTable
    records: Mapping[int, Record]


def gallery_cases(
    runs: Sequence[GalleryRun],
    n: int = 3,
    min_score: float | None = None,
    images: Mapping[int, np.ndarray] | None = None,
) -> list[Case]:
    """The ``n`` worst changes of each run, over the images that every run keeps masks of.

    An object that is among the worst of two runs is shown once, for the first. ``images`` maps image ids to pixels.
    """
    shared = set.intersection(*(set(run.records) for run in runs))
    cases: dict[tuple[int, int], Case] = {}
    for run in runs:
        for change in worst_changes(_subset(run.table, shared), n, min_score).itertuples():
            key = (int(change.image_id), int(change.object))
            if key not in cases:
                pixels = None if images is None else images.get(key[0])
                cases[key] = _case(runs, key, run.label, int(change.layer), float(change.drop), pixels)
    return list(cases.values())


def read_run(label: str, evaluation: Path) -> GalleryRun:
    """A run's part of the gallery from its evaluation's directory (layers.parquet and layer_masks/)."""
    import json

    from analysis import tables

    folder = evaluation / "layer_masks"
    index = json.loads((folder / "index.json").read_text())
    records = {entry["image_id"]: json.loads((folder / entry["record"]).read_text()) for entry in index["images"]}
    return GalleryRun(label, tables.read(evaluation / "layers.parquet"), records)


def read_images(evaluation: Path, run: GalleryRun) -> dict[int, np.ndarray]:
    """The pictures beside a run's records: image id → (H, W, 3) uint8."""
    from PIL import Image

    paths = {i: evaluation / "layer_masks" / record["image"] for i, record in run.records.items() if record["image"]}
    return {i: np.asarray(Image.open(path).convert("RGB")) for i, path in paths.items()}


def cases_frame(cases: Sequence[Case]) -> "pd.DataFrame":
    """The gallery's data: one line per case, run and layer shown."""
    import pandas as pd

    rows = [
        {
            "image_id": case.image_id,
            "object": case.object,
            "class": case.class_name,
            "chosen_by": case.chosen_by,
            "drop": case.drop,
            "run": strip.label,
            "query": strip.query,
            "layer": frame.layer,
            "score": frame.score,
            "iou_previous": frame.iou_previous,
            "iou_gt": frame.iou_gt,
        }
        for case in cases
        for strip in case.strips
        if strip is not None
        for frame in strip.frames
    ]
    return pd.DataFrame(rows)


def _subset(table: LayerTable, images: set[int]) -> LayerTable:
    kept = np.isin(table["image_id"], sorted(images))
    return LayerTable({name: column[kept] for name, column in table.columns.items()}, table.layers, table.queries)


def _case(
    runs: Sequence[GalleryRun], key: tuple[int, int], label: str, layer: int, drop: float, pixels: np.ndarray | None
) -> Case:
    image_id, number = key
    record = runs[0].records[image_id]
    entry = next(entry for entry in record["objects"] if entry["object"] == number)
    strips = tuple(_strip(run, key, layer) for run in runs)
    return Case(
        image_id, number, entry["class_name"], label, layer, drop, _decode(record, entry["rle"]), pixels, strips
    )


def _strip(run: GalleryRun, key: tuple[int, int], layer: int) -> Strip | None:
    record = run.records[key[0]]
    last = record["layers"][-1]
    found = [query["query"] for query in last["queries"] if query["object"] == key[1]]
    if not found:
        return None
    return Strip(
        run.label, found[0], tuple(_frame(record, at, found[0]) for at in layers_shown(layer, len(record["layers"])))
    )


def layers_shown(layer: int, layers: int) -> list[int]:
    """The pair of layers and the last one; one layer more before a pair that ends with the last."""
    before = {layer - 2} if layer == layers - 1 and layer >= 2 else set()
    return sorted({layer - 1, layer, layers - 1} | before)


def _frame(record: Record, layer: int, query: int) -> Frame:
    entry = next(entry for entry in record["layers"][layer]["queries"] if entry["query"] == query)
    truth = next((o for o in record["objects"] if o["object"] == _final_object(record, query)), None)
    mask = _decode(record, entry["rle"])
    iou = None if truth is None else _iou(mask, _decode(record, truth["rle"]))
    return Frame(layer, mask, entry["score"], entry["class_name"], entry["iou_previous"], iou)


def _final_object(record: Record, query: int) -> int:
    return next(int(q["object"]) for q in record["layers"][-1]["queries"] if q["query"] == query)


def _iou(first: np.ndarray, second: np.ndarray) -> float | None:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else None


def _decode(record: Record, rle: str) -> np.ndarray:
    from pycocotools import mask as coco_mask

    return coco_mask.decode({"size": [record["height"], record["width"]], "counts": rle}).astype(bool)


# ------------------------------------------------------------------ drawing


@in_style
def failure_gallery(cases: Sequence[Case]) -> "Figure":
    """Figure 1: one line per case; for each run the query's mask at the two adjacent layers and at the last one.

    Filled: the mask; outline: the ground truth; a thick frame marks the run whose drop chose the case. Raises
    ValueError without a case.
    """
    from matplotlib.figure import Figure

    if not cases:
        raise ValueError("no case: no matched query of that score changes its mask in the shared images")
    runs = max(len(case.strips) for case in cases)
    widths = ([1.0] * 3 + [0.12]) * runs
    width = WIDTH if runs > 1 else 0.55 * WIDTH
    size = width / sum(widths[:-1])
    figure = Figure(figsize=(width, (size + 0.36) * len(cases) + 0.3))
    grid = figure.add_gridspec(
        len(cases), len(widths) - 1, width_ratios=widths[:-1], left=0.05, right=0.995, bottom=0.01,
        top=1 - 0.62 / figure.get_figheight(), hspace=0.36 / size, wspace=0.04,
    )  # fmt: skip
    labels = [strip.label for strip in cases[0].strips if strip] or [case.chosen_by for case in cases]
    styles = looks(_run_labels(cases, labels))
    for line, case in enumerate(cases):
        for run, strip in enumerate(case.strips):
            axes = [figure.add_subplot(grid[line, 4 * run + column]) for column in range(3)]
            _draw_strip(axes, case, strip, styles)
            if line == 0 and strip is not None:
                _head(figure, axes, strip.label, str(styles[strip.label]["color"]))
            if run == 0:
                axes[0].set_ylabel(f"{case.class_name}\nimage {case.image_id}", fontsize=7)
    return figure


def _run_labels(cases: Sequence[Case], first: Sequence[str]) -> list[str]:
    """Run labels in the order of the strips, whichever case has them."""
    found = [strip.label for case in cases for strip in case.strips if strip]
    return list(dict.fromkeys([*first, *found]))


def _head(figure: "Figure", axes: Sequence["Axes"], label: str, colour: str) -> None:
    left, right = axes[0].get_position().x0, axes[-1].get_position().x1
    figure.text(
        (left + right) / 2, 1 - 0.06 / figure.get_figheight(), label, color=colour, weight="bold", ha="center", va="top"
    )


def _draw_strip(
    axes: Sequence["Axes"], case: Case, strip: Strip | None, styles: Mapping[str, Mapping[str, Any]]
) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(True)
    if strip is None:
        axes[1].text(0.5, 0.5, "no query matched", ha="center", va="center", fontsize=7, transform=axes[1].transAxes)
        return
    colour = str(styles[strip.label]["color"])
    for axis, frame in zip(axes, strip.frames, strict=False):
        _draw_frame(axis, case, frame, colour)
        if strip.label == case.chosen_by and frame.layer in (case.layer - 1, case.layer):
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=1.8)
    for axis in axes[len(strip.frames) :]:
        axis.set_axis_off()


def _draw_frame(axis: "Axes", case: Case, frame: Frame, colour: str) -> None:
    height, width = case.outline.shape
    axis.imshow(_painted(case, frame.mask, colour), extent=(0, width, height, 0), interpolation="none")
    _outline(axis, case.outline)
    axis.set(xlim=(0, width), ylim=(height, 0))
    change = "" if frame.iou_previous is None else f"IoU to layer {frame.layer - 1}: {frame.iou_previous:.2f}"
    truth = "–" if frame.iou_gt is None else f"{frame.iou_gt:.2f}"
    axis.set_title(
        f"layer {frame.layer}, {frame.class_name} {frame.score:.2f}\n{change or 'first layer'}\nIoU to truth {truth}",
        fontsize=5.6, weight="normal", loc="center", pad=2.5, linespacing=1.15,
    )  # fmt: skip


def _painted(case: Case, mask: np.ndarray, colour: str) -> np.ndarray:
    """The picture in light greys with the mask in colour, (H, W, 3) in [0, 1]; a plain ground without a picture."""
    from matplotlib.colors import to_rgb

    grey = np.full(mask.shape, 0.93) if case.image is None else 0.3 + 0.7 * case.image.mean(2) / 255
    rows = np.arange(grey.shape[0]) * mask.shape[0] // grey.shape[0]
    columns = np.arange(grey.shape[1]) * mask.shape[1] // grey.shape[1]
    inside = 0.62 * mask[rows][:, columns, None]
    return (1 - inside) * grey[..., None] + inside * np.array(to_rgb(colour))


def _outline(axis: "Axes", mask: np.ndarray) -> None:
    """The boundary of a mask along its cells' edges, dark on a light halo."""
    from matplotlib.collections import LineCollection

    segments = boundary(mask)
    for colour, width in (("white", 2.0), ("#111111", 0.9)):
        axis.add_collection(LineCollection(segments, colors=colour, linewidths=width, capstyle="projecting"))


def boundary(mask: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cell edges between a mask (h, w) and what is not it: segments ((x0, y0), (x1, y1))."""
    padded = np.pad(mask.astype(bool), 1)
    horizontal = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    vertical = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    segments = [((int(x), int(y)), (int(x) + 1, int(y))) for y, x in horizontal]
    return segments + [((int(x), int(y)), (int(x), int(y) + 1)) for y, x in vertical]
