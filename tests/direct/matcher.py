"""Hungarian matching, one image and one layer at a time (Mask2Former, section 3.3 and appendix)."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.schema import ModelConfig
from tests.direct.piloting import Target


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (n, h, w) at points (n, N, 2), (x, y) in [0, 1] -> (n, N)."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0, :, 0]


def match_cost(model: ModelConfig, logits: Tensor, masks: Tensor, target: Target, points: Tensor) -> Tensor:
    """Cost (Q, n) of one image: logits (Q, C + 1), masks (Q, h, w), points (N, 2) shared by queries and objects."""
    classes = -logits.softmax(-1)[:, target.labels]
    predicted = sample(masks, points.expand(len(masks), -1, -1))
    wanted = sample(target.masks.float(), points.expand(len(target.masks), -1, -1))
    count = points.shape[0]
    positive = F.softplus(-predicted)  # binary cross entropy against 1
    negative = F.softplus(predicted)  # against 0
    bce = (positive @ wanted.T + negative @ (1 - wanted).T) / count
    probability = predicted.sigmoid()
    overlap = 2 * probability @ wanted.T
    dice = 1 - (overlap + 1) / (probability.sum(1)[:, None] + wanted.sum(1)[None, :] + 1)
    return model.mask_weight * bce + model.class_weight * classes + model.dice_weight * dice


@torch.no_grad()
def match_layer(
    model: ModelConfig, logits: Tensor, masks: Tensor, targets: list[Target], points: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Per image (query, object) pairs: logits (B, Q, C + 1), masks (B, Q, h, w), points (B, N, 2)."""
    pairs = []
    for image, target in enumerate(targets):
        if len(target.labels) == 0:
            pairs.append((torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)))
            continue
        cost = match_cost(model, logits[image], masks[image], target, points[image])
        query, target_index = linear_sum_assignment(cost.numpy())
        pairs.append((torch.as_tensor(query), torch.as_tensor(target_index)))
    return pairs
