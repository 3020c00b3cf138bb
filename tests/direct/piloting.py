"""Mask piloting, slot by slot (MP-Former, section 3; conventions of the public implementation).

Slots: object j of an image in group g sits in slot ``g * largest + j``; what an image has too few
objects for is padding. Masks are 1 = blocked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpformer.config.schema import Toggles


@dataclass(frozen=True)
class Target:
    """One image's objects: labels (n,) and boolean masks (n, H, W) at the padded image's size."""

    labels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Pilot:
    """The piloted part of a batch: B images, P = groups x largest slots."""

    groups: int
    largest: int
    slot_is_object: Tensor  # (B, P) bool
    slot_object: Tensor  # (B, P) index into the image's objects, -1: padding
    labels: Tensor  # (n_objects * groups,): group, then image, then object
    slot_label: Tensor  # (B, P), -1: padding

    @property
    def slots(self) -> int:
        return self.groups * self.largest


def group_count(toggles: Toggles, largest: int) -> int:
    """Groups of a batch whose fullest image has ``largest`` objects."""
    if isinstance(toggles.mp_groups, int):
        return toggles.mp_groups
    return max(1, int(toggles.mp_groups.removeprefix("budget-")) // largest)


def guided(toggles: Toggles, layer: int) -> bool:
    """Whether decoder layer ``layer`` (from 0) attends through ground-truth masks."""
    if toggles.guided_layers == "every":
        return True
    first = 1 if toggles.guided_layers == "first" else int(toggles.guided_layers.removeprefix("first-"))
    return layer < first


def make_pilot(toggles: Toggles, targets: list[Target] | None, labels: Tensor | None = None) -> Pilot | None:
    """Lay the objects out in slots; None without piloting or any object. ``labels`` are injected noised labels."""
    if not toggles.mp_queries or not targets or not any(len(t.labels) for t in targets):
        return None
    largest = max(len(t.labels) for t in targets)
    groups = group_count(toggles, largest)
    if labels is None:
        labels = torch.cat([t.labels for _ in range(groups) for t in targets])
    slot_object = torch.full((len(targets), groups * largest), -1)
    slot_label = torch.full((len(targets), groups * largest), -1)
    k = 0
    for group in range(groups):
        for image, target in enumerate(targets):
            for j in range(len(target.labels)):
                slot_object[image, group * largest + j] = j
                slot_label[image, group * largest + j] = labels[k]
                k += 1
    return Pilot(groups, largest, slot_object >= 0, slot_object, labels, slot_label)


def blocked_cells(pilot: Pilot, targets: list[Target], size: tuple[int, int]) -> Tensor:
    """Cross-attention mask of the slots at one level, (B, P, h * w) bool, before fully blocked rows are opened.

    A cell that the object touches at all stays open; a padding slot is blocked everywhere.
    """
    mask = torch.ones(len(targets), pilot.slots, size[0] * size[1], dtype=torch.bool)
    for image, target in enumerate(targets):
        if len(target.masks):
            blocked = F.adaptive_avg_pool2d(target.masks[None].float(), size)[0].flatten(1) <= 1e-8
            real = pilot.slot_is_object[image]
            mask[image, real] = blocked[pilot.slot_object[image, real]]
    return mask


def self_attention_mask(pilot: Pilot, queries: int, hide_padding: bool) -> Tensor:
    """(B, P + Q, P + Q) bool, True where the row must not read the column.

    Matching queries read no slot; groups do not read each other; slots read every matching query.
    With ``hide_padding`` nobody reads a padding slot.
    """
    masks = []
    for real in pilot.slot_is_object.tolist():
        slots = len(real)
        rows = [[False] * (slots + queries) for _ in range(slots + queries)]
        for row in range(slots + queries):
            for column in range(slots):
                other_part = row >= slots or row // pilot.largest != column // pilot.largest
                rows[row][column] = other_part or (hide_padding and not real[column])
        masks.append(torch.tensor(rows))
    return torch.stack(masks)
