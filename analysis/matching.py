"""Deterministic Hungarian matching of every decoder layer's predictions to an image's ground truth.

Unlike the matching of training it draws no random points: the costs are taken on all cells at mask-feature
resolution, padding cropped, with the training cost's weights (Mask2Former, section 3.4 of Cheng et al., CVPR 2022).
All layers of an image share one matrix product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

#: Logits that may be alive at once (16 MiB of float32); larger images are processed in several chunks of layers.
MAX_LOGITS = 1 << 22

Selection = slice | Tensor
ALL = slice(None)
Classifier = Literal["softmax", "sigmoid", "scores"]
"""What a model's class outputs are: logits with "no object" last, logits of the classes alone, or probabilities with
"no object" last."""
_NEAR_ONE = 0.01
"""How far from one scores may sum, in half precision too."""


@dataclass(frozen=True)
class MatchWeights:
    """Weights of the matching cost; the defaults are Mask2Former's training weights."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


@dataclass(frozen=True)
class Grid:
    """Which cells of the mask features hold the image.

    ``cells`` are the cells kept after cropping the padding. ``extent`` is the height and width of the image in
    cells; it is not whole when the image's side is no multiple of the stride, and then the last cell is covered by
    image only in part.
    """

    cells: tuple[int, int]
    extent: tuple[float, float]

    @classmethod
    def of(cls, features: tuple[int, int], image_size: tuple[int, int] | None, stride: int = 4) -> "Grid":
        """Grid of an image of ``image_size`` input pixels (before padding) on (h, w) features; None: there is no
        padding.

        Raises ValueError if the features are smaller than the image.
        """
        if image_size is None:
            return cls(features, (float(features[0]), float(features[1])))
        cells = (-(-image_size[0] // stride), -(-image_size[1] // stride))
        if cells[0] > features[0] or cells[1] > features[1]:
            raise ValueError(f"an image of {image_size} pixels needs {cells} cells at stride {stride}, got {features}")
        return cls(cells, (image_size[0] / stride, image_size[1] / stride))


def ground_truth_cells(gt_masks: Tensor, grid: Grid) -> Tensor:
    """Ground truth at mask-feature resolution: area-averaged, then ≥ 0.5.

    ``gt_masks`` (n, H, W) bool covers exactly the image, at any resolution (that of the input or the original one).
    Returns (n, h, w) bool for ``grid.cells``. A cell that the image covers in part is averaged over the covered
    part.
    """
    height, width = gt_masks.shape[-2:]
    if len(gt_masks) == 0:
        return gt_masks.new_zeros((0, *grid.cells), dtype=torch.bool)
    stride = height / grid.extent[0]
    if stride == width / grid.extent[1] and stride.is_integer():
        means = F.avg_pool2d(gt_masks[None].float(), int(stride), ceil_mode=True)[0]
    else:
        rows = _area_weights(height, grid.cells[0], height / grid.extent[0]).to(gt_masks.device)
        columns = _area_weights(width, grid.cells[1], width / grid.extent[1]).to(gt_masks.device)
        means = rows @ gt_masks.float() @ columns.T
    # Exact halves must count although weights such as 1/3 are rounded.
    return means >= 0.5 - 1e-5


@lru_cache(maxsize=256)
def _area_weights(pixels: int, cells: int, pitch: float) -> Tensor:
    """(cells, pixels) float32: share of cell i's covered length that is pixel j; a cell is ``pitch`` pixels long."""
    edges = np.minimum(np.arange(cells + 1) * pitch, pixels)
    starts = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    overlap = overlap.clip(min=0)
    return torch.from_numpy((overlap / overlap.sum(1, keepdims=True)).astype(np.float32))


def class_scores(class_logits: Tensor, classifier: Classifier = "softmax") -> Tensor:
    """Score in [0, 1] of every class: (…, C) float32, from what :data:`Classifier` says.

    Shapes: class_logits (…, C) for ``sigmoid``, else (…, C + 1). Raises ValueError for ``scores`` outside [0, 1] or
    not summing to one, for scores that are given as logits of ``softmax``, and for another classifier.
    """
    values = class_logits.float()
    if classifier == "sigmoid":
        return values.sigmoid()
    if classifier not in ("softmax", "scores"):
        raise ValueError(f"unknown classifier {classifier!r}; valid: softmax, sigmoid, scores")
    normalised = bool(((values >= 0) & (values <= 1)).all() and ((values.sum(-1) - 1).abs() < _NEAR_ONE).all())
    if classifier == "scores" and not normalised:
        raise ValueError('scores must be in [0, 1] and sum to one, "no object" last; logits are softmax or sigmoid')
    if classifier == "softmax" and normalised and values.numel():
        raise ValueError("class outputs in [0, 1] that sum to one are scores, not logits: give classifier='scores'")
    return (values if classifier == "scores" else values.softmax(-1))[..., :-1]


def matching_costs(
    mask_logits: Tensor,
    class_logits: Tensor,
    gt_cells: Tensor,
    gt_labels: Tensor,
    weights: MatchWeights | None = None,
    classifier: Classifier = "softmax",
) -> Tensor:
    """Cost of giving query q of layer a to object m.

    ``cost = − w_class · p_q(label_m) + w_mask · BCE(q, m) + w_dice · (1 − (2 Σ σ t + 1) / (Σ σ + Σ t + 1))``,
    with BCE the mean and Σ the sum over all cells, σ the sigmoid of the logits and t the object's cells.

    Shapes: mask_logits (A, Q, h, w), class_logits (A, Q, C + 1) or as :func:`class_scores` takes them, gt_cells (n, h,
    w) bool, gt_labels (n,) int; returns (A, Q, n) float32.
    """
    return _costs(mask_logits, class_scores(class_logits, classifier), gt_cells, gt_labels, weights)


def _costs(
    mask_logits: Tensor, scores: Tensor, gt_cells: Tensor, gt_labels: Tensor, weights: MatchWeights | None
) -> Tensor:
    weights = weights or MatchWeights()
    logits = mask_logits.float().flatten(2)
    layers, queries, cells = logits.shape
    logits = logits.reshape(layers * queries, cells)
    targets = gt_cells.reshape(len(gt_cells), cells).T.float()
    probability = logits.sigmoid()
    # Σ softplus(x) = Σ relu(x) − Σ log max(σ, 1 − σ), with the logs of eight cells (each ≥ log 0.5) taken in one.
    certainty = torch.maximum(probability, 1 - probability).view(len(logits), gcd(8, cells), -1).prod(1)
    softplus = logits.clamp(min=0).sum(1) - certainty.log_().sum(1)
    bce = (softplus[:, None] - logits @ targets) / cells
    sums = probability.sum(1, keepdim=True) + targets.sum(0)
    dice = 1 - (2 * (probability @ targets) + 1) / (sums + 1)
    classes = scores[..., gt_labels].reshape(layers * queries, -1)
    cost = weights.mask * bce + weights.dice * dice - weights.classes * classes
    return cost.reshape(layers, queries, -1)


def assign(costs: Tensor) -> np.ndarray:
    """Hungarian matching of each layer: costs (A, Q, n) → V (A, Q) int64, V[a, q] = object of query q, −1 for none.

    min(Q, n) queries are matched in every layer. Raises ValueError on a cost that is not finite.
    """
    table = costs.double().cpu().numpy()
    if not np.isfinite(table).all():
        raise ValueError("matching cost is not finite: the model's outputs hold NaN or infinity")
    assignment = np.full(table.shape[:2], -1, dtype=np.int64)
    for layer, cost in enumerate(table):
        rows, columns = linear_sum_assignment(cost)
        assignment[layer, rows] = columns
    return assignment


@dataclass(frozen=True)
class ImagePrediction:
    """One image's outputs of all layers, with the padding cropped: logits are made only for the layers asked for.

    ``logits(start, stop, queries)`` gives (stop − start, k, h, w) mask logits of the k queries of a slice or index;
    ``class_logits`` is (A, Q, C + 1), or (A, Q, C) where the ``classifier`` is a sigmoid. ``first_layer`` is the number
    of the first of the A layers: 0, or 1 for a model that predicts nothing from its bare queries.
    """

    logits: Callable[[int, int, Selection], Tensor]
    class_logits: Tensor
    grid: Grid
    classifier: Classifier = "softmax"
    first_layer: int = 0

    @classmethod
    def from_masks(
        cls,
        mask_logits: Tensor,
        class_logits: Tensor,
        image_size: tuple[int, int] | None = None,
        stride: int = 4,
        classifier: Classifier = "softmax",
        first_layer: int = 0,
    ) -> "ImagePrediction":
        """From mask logits (A, Q, h, w); ``image_size`` as in :meth:`Grid.of`."""
        grid = Grid.of((mask_logits.shape[-2], mask_logits.shape[-1]), image_size, stride)
        cropped = mask_logits[..., : grid.cells[0], : grid.cells[1]]
        return cls(
            lambda start, stop, queries: cropped[start:stop, queries], class_logits, grid, classifier, first_layer
        )

    @classmethod
    def from_embeddings(
        cls,
        mask_embed: Tensor,
        mask_features: Tensor,
        class_logits: Tensor,
        image_size: tuple[int, int] | None = None,
        stride: int = 4,
        classifier: Classifier = "softmax",
        first_layer: int = 0,
    ) -> "ImagePrediction":
        """From mask embeddings (A, Q, D) and mask features (D, h, w), whose product is the mask logits."""
        grid = Grid.of((mask_features.shape[-2], mask_features.shape[-1]), image_size, stride)
        features = mask_features[:, : grid.cells[0], : grid.cells[1]].reshape(len(mask_features), -1).float()

        def logits(start: int, stop: int, queries: Selection) -> Tensor:
            return (mask_embed[start:stop, queries].float() @ features).unflatten(-1, grid.cells)

        return cls(logits, class_logits, grid, classifier, first_layer)

    @cached_property
    def scores(self) -> Tensor:
        """(A, Q, C) float32, see :func:`class_scores`."""
        return class_scores(self.class_logits, self.classifier)

    @property
    def layers(self) -> int:
        """A = L + 1, less ``first_layer``."""
        return self.class_logits.shape[0]

    @property
    def queries(self) -> int:
        """Q."""
        return self.class_logits.shape[1]

    def chunks(self, max_logits: int = MAX_LOGITS) -> Iterator[tuple[int, int]]:
        """Layer ranges (start, stop), last layers first, none holding more than ``max_logits`` logits (but one
        layer).
        """
        step = max(1, max_logits // max(1, self.queries * self.grid.cells[0] * self.grid.cells[1]))
        for stop in range(self.layers, 0, -step):
            yield max(0, stop - step), stop


def match_layers(
    prediction: ImagePrediction, gt_cells: Tensor, gt_labels: Tensor, weights: MatchWeights | None = None
) -> np.ndarray:
    """Match every layer of an image: V (A, Q) int64 as in :func:`assign`; gt_cells (n, h, w) bool, gt_labels (n,)."""
    parts = [
        assign(_costs(prediction.logits(start, stop, ALL), prediction.scores[start:stop], gt_cells, gt_labels, weights))
        for start, stop in prediction.chunks()
    ]
    return np.concatenate(parts[::-1])
