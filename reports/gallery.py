"""The paper's Figure 1, by rule: queries whose mask changes most between adjacent decoder layers.

From the ``layer_masks/`` of two runs: among the queries matched at the last layer with a high final score (at least
0.5, or among the highest tenth of a run in which fewer reach that), the largest drop of IoU from one layer to the
next; one case an image, the worst of each run, and in both runs the *same ground-truth object* (never the same query
index). Nothing is chosen by hand.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from analysis.tables import score_floor
from experiments.store import read_json
from reports.rle import Mask, mask_of

if TYPE_CHECKING:
    import analysis.gallery

RULE = (
    "Chosen by rule: among queries matched at the last layer with a high final score (at least 0.5, or the highest "
    "tenth of a run in which fewer reach that), the largest drop of IoU between adjacent layers, one case an image; "
    "the worst of each run, then the same ground-truth object in the other run. "
    "Outline: ground truth; filled: the mask of the query that ends on this object. Below each picture: IoU of "
    "the mask to the layer before and to the ground truth."
)


@dataclass(frozen=True)
class Step:
    """A query at one layer."""

    layer: int
    mask: Mask
    score: float
    class_name: str
    iou_previous: float | None
    iou_gt: float | None


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
    def worst(self) -> Step | None:
        """The step with the smallest IoU to the layer before; None if no such IoU exists."""
        known = [step for step in self.steps if step.iou_previous is not None]
        return min(known, key=lambda step: step.iou_previous or 0.0, default=None)

    @property
    def drop(self) -> float:
        """1 − IoU at the worst step; 0 if there is none."""
        worst = self.worst
        return 0.0 if worst is None or worst.iou_previous is None else 1 - worst.iou_previous


@dataclass(frozen=True)
class Case:
    """One ground-truth object in two runs; ``chosen_by`` names the run whose worst case it is."""

    image_id: int
    object: int
    class_name: str
    truth: Mask
    picture: Path
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
        """The later one of the two layers of that drop."""
        return self.chosen.worst.layer if self.chosen.worst else 0

    @property
    def drop(self) -> float:
        """That drop of IoU."""
        return self.chosen.drop


@dataclass(frozen=True)
class LayerMasks:
    """The ``layer_masks/`` directory of one evaluation."""

    folder: Path

    @property
    def images(self) -> dict[int, str]:
        """Ids of the images that have masks, with the names of their files."""
        index = read_json(self.folder / "index.json")
        listed = index.get("images", []) if isinstance(index, dict) else []
        return {int(entry["image_id"]): str(entry["record"]) for entry in listed}

    def read(self, image_id: int) -> Mapping[str, Any] | None:
        """One image's masks, or None if the file is absent or damaged."""
        content = read_json(self.folder / self.images[image_id])
        return content if isinstance(content, dict) and content.get("layers") else None


def tracks(image: Mapping[str, Any]) -> dict[int, Track]:
    """The final query of each matched object, by object."""
    last = image["layers"][-1]["queries"]
    final = {entry["query"]: int(entry["object"]) for entry in last if entry.get("object", -1) >= 0}
    return {obj: _track(image, query) for query, obj in final.items()}


def _track(image: Mapping[str, Any], query: int) -> Track:
    steps = []
    for layer in image["layers"]:
        entry = next((e for e in layer["queries"] if e["query"] == query), None)
        if entry is not None:
            steps.append(_step(int(layer["layer"]), entry, image))
    return Track(query, tuple(steps))


def _step(layer: int, entry: Mapping[str, Any], image: Mapping[str, Any]) -> Step:
    mask = mask_of(entry["rle"], image["height"], image["width"])
    score, name = float(entry["score"]), str(entry.get("class_name", entry.get("class", "")))
    return Step(layer, mask, score, name, entry.get("iou_previous"), entry.get("iou_gt"))


def cases(runs: Sequence[LayerMasks], each: int = 3) -> list[Case]:
    """The ``each`` worst cases of every run, shown in all of them; images that not all runs have are left out."""
    shared = [i for i in runs[0].images if all(i in run.images for run in runs[1:])] if runs else []
    loaded = {i: [run.read(i) for run in runs] for i in shared}
    whole = {i: [image for image in images if image] for i, images in loaded.items() if all(images)}
    found = {i: [tracks(image) for image in images] for i, images in whole.items()}
    chosen: dict[tuple[int, int], int] = {}
    for which in range(len(runs)):
        for key in _worst(found, which, each, set(chosen)):
            chosen[key] = which
    return [_case(runs, whole[i], found[i], i, obj, which) for (i, obj), which in chosen.items()]


def _worst(
    found: Mapping[int, Sequence[Mapping[int, Track]]], which: int, each: int, taken: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    floor = score_floor([t.final_score for by_run in found.values() for t in by_run[which].values()])
    per_image = []
    for image_id, by_run in found.items():
        confident = [
            (t.drop, -obj)
            for obj, t in by_run[which].items()
            if t.final_score >= floor and (image_id, obj) not in taken
        ]
        if confident:
            drop, negative = max(confident)
            per_image.append((-drop, image_id, -negative))
    return [(image_id, obj) for drop, image_id, obj in sorted(per_image)[:each] if drop < 0]


def _case(
    runs: Sequence[LayerMasks],
    images: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[int, Track]],
    image_id: int,
    obj: int,
    which: int,
) -> Case:
    image = images[which]
    truth = next(o for o in image["objects"] if int(o["object"]) == obj)
    mask = mask_of(truth["rle"], image["height"], image["width"])
    picture = runs[which].folder / str(image.get("image") or "")
    name = str(truth.get("class_name", truth.get("class", "")))
    return Case(image_id, obj, name, mask, picture, tuple(by_object.get(obj) for by_object in found), which)


def picture_uri(path: Path, longest: int = 384) -> str:
    """The image as a data URI, at most ``longest`` pixels a side; a grey pixel if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError):
        rgb = Image.new("RGB", (1, 1), (128, 128, 128))
    small = max(rgb.size) <= 160
    rgb.thumbnail((longest, longest))
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def fill_path(mask: Mask) -> str:
    """SVG path of the mask's cells, one rectangle a horizontal run, in cell units."""
    return "".join(f"M{x} {y}h{n}v1h-{n}z" for y, x, n in _runs(mask))


def _runs(mask: Mask) -> Iterator[tuple[int, int, int]]:
    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    edges = np.diff(padded, axis=1)
    for (y, start), (_, end) in zip(np.argwhere(edges == 1), np.argwhere(edges == -1), strict=True):
        yield int(y), int(start), int(end - start)


def outline_path(mask: Mask) -> str:
    """SVG path of the mask's boundary: the cell edges between inside and outside."""
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # horizontal edges: (y, x) is their left end
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    return "".join(f"M{x} {y}h1" for y, x in across) + "".join(f"M{x} {y}v1" for y, x in down)


def tile(step: Step, truth: Mask, picture: str, which: int) -> Markup:
    """One layer's picture: the image, the query's mask filled, the ground truth outlined. ``picture`` is an SVG id."""
    height, width = truth.shape
    return Markup(
        '<svg class="tile q{which}" viewBox="0 0 {w} {h}" role="img" aria-label="layer {layer}">'
        '<use href="#{picture}"/><path class="mask" d="{mask}"/>'
        '<path class="truth under" d="{truth}"/><path class="truth" d="{truth}"/></svg>'
    ).format(
        which=which,
        w=width,
        h=height,
        layer=step.layer,
        picture=picture,
        mask=fill_path(step.mask),
        truth=outline_path(truth),
    )


def picture_definition(case: Case, identifier: str) -> Markup:
    """The case's image as an SVG definition, embedded once and used by each tile."""
    height, width = case.truth.shape
    return Markup('<image id="{id}" href="{uri}" width="{w}" height="{h}" preserveAspectRatio="none"/>').format(
        id=identifier, uri=picture_uri(case.picture), w=width, h=height
    )


def as_analysis_cases(found: Sequence[Case], names: Sequence[str]) -> "list[analysis.gallery.Case]":
    """The cases for :func:`analysis.figures.failure_gallery`: each run's two adjacent layers and the last one."""
    from analysis.gallery import Case as AnalysisCase

    return [
        AnalysisCase(
            case.image_id,
            case.object,
            case.class_name,
            names[case.chosen_by],
            case.layer,
            case.drop,
            case.truth,
            _pixels(case.picture),
            tuple(_strip(track, name, case.layer) for track, name in zip(case.tracks, names, strict=True)),
        )
        for case in found
    ]


def _strip(track: Track | None, name: str, layer: int) -> "analysis.gallery.Strip | None":
    from analysis.gallery import Frame, Strip

    if track is None:
        return None
    shown = {layer - 1, layer, track.steps[-1].layer}
    frames = [
        Frame(s.layer, s.mask, s.score, s.class_name, s.iou_previous, s.iou_gt) for s in track.steps if s.layer in shown
    ]
    return Strip(name, track.query, tuple(frames))


def _pixels(path: Path) -> "np.ndarray | None":
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError):
        return None
