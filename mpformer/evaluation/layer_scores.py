"""Scores of an image's layers: the last one's predictions for the recorded scorer, and every layer's counts.

Mask2Former's instance rule lists a query once per likely class, so that a hundred detections share a few dozen masks,
each of which is encoded once. The numbers are those of :func:`mpformer.modeling.inference.infer` fed to the
recorded scorer one image at a time (a test holds the two equal).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.schema import Config
from mpformer.evaluation.layer_counts import count_layers
from mpformer.evaluation.layer_pass import ImageOutput
from mpformer.evaluation.scoring.coco import encode_masks
from mpformer.evaluation.scoring.from_counts import CountScorer
from mpformer.evaluation.scoring.scorer import SegmentationScorer
from mpformer.modeling import inference
from mpformer.modeling.inference import InferenceSettings

#: pixels of masks that are made probabilities at once: what stays in a CPU's cache
_AT_A_TIME = 1 << 20


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
    results: dict[str, Any] = {}
    if settings.instance:
        results["instances"] = _detections(settings, logits, masks, image.image_id)
    if settings.semantic:
        results["sem_seg"] = _class_map(logits, masks.sigmoid())
    if settings.panoptic:
        results["panoptic_seg"] = inference.panoptic(settings, logits, masks)
    scorer.add(results, image.truth)


def _class_map(logits: Tensor, probability: Tensor) -> Tensor:
    """Class (H, W) of the largest sum over queries of class × mask probability; the reduction runs along memory."""
    classes = logits.softmax(-1)[:, :-1]
    scores = probability.flatten(1).T @ classes
    return scores.argmax(1).view(probability.shape[-2:])


def _detections(settings: InferenceSettings, logits: Tensor, masks: Tensor, image_id: int) -> list[dict[str, Any]]:
    """COCO results of one image, by falling score; detections of one query share their encoded mask."""
    scores, queries, classes = inference.best_pairs(settings, logits)
    if settings.panoptic:
        keep = torch.isin(classes, torch.tensor(sorted(settings.things), device=classes.device))
        scores, queries, classes = scores[keep], queries[keep], classes[keep]
    used = queries.unique()
    row = torch.searchsorted(used, queries)
    inside, quality = _binarised(masks, used)
    scores, order = (scores * quality[row]).sort(descending=True, stable=True)
    codes = encode_masks(inside.cpu().numpy())
    lines = zip(scores.tolist(), row[order].tolist(), classes[order].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category + 1, "score": score, "segmentation": codes[index]}
        for score, index, category in lines
    ]


def _binarised(masks: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels the used masks (k,) of (Q, H, W) logits hold, and their mean probability there (k,)."""
    inside = torch.empty(len(used), *masks.shape[-2:], dtype=torch.bool, device=masks.device)
    quality = torch.empty(len(used), device=masks.device)
    step = max(1, _AT_A_TIME // masks[0].numel())
    for part in torch.arange(len(used), device=masks.device).split(step):
        probability = masks.index_select(0, used[part]).sigmoid_()
        torch.gt(probability, 0.5, out=inside[part[0] : part[-1] + 1])
        kept = F.threshold(probability, 0.5, 0.0).flatten(1)
        quality[part] = kept.sum(1) / (kept.ceil().sum(1) + 1e-6)
    return inside, quality
