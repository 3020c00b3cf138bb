"""Losses of all layers, of the matching and the piloted part, in one batched computation (Mask2Former, section 3.3).

Full-size logits are made only for rows that have an object: a matched query or a piloted slot. Their uncertain
points are sampled from these logits. Everything here is float32, whatever autocast says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpformer.modeling.mask_piloting import PilotBatch
from mpformer.modeling.matcher import CostWeights, Matching, match
from mpformer.modeling.outputs import DecoderOutput, Targets
from mpformer.modeling.points import (
    FixedPoints,
    PointDraw,
    Points,
    PointSettings,
    SharedPoints,
    draw_points,
    most_uncertain,
    sample,
)
from mpformer.runtime import distributed

_IGNORED = -1
_VALUES = 640 * 1024
"""Points of all rows that are worked on at a time; bounds the memory. Sixteen rows of the paper's 40,768 points."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and normalisers of the losses."""

    classes: int
    weights: CostWeights = field(default_factory=CostWeights)
    no_object_weight: float = 0.1
    points: PointSettings = field(default_factory=PointSettings)
    class_mean: Literal["global", "per-rank"] = "global"
    """Whether the class loss is a weighted mean over all devices' queries, or over each device's own."""


@dataclass(frozen=True)
class Rows:
    """Rows of one image that have an object, in every layer."""

    queries: Tensor
    """(L+1, r) query or slot."""
    objects: Tensor
    """(L+1, r) object of the image."""


@dataclass(frozen=True)
class Part:
    """The matching or the piloted part, as the losses see it."""

    suffix: str
    first: int
    """The first head that is supervised."""
    logits: Tensor
    """(L+1, B, N, C+1)."""
    embed: Tensor
    """(L+1, B, N, D)."""
    rows: tuple[Rows, ...]
    """Per image."""
    classes: Tensor
    """(L+1, B, N) wanted class; -1 where the class loss ignores the query."""
    objects: int
    """What mask losses are averaged over: objects, times groups in the piloted part."""


class Criterion(nn.Module):
    """Class, mask and dice losses by name; ``empty_weight`` (C+1,) is a buffer as in released files."""

    empty_weight: Tensor

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        weight = torch.ones(settings.classes + 1)
        weight[-1] = settings.no_object_weight
        self.register_buffer("empty_weight", weight)

    @torch.compiler.disable  # the assignments are solved on the host: there is no graph to be had
    def forward(
        self,
        output: DecoderOutput,
        targets: Targets,
        pilot: PilotBatch | None = None,
        points: Points | torch.Generator | None = None,
        matching: Matching | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted losses by name: ``loss_{ce,mask,dice}[_pilot][_i]``.

        No number is the last head, i = 0 ... L-1 the heads before it. ``points`` are given, drawn from a
        generator, or (None) from the default one; ``matching`` is computed unless it is given.
        """
        with torch.autocast(output.logits.device.type, enabled=False):
            features = output.mask_features.float()
            if not isinstance(points, PointDraw | FixedPoints):
                cells = (features.shape[-2], features.shape[-1])
                points = draw_points(self.settings.points, len(features), cells, points, features.device)
            if matching is None:
                matching = match(output, targets, points.matching, self.settings.weights)
            parts = [_matching_part(output, targets, matching)]
            if pilot is not None:
                parts.append(_pilot_part(output, targets, pilot))
            return self._losses(parts, features, targets, points)

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multiply each loss with the weight of its kind."""
        weights = self.settings.weights
        kinds = {"ce": weights.classes, "mask": weights.mask, "dice": weights.dice}
        return {name: loss * kinds[name.split("_")[1]] for name, loss in losses.items()}

    def _losses(self, parts: Sequence[Part], features: Tensor, targets: Targets, points: Points) -> dict[str, Tensor]:
        weights = [self.empty_weight[part.classes] * (part.classes != _IGNORED) for part in parts]
        norms = self._normalisers(parts, weights)
        sums = mask_loss_sums(parts, features, targets, points, self.settings.points.uncertain)
        losses: dict[str, Tensor] = {}
        for part, weight, (objects, total), (mask, dice) in zip(parts, weights, norms, sums, strict=True):
            values = {"ce": (_nll(part) * weight).sum((1, 2)) / total, "mask": mask / objects, "dice": dice / objects}
            losses |= named_losses(values, part.suffix, part.first)
        return losses

    def _normalisers(self, parts: Sequence[Part], weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per part: the object count (), at least 1, and the class weights (L+1,), as means over devices.

        Gradients are averaged over devices, so that dividing by these means gives the whole batch's loss. One
        reduction of one size, whether or not this device has a piloted part.
        """
        local = torch.zeros(2, 1 + len(weights[0]), device=weights[0].device)
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            local[i, 0] = part.objects
            local[i, 1:] = weight.sum((1, 2))
        mean = distributed.mean(local)
        classes = mean if self.settings.class_mean == "global" else local
        return [(mean[i, 0].clamp(min=1), classes[i, 1:]) for i in range(len(parts))]


def mask_loss_sums(
    parts: Sequence[Part], features: Tensor, targets: Targets, points: Points, uncertain: int
) -> list[tuple[Tensor, Tensor]]:
    """Per part, the sums over objects of the mask and the dice loss, each (L+1,); features (B, D, h, w)."""
    layers = len(parts[0].logits)
    sums = [[features.new_zeros(2, layers)] for _ in parts]
    for image, (masks, maps) in enumerate(zip(targets.masks, features.unbind(), strict=True)):
        if len(masks) == 0:
            continue
        # The parts share the image's features and points: their rows are one batch.
        embed = torch.cat([_row_embeddings(part, image) for part in parts], dim=1)
        objects = torch.cat([part.rows[image].objects for part in parts], dim=1)
        logits = torch.einsum("lrd,dhw->lrhw", embed, maps)
        if isinstance(points, FixedPoints):
            fixed = torch.cat([_fixed_points(part, image, points) for part in parts], dim=1)
            losses = torch.stack(point_losses(*_at_fixed_points(logits, masks.float(), objects, fixed)))
        else:
            drawn = (points.candidates[image], points.uniform[image])
            losses = DrawnPointLosses.apply(logits.flatten(0, 1), masks.float(), objects.flatten(), *drawn, uncertain)
        counts = [part.rows[image].queries.shape[1] for part in parts]
        for total, rows in zip(sums, losses.view(2, layers, -1).split(counts, dim=2), strict=True):
            total.append(rows.sum(2))
    if not any(targets.counts):
        # Keeps every parameter in the graph, which distributed training relies on.
        sums[0].append(sums[0][0] + (parts[0].embed.float().sum() + features.sum()) * 0)
    totals = [torch.stack(terms).sum(0) for terms in sums]
    return [(mask, dice) for mask, dice in totals]


class DrawnPointLosses(torch.autograd.Function):
    """Mask and dice loss of each row at its most uncertain candidates and at the uniform points.

    A row's losses depend on its own logits alone, so that their gradients are taken at once and kept as two maps per
    row; the many values at the points are gone before the next image.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, masks: Tensor, objects: Tensor, candidates: Tensor, rest: Tensor, uncertain: int
    ) -> Tensor:
        """Logits (R, h, w), masks (n, H, W), objects (R,), points (., 2); returns the losses (2, R)."""
        where = torch.cat([candidates, rest])
        truth = sample(masks[None], where[None])[0]
        shared = SharedPoints.at(where, (logits.shape[-2], logits.shape[-1]))
        at_once = max(1, _VALUES // len(where))
        found = [
            _losses_and_gradients(rows, truth, owners, shared, len(candidates), uncertain)
            for rows, owners in zip(logits.split(at_once), objects.split(at_once), strict=True)
        ]
        ctx.save_for_backward(torch.cat([gradients for _, gradients in found], dim=1))
        return torch.cat([losses for losses, _ in found], dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Weight the kept gradients (2, R, h, w) with those of the losses (2, R)."""
        (gradients,) = ctx.saved_tensors
        return torch.einsum("kr,krhw->rhw", upstream, gradients), None, None, None, None, None


def _losses_and_gradients(
    logits: Tensor, truth: Tensor, objects: Tensor, points: SharedPoints, candidates: int, uncertain: int
) -> tuple[Tensor, Tensor]:
    """Losses (2, R) of logits (R, h, w) against truth (n, K)[objects], and their gradients (2, R, h, w)."""
    sampled = points.sample(logits).contiguous()
    chosen = most_uncertain(sampled[:, :candidates], uncertain)
    rest = torch.arange(candidates, sampled.shape[1], device=chosen.device)
    chosen = torch.cat([chosen, rest.expand(len(chosen), -1)], dim=1)
    with torch.enable_grad():
        values = sampled.gather(1, chosen).requires_grad_()
        losses = point_losses(values, truth.take(objects[:, None] * truth.shape[1] + chosen))
        gradients = [torch.autograd.grad(loss.sum(), values, retain_graph=True)[0] for loss in losses]
    at_points = sampled.new_zeros(2, *sampled.shape)
    for dense, gradient in zip(at_points, gradients, strict=True):
        dense.scatter_(1, chosen, gradient)
    return torch.stack(losses).detach(), points.scatter(at_points.flatten(0, 1)).reshape(2, *logits.shape)


def _row_embeddings(part: Part, image: int) -> Tensor:
    """Mask embeddings (L+1, r, D) of the rows of one image."""
    embed = part.embed[:, image].float()
    return embed.gather(1, part.rows[image].queries[..., None].expand(-1, -1, embed.shape[-1]))


def _at_fixed_points(logits: Tensor, masks: Tensor, objects: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ground truth, both (rows, K), at points (L+1, r, K, 2) of each row's own."""
    where = points.flatten(0, 1)
    sampled = sample(logits.flatten(0, 1)[:, None], where)[:, 0]
    return sampled, sample(masks[objects.flatten()][:, None], where)[:, 0]


def _fixed_points(part: Part, image: int, points: FixedPoints) -> Tensor:
    """The given points (L+1, r, K, 2) of one image's rows; matched rows are given in ascending query order."""
    given = points.loss if part.suffix == "" else points.pilot_loss
    assert given is not None, "no points were given for the piloted part"
    queries = part.rows[image].queries
    start = sum(rows.queries.shape[1] for rows in part.rows[:image])
    order = queries.argsort(1).argsort(1) + start
    return given[torch.arange(len(given), device=order.device)[:, None], order]


def point_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of each row (R, K) -> (R,)."""
    mask = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    probability = logits.sigmoid()
    overlap = (probability * truth).sum(1)
    return mask, 1 - (2 * overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)


def _matching_part(output: DecoderOutput, targets: Targets, matching: Matching) -> Part:
    rows = tuple(Rows(q, o) for q, o in zip(matching.queries, matching.objects, strict=True))
    no_object = output.logits.shape[-1] - 1
    classes = _class_targets(output.logits, targets, rows, no_object)
    return Part("", 0, output.logits, output.mask_embed, rows, classes, sum(targets.counts))


def _pilot_part(output: DecoderOutput, targets: Targets, pilot: PilotBatch) -> Part:
    """Slot -> object is fixed: slot g * N + j is object j."""
    logits, embed = output.pilot_logits, output.pilot_mask_embed
    assert logits is not None
    assert embed is not None
    largest = pilot.slots // pilot.groups
    slots = [real.nonzero()[:, 0].expand(len(logits), -1) for real in pilot.real]
    rows = tuple(Rows(s, s % largest) for s in slots)
    padding = _IGNORED if pilot.toggles.pilot_padding == "masked" else logits.shape[-1] - 1
    classes = _class_targets(logits, targets, rows, padding)
    first = 0 if pilot.toggles.layer0_supervision else 1
    return Part("_pilot", first, logits, embed, rows, classes, sum(targets.counts) * pilot.groups)


def _class_targets(logits: Tensor, targets: Targets, rows: Sequence[Rows], other: int) -> Tensor:
    """Wanted class (L+1, B, N): the object's label in rows that have one, ``other`` elsewhere."""
    classes = torch.full(logits.shape[:-1], other, device=logits.device)
    for image, (row, labels) in enumerate(zip(rows, targets.labels, strict=True)):
        classes[:, image].scatter_(1, row.queries, labels[row.objects])
    return classes


def _nll(part: Part) -> Tensor:
    """Negative log-likelihood (L+1, B, N) of the wanted classes; arbitrary where they are ignored."""
    wanted = part.classes.clamp(min=0)
    return -part.logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]


def named_losses(values: dict[str, Tensor], suffix: str, first: int) -> dict[str, Tensor]:
    """Name the losses (L+1,) of each kind, from head ``first`` on: ``loss_mask_pilot_3``, the last without a number."""
    names = {}
    for kind, layers in values.items():
        for i, value in enumerate(layers.unbind()[first:], start=first):
            names[f"loss_{kind}{suffix}" + ("" if i == len(layers) - 1 else f"_{i}")] = value
    return names
