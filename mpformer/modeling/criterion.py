"""Losses of all layers, of the matching and the piloted part, in one batched computation (Mask2Former, section 3.3).

Mask losses are computed only for rows that have an object: a matched query or a piloted slot, in one layer. The rows
of all images, layers and parts go through every operation together, as many at a time as the memory is meant for.
Everything here is float32, whatever autocast says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from analysis.matching import MatchWeights
from mpformer.modeling.mask_piloting import PilotBatch
from mpformer.modeling.matcher import Matching, match
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
    sample_masks,
    values_at_once,
)
from mpformer.runtime import distributed

_IGNORED = -1
_LEAST_WEIGHT = 1e-9
"""With `no_object_weight` 0 and no object in the batch nothing weighs anything: the class loss is 0, not 0 / 0."""
_CACHED = 640 * 1024
"""Points of all rows that are worked on at a time on CPU. Sixteen rows of the paper's 40,768 points."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and normalisers of the losses."""

    classes: int
    weights: MatchWeights = field(default_factory=MatchWeights)
    no_object_weight: float = 0.1
    points: PointSettings = field(default_factory=PointSettings)
    class_mean: Literal["global", "per-rank"] = "global"
    """Whether the class loss is a weighted mean over all devices' queries, or over each device's own."""


@dataclass(frozen=True)
class Part:
    """The matching or the piloted part, as the losses see it."""

    suffix: str
    first: int
    """The first head that is supervised."""
    unowned: int
    """Wanted class of predictions without an object; -1 where the class loss ignores them."""
    objects: int
    """What mask losses are averaged over: objects, times groups in the piloted part."""
    logits: Tensor
    """(L+1, B, N, C+1)."""
    embed: Tensor
    """(L+1, B, N, D)."""
    queries: tuple[Tensor, ...]
    """Per image (L+1, r): queries or slots that have an object; on the host."""
    owners: tuple[Tensor, ...]
    """Per image (L+1, r): their objects."""


@dataclass(frozen=True)
class Rows:
    """The rows of all parts: image by image, within one part by part, within one in all layers."""

    places: Tensor
    """(r, L+1) index into the predictions (L+1, B, all N), flattened."""
    objects: Tensor
    """(r, L+1) index into the objects of the batch."""
    counts: tuple[int, ...]
    """How many of the r are each image's and part's: image 0 part 0, image 0 part 1, ..."""
    parts: int

    @property
    def per_image(self) -> list[int]:
        """How many of the r are each image's."""
        return [sum(self.counts[i : i + self.parts]) for i in range(0, len(self.counts), self.parts)]

    def sums(self, values: Tensor) -> list[Tensor]:
        """Sum values (..., r, L+1) over each part's rows: (..., L+1) per part."""
        pieces = values.split(self.counts, dim=-2)
        return [torch.cat(pieces[part :: self.parts], dim=-2).sum(-2) for part in range(self.parts)]


class Criterion(nn.Module):
    """Class, mask and dice losses by name; ``empty_weight`` (C+1,) is a buffer as in released files."""

    empty_weight: Tensor

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        weight = torch.ones(settings.classes + 1)
        weight[-1] = settings.no_object_weight
        self.register_buffer("empty_weight", weight)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The losses of :meth:`by_layer`, each under a name of its own: ``loss_{ce,mask,dice}[_pilot][_i]``."""
        return named_losses(self.by_layer(*args, **kwargs))

    @torch.compiler.disable  # the assignments are solved on the host: there is no graph to be had
    def by_layer(
        self,
        output: DecoderOutput,
        targets: Targets,
        pilot: PilotBatch | None = None,
        points: Points | torch.Generator | None = None,
        matching: Matching | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted losses (heads,) by name, ``loss_{ce,mask,dice}[_pilot]``, of the last supervised heads.

        ``points`` are given, drawn from a generator, or (None) from the default one; ``matching`` is computed unless
        it is given.
        """
        with torch.autocast(output.logits.device.type, enabled=False):
            features = output.mask_features.float()
            points = self._drawn(points, features)
            if matching is None:
                matching = match(output, targets, points.matching, self.settings.weights)
            parts = [_matching_part(output, targets, matching)]
            if pilot is not None:
                assert output.pilot_logits is not None
                assert output.pilot_mask_embed is not None
                parts.append(_pilot_part(output.pilot_logits, output.pilot_mask_embed, targets, pilot))
            return self._losses(parts, features, targets, points)

    @torch.compiler.disable
    def of_pilot(
        self,
        logits: Tensor,
        embed: Tensor,
        mask_features: Tensor,
        targets: Targets,
        pilot: PilotBatch,
        points: Points | torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """:meth:`by_layer` of a piloted part alone, for a model whose matching part has a criterion of its own.

        Shapes: logits (L+1, B, P, C+1), embed (L+1, B, P, D), mask_features (B, D, h, w).
        """
        with torch.autocast(logits.device.type, enabled=False):
            features = mask_features.float()
            parts = [_pilot_part(logits, embed, targets, pilot)]
            return self._losses(parts, features, targets, self._drawn(points, features))

    def join(self, heads: int, device: torch.device) -> None:
        """Take part in the reduction of the devices that have a part, without one here."""
        distributed.mean(torch.zeros(2, 1 + heads, device=device))

    def _drawn(self, points: Points | torch.Generator | None, features: Tensor) -> Points:
        if isinstance(points, PointDraw | FixedPoints):
            return points
        cells = (features.shape[-2], features.shape[-1])
        return draw_points(self.settings.points, len(features), cells, points, features.device)

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multiply each loss with the weight of its kind."""
        weights = self.settings.weights
        kinds = {"ce": weights.classes, "mask": weights.mask, "dice": weights.dice}
        return {name: loss * kinds[name.split("_")[1]] for name, loss in losses.items()}

    def _losses(self, parts: Sequence[Part], features: Tensor, targets: Targets, points: Points) -> dict[str, Tensor]:
        rows = _rows(parts, targets, features.device)
        sums = self._class_sums(parts, rows, targets)
        norms = self._normalisers(parts, [weight for _, weight in sums])
        if any(targets.counts):
            embed = torch.cat([part.embed for part in parts], dim=2).float()
            mask, dice = (rows.sums(loss) for loss in self._mask_losses(parts, rows, embed, features, targets, points))
        else:
            mask = dice = [_nothing(part, features) for part in parts]
        losses: dict[str, Tensor] = {}
        for i, (part, (nll, _), (objects, total)) in enumerate(zip(parts, sums, norms, strict=True)):
            found = {"ce": nll / total.clamp(min=_LEAST_WEIGHT), "mask": mask[i] / objects, "dice": dice[i] / objects}
            losses |= {f"loss_{kind}{part.suffix}": loss[part.first :] for kind, loss in found.items()}
        return losses

    def _class_sums(self, parts: Sequence[Part], rows: Rows, targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Per part: weighted negative log-likelihood, summed, and the weights' sums, each (L+1,)."""
        logits = torch.cat([part.logits for part in parts], dim=2).float()
        wanted = torch.cat([torch.full_like(part.logits[..., 0], part.unowned, dtype=torch.int64) for part in parts], 2)
        wanted.view(-1)[rows.places] = targets.all_labels[rows.objects]
        weight = self.empty_weight[wanted] * (wanted != _IGNORED)
        nll = -logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        sizes = [part.logits.shape[2] for part in parts]
        pairs = zip((nll * weight).split(sizes, dim=2), weight.split(sizes, dim=2), strict=True)
        return [(values.sum((1, 2)), weights.sum((1, 2))) for values, weights in pairs]

    def _mask_losses(
        self, parts: Sequence[Part], rows: Rows, embed: Tensor, features: Tensor, targets: Targets, points: Points
    ) -> tuple[Tensor, Tensor]:
        """Mask and dice loss of every row, both (r, L+1); embed (L+1, B, all N, D)."""
        of_rows = embed.flatten(0, 2).index_select(0, rows.places.flatten())
        if isinstance(points, FixedPoints):
            losses = _at_fixed_points(of_rows, parts, rows, features, targets.all_masks, points)
        else:
            where = torch.cat([points.candidates, points.uniform], dim=1)
            given = (points.candidates.shape[1], self.settings.points.uncertain)
            counts = [count * len(embed) for count in rows.per_image]
            losses = DrawnPointLosses.apply(
                of_rows, features, targets.masks, rows.objects.flatten(), where, counts, *given
            )
        mask, dice = losses.view(2, *rows.objects.shape)
        return mask, dice

    def _normalisers(self, parts: Sequence[Part], weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per part: the object count (), at least 1, and the class weights (L+1,), as means over devices.

        Gradients are averaged over devices, so that dividing by these means gives the whole batch's loss. One
        reduction of one size, whether or not this device has a piloted part.
        """
        local = torch.zeros(2, 1 + len(weights[0]), device=weights[0].device)
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            local[i, 0] = part.objects
            local[i, 1:] = weight
        mean = distributed.mean(local)
        classes = mean if self.settings.class_mean == "global" else local
        return [(mean[i, 0].clamp(min=1), classes[i, 1:]) for i in range(len(parts))]


def _matching_part(output: DecoderOutput, targets: Targets, matching: Matching) -> Part:
    no_object = output.logits.shape[-1] - 1
    pairs = (matching.queries, matching.objects)
    return Part("", 0, no_object, sum(targets.counts), output.logits, output.mask_embed, *pairs)


def _pilot_part(logits: Tensor, embed: Tensor, targets: Targets, pilot: PilotBatch) -> Part:
    """Slot -> object is fixed: slot g * N + j is object j."""
    owners = tuple(torch.arange(count).repeat(pilot.groups) for count in targets.counts)
    first_slots = (torch.arange(pilot.groups).repeat_interleave(count) for count in targets.counts)
    slots = tuple(g * (pilot.slots // pilot.groups) + j for g, j in zip(first_slots, owners, strict=True))
    in_all_layers = (tuple(x.expand(len(logits), -1) for x in each) for each in (slots, owners))
    unowned = _IGNORED if pilot.toggles.pilot_padding == "masked" else logits.shape[-1] - 1
    first = 0 if pilot.toggles.layer0_supervision else 1
    return Part("_pilot", first, unowned, sum(targets.counts) * pilot.groups, logits, embed, *in_all_layers)


def _rows(parts: Sequence[Part], targets: Targets, device: torch.device) -> Rows:
    """Order the rows on the host, and copy them to the device at once."""
    layers, images = parts[0].logits.shape[:2]
    width = sum(part.logits.shape[2] for part in parts)
    starts = np.cumsum([0, *(part.logits.shape[2] for part in parts)])
    first_objects = np.cumsum([0, *targets.counts])
    places, objects = [], []
    for image in range(images):
        for part, start in zip(parts, starts, strict=False):
            places.append(part.queries[image].numpy() + (image * width + start))
            objects.append(part.owners[image].numpy() + first_objects[image])
    counts = tuple(piece.shape[1] for piece in places)
    layer = np.arange(layers)[:, None] * (images * width)
    both = np.stack([np.concatenate(places, axis=1) + layer, np.concatenate(objects, axis=1)]).transpose(0, 2, 1)
    on_device = torch.from_numpy(np.ascontiguousarray(both)).to(device, non_blocking=True)
    return Rows(on_device[0], on_device[1], counts, len(parts))


def _nothing(part: Part, features: Tensor) -> Tensor:
    """Mask losses (L+1,) of a batch without objects: 0, with every parameter in the graph, which distributed training
    relies on."""
    return ((part.embed.float().sum() + features.sum()) * 0).expand(len(part.embed))


class DrawnPointLosses(torch.autograd.Function):
    """Mask and dice loss of each row at its most uncertain candidates and at the uniform points.

    Only a row's chosen points and its logits there are kept for the backward pass. The gradients at these points follow
    from them; sampling and the product of embeddings and features are linear, so that the rest is their transposes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embed: Tensor,
        features: Tensor,
        masks: Sequence[Tensor],
        objects: Tensor,
        points: Tensor,
        counts: Sequence[int],
        candidates: int,
        uncertain: int,
    ) -> Tensor:
        """Losses (2, R) of embed (R, D) x features (B, D, h, w), ``counts`` rows an image.

        ``masks`` per image (n, H, W); objects (R,) counts on over the images; ``points`` (B, K, 2) are the candidates,
        then the uniform ones.
        """
        truth = torch.cat([sample_masks(image, where) for image, where in zip(masks, points, strict=True)])
        planes = _planes(features, points)
        rest = torch.arange(candidates, points.shape[1], device=embed.device)
        losses = embed.new_empty(2, len(embed))
        at_chosen = embed.new_empty(len(embed), uncertain + len(rest))
        chosen = torch.empty_like(at_chosen, dtype=torch.int32)
        for chunk in _chunks(counts, _rows_at_once(points)):
            rows = _span(chunk)
            logits = torch.cat([planes[image].logits(embed[part]) for image, part in chunk])
            index = most_uncertain(logits[:, :candidates], uncertain)
            chosen[rows] = index = torch.cat([index, rest.expand(len(index), -1)], dim=1)
            at_chosen[rows] = logits = logits.gather(1, index)
            losses[:, rows] = torch.stack(point_losses(logits, _truth_at(truth, objects[rows], index)))
        ctx.save_for_backward(embed, features, objects, points, truth, chosen, at_chosen)
        ctx.counts = counts
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of embed and features, from those of the losses (2, R)."""
        embed, features, objects, points, truth, chosen, logits = ctx.saved_tensors
        planes = _planes(features, points)
        of_embed, of_columns = torch.empty_like(embed), [torch.zeros_like(plane.columns) for plane in planes]
        for chunk in _chunks(ctx.counts, _rows_at_once(points)):
            rows = _span(chunk)
            index = chosen[rows].long()
            at_chosen = point_gradients(logits[rows], _truth_at(truth, objects[rows], index), *upstream[:, rows])
            at_points = embed.new_zeros(len(index), points.shape[1]).scatter_(1, index, at_chosen)
            for image, part in chunk:
                at_places = planes[image].give_back(at_points[part.start - rows.start : part.stop - rows.start])
                of_columns[image].addmm_(embed[part].T, at_places)
                of_embed[part] = at_places @ planes[image].columns.T
        of_features = [plane.of_features(columns) for plane, columns in zip(planes, of_columns, strict=True)]
        return of_embed, torch.stack(of_features).view_as(features), None, None, None, None, None, None


@dataclass(frozen=True)
class _Plane:
    """One image's logits at its points, by the shorter way: through all cells, or through features at the points."""

    columns: Tensor
    """(D, S): features at the S places, which are cells or the points."""
    points: SharedPoints
    image: int
    at_cells: bool

    def logits(self, embed: Tensor) -> Tensor:
        """Logits (R, K) of embed (R, D)."""
        if not self.at_cells:
            return embed @ self.columns
        return self.points.look_up(self.image, self.columns.T @ embed.T).T

    def give_back(self, gradient: Tensor) -> Tensor:
        """Gradient (R, S) at the places from that of the logits (R, K)."""
        return self.points.scatter(self.image, gradient) if self.at_cells else gradient

    def of_features(self, gradient: Tensor) -> Tensor:
        """Gradient (D, cells) of the features from that of the columns (D, S)."""
        return gradient if self.at_cells else self.points.scatter(self.image, gradient)


def _planes(features: Tensor, points: Tensor) -> list[_Plane]:
    """One plane per image of features (B, D, h, w) and points (B, K, 2)."""
    shared = SharedPoints.at(points, (features.shape[-2], features.shape[-1]))
    at_cells = shared.cells < points.shape[1]
    columns = [maps.flatten(1) if at_cells else shared.sample(image, maps) for image, maps in enumerate(features)]
    return [_Plane(part, shared, image, at_cells) for image, part in enumerate(columns)]


Chunk = list[tuple[int, slice]]
"""Rows that are worked on together: pieces of images, each with its rows."""


def _chunks(counts: Sequence[int], at_once: int) -> list[Chunk]:
    """Cut all images' rows, ``counts`` an image, into chunks of at most ``at_once`` rows."""
    chunks: list[Chunk] = []
    start, room = 0, 0
    for image, count in enumerate(counts):
        end = start + count
        while start < end:
            if room == 0:
                chunks.append([])
                room = at_once
            stop = min(end, start + room)
            chunks[-1].append((image, slice(start, stop)))
            start, room = stop, room - (stop - start)
    return chunks


def _span(chunk: Chunk) -> slice:
    return slice(chunk[0][1].start, chunk[-1][1].stop)


def _rows_at_once(points: Tensor) -> int:
    return max(1, values_at_once(points.device, _CACHED) // points.shape[1])


def _truth_at(truth: Tensor, objects: Tensor, chosen: Tensor) -> Tensor:
    """Ground truth (R, k) of objects (R,) in truth (n, K) at chosen points (R, k)."""
    return truth.take(objects[:, None] * truth.shape[1] + chosen)


def point_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of each row (R, K) -> (R,)."""
    mask = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    probability = logits.sigmoid()
    overlap = (probability * truth).sum(1)
    return mask, 1 - (2 * overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)


def point_gradients(logits: Tensor, truth: Tensor, of_mask: Tensor, of_dice: Tensor) -> Tensor:
    """Gradient (R, K) of ``of_mask`` x mask + ``of_dice`` x dice of :func:`point_losses`; both factors are (R,)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum(1, keepdim=True) + 1
    area = probability.sum(1, keepdim=True) + truth.sum(1, keepdim=True) + 1
    by_probability = (overlap / area - 2 * truth) / area
    mask, dice = (probability - truth) / logits.shape[1], by_probability * probability * (1 - probability)
    return of_mask[:, None] * mask + of_dice[:, None] * dice


def _at_fixed_points(
    embed: Tensor, parts: Sequence[Part], rows: Rows, features: Tensor, masks: Tensor, points: FixedPoints
) -> Tensor:
    """Losses (2, R) of embed (R, D) at given points of each row's own."""
    layers, losses = rows.objects.shape[1], []
    sizes = [count * layers for count in rows.per_image]
    pieces = zip(embed.split(sizes), rows.objects.flatten().split(sizes), features, strict=True)
    for image, (part, objects, maps) in enumerate(pieces):
        where = torch.cat([_fixed_points(p, image, points) for p in parts], dim=1).transpose(0, 1).flatten(0, 1)
        logits = sample(torch.einsum("rd,dhw->rhw", part, maps)[:, None], where)[:, 0]
        losses.append(torch.stack(point_losses(logits, sample(masks[objects][:, None].float(), where)[:, 0])))
    return torch.cat(losses, dim=1)


def _fixed_points(part: Part, image: int, points: FixedPoints) -> Tensor:
    """The given points (L+1, r, K, 2) of one image's rows; matched rows are given in ascending query order."""
    given = points.loss if part.suffix == "" else points.pilot_loss
    assert given is not None, "no points were given for the piloted part"
    queries = part.queries[image]
    start = sum(other.shape[1] for other in part.queries[:image])
    return given[torch.arange(len(given))[:, None], queries.argsort(1).argsort(1) + start]


def named_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split losses (heads,) of the last heads by name: ``loss_mask_pilot_3``, that of the last without a number."""
    heads = max(map(len, losses.values()))
    names = {}
    for name, values in losses.items():
        for i, value in enumerate(values.unbind(), start=heads - len(values)):
            names[name + ("" if i == heads - 1 else f"_{i}")] = value
    return names
