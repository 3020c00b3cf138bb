"""The losses of every layer in a Python loop (Mask2Former, section 3.3; MP-Former, section 3).

All losses are unweighted. Names: ``loss_x`` of the last layer, ``loss_x_{i}`` of layer i, ``loss_x_dn`` and
``loss_x_dn_{i}`` of the piloted part, as in the public implementation and its golden files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.schema import ModelConfig, Toggles
from tests.direct.decoder import DirectOutput
from tests.direct.matcher import match_layer, sample
from tests.direct.piloting import Target

Draw = Callable[[int, int], Tensor]  # (masks, points) -> (masks, points, 2) uniform in [0, 1]


@dataclass(frozen=True)
class Points:
    """Where masks are compared. Everything unset is drawn with ``draw`` in the public implementation's order."""

    draw: Draw = lambda n, points: torch.rand(n, points, 2)
    match: dict[int, Tensor] | None = None  # layer -> (B, N, 2)
    matched: dict[int, Tensor] | None = None  # layer -> chosen points (rows, N, 2): image, then matched query
    piloted: dict[int, Tensor] | None = None  # layer -> chosen points (rows, N, 2): image, group, object
    candidates: Tensor | None = None  # (B, oversampled N, 2): what every mask of an image chooses from
    uniform: Tensor | None = None  # (B, N - chosen, 2): what every mask of an image takes besides


@dataclass(frozen=True)
class Criterion:
    """Settings of the losses."""

    model: ModelConfig
    toggles: Toggles
    classes: int

    def class_weight(self) -> Tensor:
        weight = torch.ones(self.classes + 1)
        weight[-1] = self.model.no_object_weight
        return weight

    def __call__(
        self,
        out: DirectOutput,
        targets: list[Target],
        points: Points | None = None,
        given: dict[int, list[tuple[Tensor, Tensor]]] | None = None,
    ) -> tuple[dict[str, Tensor], dict[int, list[tuple[Tensor, Tensor]]]]:
        """Losses by name and the matching of every layer (9 is the last of a 9-layer decoder), unless it is given."""
        points = points or Points()
        last = len(out.logits) - 1
        losses: dict[str, Tensor] = {}
        matches: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for layer in [last, *range(last)]:
            end = "" if layer == last else f"_{layer}"
            matches[layer] = self.match(out, targets, points, layer) if given is None else given[layer]
            for name, value in self._matching_part(out, targets, points, layer, matches[layer]).items():
                losses[name + end] = value
            for name, value in self._piloted_part(out, targets, points, layer).items():
                losses[f"{name}_dn{end}"] = value
        return losses, matches

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is differentiated."""
        weights = {"ce": self.model.class_weight, "mask": self.model.mask_weight, "dice": self.model.dice_weight}
        return torch.stack([value * weights[name.split("_")[1]] for name, value in losses.items()]).sum()

    def match(
        self, out: DirectOutput, targets: list[Target], points: Points, layer: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (query, object) of every image at one layer."""
        if points.match is not None:
            where = points.match[layer]
        else:
            where = torch.cat([points.draw(1, self.model.train_points) for _ in targets])
        logits, masks = out.logits[layer][:, out.slots :].detach(), out.masks[layer][:, out.slots :].detach()
        return match_layer(self.model, logits, masks, targets, where)

    def _matching_part(
        self,
        out: DirectOutput,
        targets: list[Target],
        points: Points,
        layer: int,
        pairs: list[tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        logits, masks = out.logits[layer][:, out.slots :], out.masks[layer][:, out.slots :]
        wanted_class = torch.full(logits.shape[:2], self.classes)
        predicted, wanted, owner = [], [], []
        for image, (query, index) in enumerate(pairs):
            wanted_class[image, query] = targets[image].labels[index]
            predicted += [masks[image, q] for q in query]
            wanted += [targets[image].masks[j] for j in index]
            owner += [image] * len(query)
        given = points.matched[layer] if points.matched is not None else None
        count = max(1, sum(len(t.labels) for t in targets))
        ce = F.cross_entropy(logits.transpose(1, 2), wanted_class, self.class_weight())
        return {"loss_ce": ce, **self._masks(predicted, wanted, owner, given, points, count, out.masks[layer])}

    def _piloted_part(self, out: DirectOutput, targets: list[Target], points: Points, layer: int) -> dict[str, Tensor]:
        if not self.toggles.mp_queries or (layer == 0 and not self.toggles.layer0_supervision):
            return {}
        if out.pilot is None:
            return {name: torch.zeros(()) for name in ("loss_ce", "loss_mask", "loss_dice")}
        logits, masks = out.logits[layer][:, : out.slots], out.masks[layer][:, : out.slots]
        padding = self.classes if self.toggles.pilot_padding == "reference" else -100
        wanted_class = torch.full(logits.shape[:2], padding)
        predicted, wanted, owner = [], [], []
        for image, target in enumerate(targets):
            for slot in range(out.slots):
                j = int(out.pilot.slot_object[image, slot])
                if j >= 0:
                    wanted_class[image, slot] = target.labels[j]
                    predicted.append(masks[image, slot])
                    wanted.append(target.masks[j])
                    owner.append(image)
        given = points.piloted[layer] if points.piloted is not None else None
        count = max(1, sum(len(t.labels) for t in targets)) * out.pilot.groups
        ce = F.cross_entropy(logits.transpose(1, 2), wanted_class, self.class_weight())
        return {"loss_ce": ce, **self._masks(predicted, wanted, owner, given, points, count, out.masks[layer])}

    def _masks(
        self,
        predicted: list[Tensor],
        wanted: list[Tensor],
        owner: list[int],
        given: Tensor | None,
        points: Points,
        count: int,
        everything: Tensor,
    ) -> dict[str, Tensor]:
        if not predicted:
            zero = everything.sum() * 0.0
            return {"loss_mask": zero, "loss_dice": zero}
        logits = torch.stack(predicted)
        where = self._uncertain(logits.detach(), points, owner) if given is None else given
        truth = sample(torch.stack(wanted).float(), where)
        values = sample(logits, where)
        bce = F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1).sum() / count
        p = values.sigmoid()
        dice = (1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)).sum() / count
        return {"loss_mask": bce, "loss_dice": dice}

    def _uncertain(self, logits: Tensor, points: Points, owner: list[int]) -> Tensor:
        """PointRend's importance sampling: the most uncertain of many random points, and some random ones."""
        n, total = len(logits), self.model.train_points
        keep = int(self.model.importance_sample_ratio * total)
        if points.candidates is not None:
            candidates = points.candidates[owner]
        else:
            candidates = points.draw(n, int(total * self.model.oversample_ratio))
        uncertainty = -sample(logits, candidates).abs()
        where = torch.stack([candidates[i][uncertainty[i].topk(keep).indices] for i in range(n)])
        if total == keep:
            return where
        rest = points.uniform[owner] if points.uniform is not None else points.draw(n, total - keep)
        return torch.cat([where, rest], dim=1)
