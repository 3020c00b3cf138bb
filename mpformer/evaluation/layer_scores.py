"""Scores of an image's layers: the last one's predictions for the recorded scorer, and every layer's counts.

Mask2Former's instance rule lists a query once per likely class, so that a hundred detections share a few dozen masks,
each of which is encoded once. The numbers are those of :func:`mpformer.modeling.inference.infer` fed to the
recorded scorer one image at a time (a test holds the two equal).
"""

from typing import Any

import torch
from torch import Tensor

from mpformer.config.schema import Config
from mpformer.evaluation.layer_counts import count_layers
from mpformer.evaluation.layer_pass import ImageOutput
from mpformer.evaluation.scoring.coco import encode_masks
from mpformer.evaluation.scoring.from_counts import CountScorer
from mpformer.evaluation.scoring.scorer import SegmentationScorer
from mpformer.modeling import inference
from mpformer.modeling.inference import InferenceSettings


class LayerScores:
    """AP, PQ and mIoU of some layers, image by image, without a mask being kept."""

    def __init__(self, config: Config, layers: range) -> None:
        self.layers = layers
        self.scorer = CountScorer(config, len(layers))

    def add(self, image: ImageOutput) -> None:
        """Score one image at every layer."""
        maps = self.scorer.maps(image.truth)
        self.scorer.add(image.truth, maps, list(count_layers(image, self.layers, maps)))

    def results(self) -> list[dict[str, float]]:
        """Scores of each layer in percent; what has no ground truth at all is left out."""
        return self.scorer.results()


def record_last(scorer: SegmentationScorer, image: ImageOutput) -> None:
    """Feed the last layer's predictions of an image to the recorded scorer."""
    settings = image.model.inference
    if not (settings.instance or settings.panoptic):  # semantic inference alone resizes in another order
        scorer.add(image.result(), image.truth)
        return
    logits, masks = image.resized(-1)
    probability = masks.sigmoid()
    results: dict[str, Any] = {}
    if settings.instance:
        results["instances"] = _detections(settings, logits, probability, image.image_id)
    if settings.semantic:
        results["sem_seg"] = _class_map(logits, probability)
    if settings.panoptic:
        results["panoptic_seg"] = inference.panoptic(settings, logits, masks)
    scorer.add(results, image.truth)


def _class_map(logits: Tensor, probability: Tensor) -> Tensor:
    """Class (H, W) of the largest sum over queries of class × mask probability; the reduction runs along memory."""
    classes = logits.softmax(-1)[:, :-1]
    scores = probability.flatten(1).T @ classes
    return scores.argmax(1).view(probability.shape[-2:])


def _detections(
    settings: InferenceSettings, logits: Tensor, probability: Tensor, image_id: int
) -> list[dict[str, Any]]:
    """COCO results of one image, by falling score; detections of one query share their encoded mask."""
    scores, queries, classes = inference.best_pairs(settings, logits)
    if settings.panoptic:
        keep = torch.isin(classes, torch.tensor(sorted(settings.things), device=classes.device))
        scores, queries, classes = scores[keep], queries[keep], classes[keep]
    used = queries.unique()
    row = torch.searchsorted(used, queries)
    if len(used) < len(probability):
        probability = probability[used]
    inside = probability > 0.5
    scores = scores * _quality(probability, inside)[row]
    scores, order = scores.sort(descending=True, stable=True)
    codes = encode_masks(inside.cpu().numpy())
    lines = zip(scores.tolist(), row[order].tolist(), classes[order].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category + 1, "score": score, "segmentation": codes[index]}
        for score, index, category in lines
    ]


def _quality(probability: Tensor, inside: Tensor) -> Tensor:
    """Mean probability (N,) inside each mask (N, H, W)."""
    weights = inside.flatten(1).float()
    return torch.linalg.vecdot(probability.flatten(1), weights) / (weights.sum(1) + 1e-6)
