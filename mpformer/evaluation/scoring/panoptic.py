"""Panoptic quality (Kirillov et al., CVPR 2019): panopticapi is recorded; the same works on counted pixels."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpformer.data.coco_layout import id_to_rgb, png
from mpformer.data.validation import GroundTruth

VOID = 0


@dataclass
class Parts:
    """What panoptic quality is made of, for one class."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou: float = 0.0

    def add(self, other: "Parts") -> None:
        self.tp, self.fp, self.fn = self.tp + other.tp, self.fp + other.fp, self.fn + other.fn
        self.iou += other.iou

    @property
    def touched(self) -> bool:
        return self.tp + self.fp + self.fn > 0


ByClass = dict[int, Parts]
Compute = Callable[..., Any]


@dataclass
class PanopticScorer:
    """Adds up per-class parts over images; ``is_thing`` says for each class what it is."""

    is_thing: Sequence[bool]
    compute: Compute | None = None
    """What counts the recorded parts; None: panopticapi's ``pq_compute_single_core``."""
    total: ByClass = field(default_factory=dict)
    images: dict[int, ByClass] = field(default_factory=dict)

    def add(self, panoptic_seg: tuple[Any, Sequence[Mapping[str, Any]]], truth: GroundTruth) -> None:
        """Add one image: detectron2's (segment ids (H, W), segments_info); ids that are not in the info are void."""
        ids, segments = predicted_segments(panoptic_seg)
        parts = compare_by_files(ids, segments, truth, self.compute)
        self._keep(truth.image_id, parts)

    def _keep(self, image_id: int, parts: ByClass) -> None:
        self.images[image_id] = parts
        for category, part in parts.items():
            self.total.setdefault(category, Parts()).add(part)

    def state(self) -> dict[int, Any]:
        """What has been added, as plain data."""
        return {image_id: {c: astuple(part) for c, part in parts.items()} for image_id, parts in self.images.items()}

    def absorb(self, state: Mapping[int, Any]) -> None:
        """Add what another scorer has counted."""
        for image_id, parts in state.items():
            self._keep(image_id, {category: Parts(*part) for category, part in parts.items()})

    def result(self) -> dict[str, float]:
        """PQ, SQ, RQ, PQ_th, PQ_st in percent; an average over no class at all is left out."""
        scores = average(self.total, range(len(self.is_thing)))
        result = {k: scores[k] for k in ("PQ", "SQ", "RQ") if scores}
        for key, wanted in (("PQ_th", True), ("PQ_st", False)):
            part = average(self.total, [c for c, thing in enumerate(self.is_thing) if bool(thing) == wanted])
            if part:
                result[key] = part["PQ"]
        return result

    def per_image(self) -> dict[int, dict[str, Any]]:
        """Columns of per_image.parquet by image id, for the classes that an image touches."""
        return {image_id: columns_of_parts(parts) for image_id, parts in self.images.items()}


def columns_of_parts(parts: ByClass) -> dict[str, Any]:
    """One image's columns of per_image.parquet."""
    listed = sorted((c, p) for c, p in parts.items() if p.touched)
    columns: dict[str, Any] = {"pq_category": [c for c, _ in listed]}
    for key in ("tp", "fp", "fn", "iou"):
        columns[f"pq_{key}"] = [getattr(p, key) for _, p in listed]
    return columns


def average(total: ByClass, categories: Iterable[int]) -> dict[str, float]:
    """PQ, SQ and RQ in percent: the mean over the classes that occur in ground truth or prediction; {} without any."""
    found = [total[c] for c in categories if c in total and total[c].touched]
    if not found:
        return {}
    rates = [(p.iou / p.tp if p.tp else 0.0, p.tp / (p.tp + 0.5 * p.fp + 0.5 * p.fn)) for p in found]
    quality = [p.iou / (p.tp + 0.5 * p.fp + 0.5 * p.fn) for p in found]
    means = (sum(quality), sum(sq for sq, _ in rates), sum(rq for _, rq in rates))
    return {key: 100 * value / len(found) for key, value in zip(("PQ", "SQ", "RQ"), means, strict=True)}


def predicted_segments(
    panoptic_seg: tuple[Any, Sequence[Mapping[str, Any]]],
) -> tuple[NDArray[np.int64], dict[int, int]]:
    """The id map (H, W) with unlisted ids void, and the class of each listed id that has pixels."""
    raw, info = panoptic_seg
    ids = (raw.detach().cpu().numpy() if hasattr(raw, "detach") else np.asarray(raw)).astype(np.int64)
    present = np.unique(ids)
    segments = {int(s["id"]): int(s["category_id"]) for s in info}
    segments = {i: c for i, c in segments.items() if i != VOID and i in present}
    unlisted = [i for i in present if i not in segments]
    return np.where(np.isin(ids, unlisted), VOID, ids), segments


def parts_of(overlap: Mapping[tuple[int, int], int], segments: Mapping[int, int], truth: GroundTruth) -> ByClass:
    """Match one image's segments from the pixels that each pair (true id, predicted id) shares, void included.

    Segments match where their IoU is above one half, without the pixels that are void in the ground truth. A prediction
    that lies by more than half in void or in a crowd of its class is neither right nor wrong.
    """
    area_true, area_predicted = _areas(overlap, 0), _areas(overlap, 1)
    matched: dict[int, tuple[int, float]] = {}
    true = {s.id: s for s in truth.segments}
    for (t, p), shared in overlap.items():
        if t not in true or true[t].crowd or segments.get(p) != true[t].category:
            continue
        iou = shared / (area_true[t] + area_predicted[p] - shared - overlap.get((VOID, p), 0))
        if iou > 0.5:
            matched[p] = (t, iou)
    result: ByClass = {}
    for p, (_, iou) in matched.items():
        result.setdefault(segments[p], Parts()).add(Parts(tp=1, iou=iou))
    _count_misses(result, truth, {t for t, _ in matched.values()})
    _count_false(result, truth, {p: c for p, c in segments.items() if p not in matched}, overlap, area_predicted)
    return result


def _count_misses(result: ByClass, truth: GroundTruth, matched: set[int]) -> None:
    for segment in truth.segments:
        if segment.id not in matched and not segment.crowd:
            result.setdefault(segment.category, Parts()).fn += 1


def _count_false(
    result: ByClass,
    truth: GroundTruth,
    segments: Mapping[int, int],
    overlap: Mapping[tuple[int, int], int],
    areas: Mapping[int, int],
) -> None:
    crowds = {s.category: s.id for s in truth.segments if s.crowd}
    for p, category in segments.items():
        forgiven = overlap.get((VOID, p), 0)
        if category in crowds:
            forgiven += overlap.get((crowds[category], p), 0)
        if forgiven / areas[p] <= 0.5:
            result.setdefault(category, Parts()).fp += 1


def _truth_ids(truth: GroundTruth) -> NDArray[np.int64]:
    assert truth.ids is not None
    return truth.ids.astype(np.int64)


def _areas(overlap: Mapping[tuple[int, int], int], side: int) -> dict[int, int]:
    areas: dict[int, int] = {}
    for pair, count in overlap.items():
        areas[pair[side]] = areas.get(pair[side], 0) + count
    return areas


def compare_by_files(
    ids: NDArray[np.int64], segments: Mapping[int, int], truth: GroundTruth, compute: Compute | None = None
) -> ByClass:
    """The same through panopticapi (or ``compute``), which reads files: one image's, in a temporary directory."""
    if compute is None:
        from panopticapi import evaluation

        compute = evaluation.pq_compute_single_core
    assert compute is not None
    true_ids = _truth_ids(truth)
    areas = dict(zip(*(a.tolist() for a in np.unique(true_ids, return_counts=True)), strict=True))
    true = [
        {"id": s.id, "category_id": s.category, "iscrowd": int(s.crowd), "area": areas.get(s.id, 0)}
        for s in truth.segments
    ]
    found = [{"id": i, "category_id": c} for i, c in segments.items()]
    categories: dict[int, Any] = {c: {} for c in {s.category for s in truth.segments} | set(segments.values())}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, image in (("true.png", true_ids), ("found.png", ids)):
            Path(folder, name).write_bytes(png(id_to_rgb(image.astype(np.int32))))
        pair = (
            {"file_name": "true.png", "image_id": truth.image_id, "segments_info": true},
            {"file_name": "found.png", "image_id": truth.image_id, "segments_info": found},
        )
        stat = compute(0, [pair], folder, folder, categories)
    return {int(c): Parts(int(p.tp), int(p.fp), int(p.fn), float(p.iou)) for c, p in stat.pq_per_cat.items()}
