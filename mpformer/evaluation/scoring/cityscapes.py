"""AP, PQ and IoU of Cityscapes by the functions of its own scripts (the package ``cityscapesscripts``).

The recorded scores are of files handed to the scripts' matching, as the benchmark does. Evaluation during training and
the scores of every decoder layer hand counted pixels to the scripts' averages; tests hold the two, and both with the
scripts run on whole directories, to 1e-6.

Cityscapes ignores objects under 100 pixels, takes no limit of detections, and averages over 19 classes whose label ids
are not the model's classes.
"""

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.classes import class_table
from mpformer.data.validation import GroundTruth
from mpformer.evaluation.scoring.semantic import SemanticScorer, class_map
from mpformer.runtime.errors import RunFailure, UserError

Counts = NDArray[np.ulonglong]
_VOID = "void"


def scripts(module: str) -> Any:
    """A module of ``cityscapesscripts``; raises UserError if the package is not installed."""
    try:
        return import_module(f"cityscapesscripts.{module}")
    except ImportError as error:
        raise UserError(f"cityscapes needs its scripts ({error.name}): pip install cityscapesscripts") from None


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """The scripts print, warn about numpy's old names, and end the process where something is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SystemExit, KeyError, OSError) as error:
        why = f"unknown label id {error}" if isinstance(error, KeyError) else str(error)
        last = said.getvalue().strip().splitlines()[-1:] if isinstance(error, SystemExit) else [why]
        message = f"Cityscapes' scripts refuse: {' '.join(last)}; see: mpformer data check cityscapes"
        raise RunFailure("data", message) from None


@cache
def label_ids(task: str) -> tuple[int, ...]:
    """Cityscapes' label id of each class that the model was trained for."""
    names = scripts("helpers.labels").name2label
    return tuple(names[name].id for name in class_table("cityscapes", task).names)


def ground_truth_file(truth: GroundTruth, kind: str) -> Path:
    """The official file beside an image: ``instanceIds`` or ``labelIds``."""
    image = Path(truth.file_name)
    root, split, city = image.parents[3], image.parent.parent.name, image.parent.name
    stem = image.name.removesuffix("_leftImg8bit.png")
    return root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png"


# --- AP ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Annotated:
    """An image's official instances: label name -> the scripts' dicts; ids (H, W) as in the file."""

    instances: dict[str, list[dict[str, Any]]]
    ids: NDArray[Any]


@lru_cache(maxsize=2)
def _annotated(file: Path) -> _Annotated:
    """Read an ``instanceIds`` file; the scorers of all layers ask for the same one in a row."""
    module = scripts("evaluation.evalInstanceLevelSemanticLabeling")
    with _own_process():
        (found,) = scripts("evaluation.instances2dict").instances2dict([str(file)]).values()
        instances = module.filterGtInstances(found, _arguments())
    with Image.open(file) as image:
        return _Annotated(instances, np.array(image))


def region_masks(truth: GroundTruth) -> NDArray[np.bool_]:
    """(n, H, W): each official instance, label by label, and last the pixels that the benchmark ignores."""
    annotated = _annotated(ground_truth_file(truth, "instanceIds"))
    ignored = [label.id for label in scripts("helpers.labels").labels if label.ignoreInEval]
    listed = [instance for instances in annotated.instances.values() for instance in instances]
    return np.stack([*(annotated.ids == i["instID"] for i in listed), np.isin(annotated.ids, ignored)])


@cache
def _arguments() -> Any:
    """The scripts' own parameters of the instance evaluation, quiet and apart from their global object."""
    module = scripts("evaluation.evalInstanceLevelSemanticLabeling")
    chosen = copy(module.args)
    chosen.quiet = True
    module.setInstanceLabels(chosen)
    return chosen


@dataclass
class CityscapesInstances:
    """AP and AP50 of the benchmark, of COCO results or of counted pixels."""

    task: str
    matches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_encoded(self, detections: Sequence[dict[str, Any]], truth: GroundTruth) -> None:
        """Match one image's COCO results, whose ``category_id`` is the model's class + 1.

        Raises RunFailure("data") where the scripts refuse the image's files.
        """
        file = ground_truth_file(truth, "instanceIds")
        self._keep(file, _match_by_scripts(detections, file, label_ids(self.task)))

    def add_counted(self, detections: Iterable["CountedDetection"], truth: GroundTruth) -> None:
        """Match one image's detections, counted against :func:`region_masks`; raises like :meth:`add_encoded`."""
        file = ground_truth_file(truth, "instanceIds")
        self._keep(file, _match_counted(detections, file, label_ids(self.task)))

    def _keep(self, file: Path, matched: "Matched") -> None:
        self.matches[str(file)] = dict(zip(("groundTruth", "prediction"), matched, strict=True))

    def state(self) -> dict[str, Any]:
        """What has been matched, as plain data."""
        return self.matches

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer has matched."""
        self.matches |= state

    def result(self) -> dict[str, float]:
        """In percent; left out if no image has an object that counts."""
        module, arguments = scripts("evaluation.evalInstanceLevelSemanticLabeling"), _arguments()
        with _own_process():
            averages = module.computeAverages(module.evaluateMatches(self.matches, arguments), arguments)
        scores = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        return {key: 100 * float(value) for key, value in scores.items() if np.isfinite(value)}


Matched = tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]


def _match_by_scripts(detections: Sequence[dict[str, Any]], file: Path, ids: Sequence[int]) -> Matched:
    """The scripts' matching, which reads a mask file a detection: those of one image, in a temporary directory."""
    from pycocotools import mask as coco

    module, annotated = scripts("evaluation.evalInstanceLevelSemanticLabeling"), _annotated(file)
    with tempfile.TemporaryDirectory() as folder, _own_process():
        listed = {}
        for number, detection in enumerate(detections):
            path = os.path.join(folder, f"{number}.png")
            Image.fromarray(255 * coco.decode(detection["segmentation"])).save(path, compress_level=1)
            listed[path] = {"labelID": ids[detection["category_id"] - 1], "conf": detection["score"]}
        return module.assignGt2Preds(annotated.instances, annotated.ids, listed, _arguments())


@dataclass(frozen=True)
class CountedDetection:
    """A detection as its pixels: the model's class, the score, its area, and what it shares with each region."""

    category: int
    score: float
    pixels: int
    shared: Sequence[int]


def _match_counted(detections: Iterable[CountedDetection], file: Path, ids: Sequence[int]) -> Matched:
    """The scripts' matching from pixel counts; of the scripts' dicts only what their averages read."""
    objects = deepcopy(_annotated(file).instances)
    for instance in (instance for listed in objects.values() for instance in listed):
        instance["matchedPred"] = []
    ends = np.cumsum([0, *map(len, objects.values())])
    places = {label: slice(a, b) for label, (a, b) in zip(objects, pairwise(ends), strict=True)}
    predictions: dict[str, list[dict[str, Any]]] = {label: [] for label in _arguments().instLabels}
    names = scripts("helpers.labels").id2label
    for detection in detections:
        label = names[ids[detection.category]].name
        if label not in predictions or not detection.pixels:
            continue
        about = {"pixelCount": detection.pixels, "confidence": detection.score}
        paired = _pair(objects[label], about, detection.shared[places[label]])
        predictions[label].append({**about, "voidIntersection": detection.shared[-1], "matchedGt": paired})
    return objects, predictions


def _pair(objects: list[dict[str, Any]], prediction: dict[str, Any], overlaps: Sequence[int]) -> list[dict[str, Any]]:
    """Tell objects and prediction of overlaps that can match, or with objects that are ignored; returns the objects."""
    paired = []
    for instance, count in zip(objects, overlaps, strict=True):
        fits = count > _arguments().overlaps[0] * (instance["pixelCount"] + prediction["pixelCount"] - count)
        if fits:
            instance["matchedPred"].append({**prediction, "intersection": count})
        if fits or (count and _ignored(instance)):
            paired.append({key: instance[key] for key in _READ} | {"intersection": count})
    return paired


#: what the scripts' averages read of an object
_READ = ("instID", "pixelCount", "medDist", "distConf")


def _ignored(instance: dict[str, Any]) -> bool:
    """A group (its id is the label's), or an object under the benchmark's smallest size."""
    return instance["instID"] < 1000 or instance["pixelCount"] < _arguments().minRegionSizes[0]


# --- IoU --------------------------------------------------------------------------------------------------------


@dataclass
class CityscapesSemantic(SemanticScorer):
    """The benchmark's IoU, averaged over its classes; what an image's counts are for a bootstrap stays the same."""

    confusion: Counts | None = None

    def add(self, sem_seg: Any, truth: GroundTruth) -> None:
        """Add one image; raises RunFailure("data") where the scripts refuse the image's files."""
        predicted = class_map(sem_seg)
        super().add(predicted, truth)
        ids = np.array(label_ids("semantic"), dtype=np.uint8)
        _confuse_by_scripts(ids[predicted], ground_truth_file(truth, "labelIds"), self._matrix())

    def add_confusion(self, pixels: NDArray[np.int64]) -> None:
        """Add one image's pixels (C, C) by predicted and true class."""
        ids = label_ids("semantic")
        self._matrix()[np.ix_(ids, ids)] += pixels.T.astype(np.ulonglong)

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data and arrays."""
        return super().state() | {"confusion": self._matrix().astype(np.int64)}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer has counted."""
        super().absorb(state)
        self._matrix()[:] += state["confusion"].astype(np.ulonglong)

    def _matrix(self) -> Counts:
        """Pixels by true and predicted label id."""
        if self.confusion is None:
            self.confusion = _pixel_arguments()[1].copy()
        return self.confusion

    def result(self) -> dict[str, float]:
        """mIoU in percent over the classes that occur in ground truth or prediction."""
        module, (arguments, _) = scripts("evaluation.evalPixelLevelSemanticLabeling"), _pixel_arguments()
        if self.confusion is None:
            return {}
        scores = {i: module.getIouScoreForLabel(i, self.confusion, arguments) for i in arguments.evalLabels}
        average = module.getScoreAverage(scores, arguments)
        return {"mIoU": 100 * float(average)} if np.isfinite(average) else {}


@cache
def _pixel_arguments() -> tuple[Any, Counts]:
    """The scripts' own parameters of the pixel evaluation, without its instance-weighted part, and an empty matrix."""
    module = scripts("evaluation.evalPixelLevelSemanticLabeling")
    chosen = copy(module.args)
    chosen.quiet, chosen.evalInstLevelScore = True, False
    return chosen, module.generateMatrix(chosen)


def _confuse_by_scripts(predicted: NDArray[np.uint8], file: Path, confusion: Counts) -> None:
    module = scripts("evaluation.evalPixelLevelSemanticLabeling")
    with tempfile.TemporaryDirectory() as folder, _own_process():
        path = os.path.join(folder, "predicted.png")
        Image.fromarray(predicted).save(path, compress_level=1)
        module.evaluatePair(path, str(file), confusion, {}, {}, _pixel_arguments()[0])


# --- PQ ---------------------------------------------------------------------------------------------------------


def panoptic_parts() -> Callable[..., Any]:
    """The scripts' ``pq_compute_single_core``, which has panopticapi's signature."""
    return scripts("evaluation.evalPanopticSemanticLabeling").pq_compute_single_core
