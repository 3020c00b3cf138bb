"""Hungarian matching of all layers and images of a batch in one go (Mask2Former, section 3.3)."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from analysis.matching import MatchWeights
from mpformer.config.schema import ModelConfig
from mpformer.modeling.outputs import DecoderOutput, Targets
from mpformer.modeling.points import SharedPoints, resize, sample_masks, values_at_once

_CACHED = 1 << 21
"""Logits worked on at a time on CPU: enough to keep the cores busy, little enough to stay in the cache."""
_ALIGNED = 16
"""Rows come in multiples of a cache line: a matrix product with odd rows takes half as long again."""
_SMALLEST = -80.0
"""Smaller logits count as this one, whose sigmoid still has a logarithm."""
_HUGE = 1e6
"""Stands for a non-finite cost, so that a diverged run reaches the loss, where it is reported."""


@dataclass(frozen=True)
class Matching:
    """Matched pairs, on the host; m = min(Q, n) of each image, ascending in the object index."""

    queries: tuple[Tensor, ...]
    """Per image (L+1, m) int64."""
    objects: tuple[Tensor, ...]
    """Per image (L+1, m) int64."""

    def pairs(self, layer: int, image: int) -> tuple[Tensor, Tensor]:
        """Matched (queries, objects) of one image at one layer."""
        return self.queries[image][layer], self.objects[image][layer]


def match_weights(model: ModelConfig) -> MatchWeights:
    """Weights of the matching cost, in training and in the analysis; they are those of the loss."""
    return MatchWeights(model.class_weight, model.mask_weight, model.dice_weight)


@torch.no_grad()
def match(output: DecoderOutput, targets: Targets, points: Tensor | None, weights: MatchWeights) -> Matching:
    """Match every layer's predictions to the objects of every image.

    ``points`` (1 or L+1, B, K, 2) are where masks are compared; None: at the centre of every cell.
    """
    if not any(targets.counts):
        nothing = torch.zeros(len(output.logits), 0, dtype=torch.int64)
        return Matching((nothing,) * len(targets.counts), (nothing,) * len(targets.counts))
    costs = matching_costs(output, targets, points, weights).nan_to_num(_HUGE, _HUGE, -_HUGE)
    # One transfer to the host for the whole batch.
    by_image = np.split(costs.cpu().numpy(), np.cumsum(targets.counts)[:-1], axis=2)
    queries, objects = zip(*(_assign(image) for image in by_image), strict=True)
    return Matching(tuple(map(torch.from_numpy, queries)), tuple(map(torch.from_numpy, objects)))


def matching_costs(output: DecoderOutput, targets: Targets, points: Tensor | None, weights: MatchWeights) -> Tensor:
    """Cost (L+1, Q, objects of all images) of giving each object each query of its own image, in float32."""
    with torch.autocast(output.logits.device.type, enabled=False):
        embed, features = output.mask_embed.float(), output.mask_features.float()
        probability = output.logits.float().softmax(-1)
        images = zip(probability.unbind(1), targets.labels, strict=True)
        classes = torch.cat([image[..., labels] for image, labels in images], dim=-1)
        if points is None or len(points) == 1:
            mask, dice = _costs_at(embed, features, targets, None if points is None else points[0])
        else:
            each = [_costs_at(e[None], features, targets, p) for e, p in zip(embed, points, strict=True)]
            mask, dice = (torch.cat(part) for part in zip(*each, strict=True))
        return weights.mask * mask + weights.dice * dice - weights.classes * classes


def _costs_at(embed: Tensor, features: Tensor, targets: Targets, points: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask and dice costs, both (A, Q, objects), of embed (A, B, Q, D) x features (B, D, h, w) at points (B, K, 2).

    Sampling is linear: whichever are fewer, cells or points, the query-feature product is made at.
    """
    size = (features.shape[-2], features.shape[-1])
    shared, places = None, features.flatten(2)
    if points is None:
        truth = resize(targets.all_masks[None], size)[0].flatten(1)
    else:
        truth = torch.cat([sample_masks(masks, where) for masks, where in zip(targets.masks, points, strict=True)])
        shared = SharedPoints.at(points, size)
        if len(points[0]) < shared.cells:
            places = torch.stack([shared.sample(image, maps) for image, maps in enumerate(features)])
            shared = None
    rows = embed.transpose(0, 1).flatten(1, 2)
    padded = pad_sequence(truth.split(targets.counts), batch_first=True)
    costs = _mask_costs(rows, places, padded, shared)
    # An image's padding, where it has fewer objects than another, is left out again.
    owned = [torch.cat([c[:, :n] for c, n in zip(cost, targets.counts, strict=True)], dim=1) for cost in costs]
    mask, dice = (cost.unflatten(0, (len(embed), -1)) for cost in owned)
    return mask, dice


def _mask_costs(
    rows: Tensor, features: Tensor, masks: Tensor, points: SharedPoints | None = None
) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice cost (B, R, n) of rows (B, R, D) x features (B, D, S) and masks (B, n, K).

    With ``points`` the S places are cells that the K points are sampled from; otherwise S is K. BCE(x, t) =
    softplus(x) - x t: the first term is a sum per row, the second is linear in x, so that the masks can be summed
    over the places before they meet the rows.
    """
    at_places = masks
    if points is not None:
        at_places = torch.stack([points.scatter(image, values) for image, values in enumerate(masks)])
    linear = rows @ (at_places @ features.transpose(1, 2)).transpose(1, 2)
    values = values_at_once(rows.device, _CACHED)
    step = _ALIGNED * max(1, values // (len(rows) * masks.shape[2]) // _ALIGNED)
    parts = [_row_sums(_logits(part, features, points), masks) for part in rows.split(step, dim=1)]
    softplus, overlap, area = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    mask = (softplus[..., None] - linear) / masks.shape[2]
    dice = 1 - (2 * overlap + 1) / (area[..., None] + masks.sum(2)[:, None] + 1)
    return mask, dice


def _logits(rows: Tensor, features: Tensor, points: SharedPoints | None) -> Tensor:
    """Logits (B, K, R) of rows (B, R, D): points first, the layout that sampling wants."""
    logits = features.transpose(1, 2) @ rows.transpose(1, 2)
    if points is None:
        return logits
    return torch.stack([points.look_up(image, table) for image, table in enumerate(logits)])


def _row_sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (B, K, R), overwritten: the sum of softplus and the area, both (B, R), and the overlap (B, R, n).

    softplus(x) = x - log sigmoid(x), and the sigmoid is needed anyway; PyTorch's softplus takes ten times as long.
    """
    total = logits.clamp_(min=_SMALLEST).sum(1)
    probability = logits.sigmoid_()
    overlap, area = (masks @ probability).transpose(1, 2), probability.sum(1)
    return total - probability.log_().sum(1), overlap, area


def _assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve each layer of costs (L+1, Q, n); returns queries and objects (L+1, m), ascending in the object."""
    pairs = [linear_sum_assignment(cost.T) for cost in costs]
    objects, queries = (np.stack(part).astype(np.int64) for part in zip(*pairs, strict=True))
    return queries, objects
