"""COCO's average precision of instance masks, by pycocotools, and its matching where pixels were counted already."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.data.targets import to_rle
from mpformer.data.validation import GroundTruth

#: COCO's limits between small, medium and large, in pixels
COCO_AREAS = (32**2, 96**2)
#: detections of one image and class that COCO looks at
MAX_DETECTIONS = 100
#: IoU thresholds as pycocotools compares with them
THRESHOLDS = np.minimum(np.linspace(0.5, 0.95, 10), 1 - 1e-10)
_SIZES = ("all", "small", "medium", "large")
_KEYS = {"AP": (None, 0), "AP50": (0, 0), "AP75": (5, 0), "APs": (None, 1), "APm": (None, 2), "APl": (None, 3)}


def area_ranges(size_areas: tuple[int, int] | None) -> list[list[float]]:
    """COCO's area ranges (all, small, medium, large) for the given limits in pixels; None: COCO's own."""
    small, medium = size_areas or COCO_AREAS
    return [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]


@dataclass
class InstanceScorer:
    """Takes detections and ground truth image by image; ``categories`` are the thing classes (model's class indices).

    ``images``, ``annotations`` and ``detections`` are what is matched at the end.
    """

    categories: Sequence[int]
    size_areas: tuple[int, int] | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    _seen: list[int] = field(default_factory=list)
    _annotated: int = 0
    _evaluation: "InstanceEvaluation | None" = None

    def add(self, instances: Any, truth: GroundTruth) -> None:
        """Add one image: detectron2 Instances with pred_masks (n, H, W), scores (n,), pred_classes (n,)."""
        self.add_encoded(coco_results(instances, truth.image_id), truth)

    def add_encoded(self, detections: list[dict[str, Any]], truth: GroundTruth) -> None:
        """Add one image whose detections are COCO results already; ``category_id`` is the class index + 1."""
        self._seen.append(truth.image_id)
        self.images.append({"id": truth.image_id, "height": truth.height, "width": truth.width})
        self.annotations += [self._annotation(a, truth) for a in truth.annotations or ()]
        self.detections += detections

    def _annotation(self, annotation: Mapping[str, Any], truth: GroundTruth) -> dict[str, Any]:
        from pycocotools import mask as coco

        rle = to_rle(annotation["segmentation"], truth.height, truth.width)
        self._annotated += 1
        return {
            "id": self._annotated,
            "image_id": truth.image_id,
            "category_id": annotation["category_id"] + 1,
            "iscrowd": int(annotation.get("iscrowd", 0)),
            "area": float(annotation.get("area", coco.area(rle))),
            "bbox": [float(v) for v in coco.toBbox(rle)],
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"]},
        }

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data."""
        return {"images": self.images, "annotations": self.annotations, "detections": self.detections}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer was fed with."""
        first = self._annotated
        self._annotated += len(state["annotations"])
        self._seen += [image["id"] for image in state["images"]]
        self.images += state["images"]
        self.annotations += [{**a, "id": first + n} for n, a in enumerate(state["annotations"], start=1)]
        self.detections += state["detections"]

    def evaluate(self) -> "InstanceEvaluation":
        """Match detections and ground truth; nothing can be added afterwards."""
        if self._evaluation is None:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluator = self._pycocotools()
                evaluator.accumulate()
            self._evaluation = InstanceEvaluation(evaluator, tuple(self._seen), len(self.categories))
        return self._evaluation

    def _categories(self) -> list[dict[str, Any]]:
        return [{"id": c + 1, "name": str(c)} for c in self.categories]

    def _pycocotools(self) -> Any:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        images = {"images": self.images, "categories": self._categories(), "info": {}}
        truth.dataset = {**images, "annotations": self.annotations}
        truth.createIndex()
        if self.detections:
            found = truth.loadRes(self.detections)
        else:  # loadRes([]) raises IndexError
            found = COCO()
            found.dataset = {**images, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "segm")
        _configured(evaluator.params, self.size_areas)
        evaluator.evaluate()
        return evaluator


def _configured(params: Any, size_areas: tuple[int, int] | None) -> Any:
    """Set the area ranges and limits in either package's parameters."""
    params.areaRng = area_ranges(size_areas)
    params.areaRngLbl = list(_SIZES)
    params.maxDets = [1, 10, MAX_DETECTIONS]
    return params


@dataclass(frozen=True)
class InstanceEvaluation:
    """A finished evaluation; ``evaluator`` is a COCOeval of either package."""

    evaluator: Any
    image_ids: Sequence[int]
    categories: int

    def result(self) -> dict[str, float]:
        """AP, AP50, AP75 and AP by size, in percent; one without any ground truth is left out."""
        # (thresholds, recalls, classes, areas, limits); -1 where a class has no ground truth
        precision = np.asarray(self.evaluator.eval["precision"])[..., -1]
        scores = {}
        for key, (threshold, area) in _KEYS.items():
            chosen = precision[..., area] if threshold is None else precision[threshold, ..., area]
            chosen = chosen[chosen > -1]
            if chosen.size:
                scores[key] = 100 * float(chosen.mean())
        return scores

    def per_image(self) -> dict[int, dict[str, Any]]:
        """Columns of per_image.parquet by image id: matches and ignore flags (T x n row-major) over all classes.

        Needs a pycocotools evaluation.
        """
        found: dict[int, list[Any]] = {i: [] for i in self.image_ids}
        areas, images = len(self.evaluator.params.areaRng), len(self.image_ids)
        for k in range(self.categories):
            start = k * areas * images
            for cell in self.evaluator.evalImgs[start : start + images]:
                if cell is not None:
                    found[cell["image_id"]].append(cell)
        return {image_id: _columns(cells) for image_id, cells in found.items()}


def _columns(cells: list[Any]) -> dict[str, Any]:
    matches = np.concatenate([c["dtMatches"] for c in cells] or [np.zeros((10, 0))], axis=1) > 0
    ignored = np.concatenate([c["dtIgnore"] for c in cells] or [np.zeros((10, 0))], axis=1).astype(bool)
    return {
        "det_category": [c["category_id"] - 1 for c in cells for _ in c["dtScores"]],
        "det_score": [float(s) for c in cells for s in c["dtScores"]],
        "det_match": matches.ravel().tolist(),
        "det_ignore": ignored.ravel().tolist(),
        "gt_category": [c["category_id"] - 1 for c in cells for _ in c["gtIgnore"]],
        "gt_ignore": [bool(i) for c in cells for i in c["gtIgnore"]],
    }


def match_by_counts(
    ious: NDArray[np.float64], group: NDArray[np.int64], layer: NDArray[np.int64], ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """COCO's greedy matching (pycocotools' ``evaluateImg``) of D detections of one image in several layers at once.

    ious (D, n), 0 to objects of another class and the share of the detection's own area for crowds; group (D,) numbers
    layer and class, ascending, each group's detections by falling score; layer (D,) from 0; ignored (n,) objects: the
    crowds, which any number of detections may take. Returns which detections are matched at each threshold, and which
    of them to an ignored object: (10, D) both.

    Few detections reach an IoU of one half with any object; the n-th of each group are matched in one step.
    """
    matched = np.zeros((len(THRESHOLDS), len(ious)), dtype=bool)
    skipped = matched.copy()
    candidates = np.flatnonzero((ious >= THRESHOLDS[0]).any(1)) if ious.shape[1] else np.zeros(0, dtype=np.int64)
    if not len(candidates):
        return matched, skipped
    groups = group[candidates]
    turn = np.arange(len(candidates)) - np.searchsorted(groups, groups)
    free = np.ones((int(layer.max()) + 1, len(THRESHOLDS), ious.shape[1]), dtype=bool)
    for step in range(int(turn.max()) + 1):
        at = candidates[turn == step]
        for passed in (False, True):
            if passed and not ignored.any():
                break
            offered = np.where(free[layer[at]] & (ignored == passed), ious[at][:, None], 0.0)
            best = offered.shape[2] - 1 - offered[..., ::-1].argmax(-1)  # of equal ones the last
            reached = np.take_along_axis(offered, best[..., None], -1)[..., 0] >= THRESHOLDS
            reached &= ~matched[:, at].T
            row, threshold = np.nonzero(reached)
            matched[threshold, at[row]] = True
            skipped[threshold, at[row]] = passed
            if not passed:
                free[layer[at[row]], threshold, best[row, threshold]] = False
    return matched, skipped


def coco_results(instances: Any, image_id: int) -> list[dict[str, Any]]:
    """detectron2 Instances with pred_masks (n, H, W), scores (n,), pred_classes (n,) as COCO results, class + 1."""
    classes, scores = (_numpy(getattr(instances, k)).tolist() for k in ("pred_classes", "scores"))
    return [
        {"image_id": image_id, "category_id": category + 1, "score": score, "segmentation": rle}
        for category, score, rle in zip(classes, scores, encode_masks(_numpy(instances.pred_masks)), strict=True)
    ]


def encode_masks(masks: NDArray[Any]) -> list[dict[str, Any]]:
    """(n, H, W) masks (bool, or probabilities cut at one half) as compressed RLE."""
    from pycocotools import mask as coco

    if not len(masks):
        return []
    binary = masks if masks.dtype == bool else masks > 0.5
    return coco.encode(np.asfortranarray(binary.transpose(1, 2, 0)).view(np.uint8))


def _numpy(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
