"""All scores of one set of predictions: AP, PQ and mIoU, as far as the configuration asks for them.

The recorded scorer uses pycocotools and panopticapi (on Cityscapes its own scripts) and keeps what per_image.parquet
needs. Evaluation during training and the scores of every decoder layer come from counted pixels
(:mod:`mpformer.evaluation.scoring.from_counts`); tests hold the two together to 1e-6.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mpformer.config.classes import class_table
from mpformer.config.datasets import dataset
from mpformer.config.schema import Config
from mpformer.data.validation import GroundTruth
from mpformer.evaluation.scoring.cityscapes import CityscapesInstances, CityscapesSemantic, panoptic_parts
from mpformer.evaluation.scoring.coco import InstanceScorer, coco_results
from mpformer.evaluation.scoring.panoptic import PanopticScorer
from mpformer.evaluation.scoring.semantic import SemanticScorer

_PACKAGES = {
    "pycocotools": "pycocotools",
    "panopticapi": "panopticapi-lite",
    "cityscapesscripts": "cityscapesscripts",
}


class SegmentationScorer:
    """Fed image by image with predictions in detectron2's format; ``result()`` gives percentages by name."""

    def __init__(self, config: Config) -> None:
        table = class_table(config.dataset.name, config.dataset.task)
        wanted = config.evaluation
        self.instance = InstanceScorer(table.thing_indices, wanted.size_areas) if wanted.instance else None
        self.panoptic = PanopticScorer(table.is_thing) if wanted.panoptic else None
        self.semantic = SemanticScorer(len(table)) if wanted.semantic else None
        self.cityscapes: CityscapesInstances | None = None
        if dataset(config.dataset.name).evaluator == "cityscapes":
            self._use_cityscapes(config)
        self._image_ids: list[int] = []
        self._per_image: dict[int, dict[str, Any]] = {}

    def _use_cityscapes(self, config: Config) -> None:
        """Cityscapes is scored by its own scripts; COCO's matching stays for per_image.parquet."""
        task = config.dataset.task
        if self.instance:
            self.cityscapes = CityscapesInstances(task)
        if self.panoptic:
            self.panoptic.compute = panoptic_parts()
        if self.semantic:
            self.semantic = CityscapesSemantic(self.semantic.classes)

    def add(self, prediction: Mapping[str, Any], truth: GroundTruth) -> None:
        """Add one image: "instances", "panoptic_seg" and "sem_seg", as far as they are scored, at original size.

        "instances" may be a list of COCO results too (see
        :meth:`mpformer.evaluation.scoring.coco.InstanceScorer.add_encoded`).
        """
        self._image_ids.append(truth.image_id)
        if self.instance or self.cityscapes:
            given = prediction["instances"]
            found = given if isinstance(given, list) else coco_results(given, truth.image_id)
            for scorer in (self.instance, self.cityscapes):
                if scorer:
                    scorer.add_encoded(found, truth)
        if self.panoptic:
            self.panoptic.add(prediction["panoptic_seg"], truth)
        if self.semantic:
            self.semantic.add(prediction["sem_seg"], truth)

    def state(self) -> dict[str, Any]:
        """What has been added, as plain data and arrays."""
        return {"image_ids": self._image_ids} | {name: part.state() for name, part in self._parts().items()}

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Add what another scorer was fed with."""
        self._image_ids += state["image_ids"]
        for name, part in self._parts().items():
            part.absorb(state[name])

    def _parts(self) -> dict[str, Any]:
        names = ("instance", "cityscapes", "panoptic", "semantic")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def result(self) -> dict[str, float]:
        """AP ..., PQ ..., mIoU in percent; what has no ground truth at all is left out.

        On Cityscapes these are its own benchmark's; COCO's, recorded beside them, are called ``COCO AP`` ...
        """
        scores: dict[str, float] = {}
        if self.instance:
            evaluation = self.instance.evaluate()
            scores |= evaluation.result()
            self._per_image = evaluation.per_image()
        if self.cityscapes:
            scores = {**_of_coco(scores), **self.cityscapes.result()}
        if self.panoptic:
            scores |= self.panoptic.result()
        if self.semantic:
            scores |= self.semantic.result()
        return scores

    def per_image(self) -> list[dict[str, Any]]:
        """Rows for ``per_image.parquet``, after ``result()``."""
        parts = [self._per_image] + [s.per_image() for s in (self.panoptic, self.semantic) if s]
        return [
            {"image_id": image_id} | {key: value for part in parts for key, value in part.get(image_id, {}).items()}
            for image_id in self._image_ids
        ]


def _of_coco(scores: Mapping[str, float]) -> dict[str, float]:
    return {f"COCO {name}": value for name, value in scores.items()}


def scorer_versions() -> dict[str, str]:
    """Versions of the scoring packages that are installed, for result.json."""
    found = {}
    for name, package in _PACKAGES.items():
        for candidate in (package, name):
            try:
                found[name] = version(candidate)
                break
            except PackageNotFoundError:
                continue
    return found
