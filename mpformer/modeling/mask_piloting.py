"""Mask piloting (MP-Former, Zhang et al., CVPR 2023, section 3): the paper, alone in one file.

In training, queries made from the ground truth are decoded beside the learnable ones. Their masked attention is
*piloted* by (noised) ground-truth masks instead of their own predictions, their content is the embedding of the
(noised) class, and each has to reconstruct its object, without matching. The learnable queries cannot see them.

Slot layout: object j of an image in group g sits in slot g * N + j, N being the largest object count of the
batch; the other slots of an image are padding. True = blocked in every mask here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mpformer.config.schema import Toggles
from mpformer.modeling.outputs import Targets
from mpformer.modeling.points import uniform

Size = tuple[int, int]


def group_count(toggles: Toggles, largest: int) -> int:
    """Groups of a batch whose largest object count is ``largest`` (at least 1)."""
    groups = toggles.mp_groups
    return groups if isinstance(groups, int) else max(1, int(groups.removeprefix("budget-")) // largest)


def is_guided(toggles: Toggles, layer: int) -> bool:
    """Whether a decoder layer attends through ground-truth masks."""
    if toggles.guided_layers == "every":
        return True
    return layer < (1 if toggles.guided_layers == "first" else int(toggles.guided_layers.removeprefix("first-")))


@dataclass(frozen=True)
class PilotNoise:
    """Noised values given from outside, for comparisons: nothing is drawn for what is given."""

    masks: Sequence[Tensor | None] | None = None
    """Per decoder layer (B, P, h*w) bool."""
    labels: Tensor | None = None
    """(groups * all objects,): group-major, then image, then object."""


@dataclass(frozen=True)
class PilotBatch:
    """The piloted part of one batch: everything that the decoder and the criterion need of it."""

    content: Tensor
    """(B, P, hidden) query content; 0 in padding slots."""
    real: Tensor
    """(B, P) bool: the slot holds an object."""
    groups: int
    labels: Tensor
    """(B, P) class ids that were embedded (noised); 0 in padding slots."""
    self_attention: Tensor
    """(1 or B, P+Q, P+Q) bool: the row query may not read the column query."""
    layer_masks: tuple[Tensor | None, ...]
    """Per decoder layer (B, P, h*w) bool, None where a layer is not guided."""
    toggles: Toggles

    @property
    def slots(self) -> int:
        """P, the number of piloted slots."""
        return self.real.shape[1]

    def attention(self, layer: int, size: Size) -> Tensor | None:
        """Return the cross-attention mask (B, P, h*w) of a layer that attends at ``size``; None: not guided."""
        mask = self.layer_masks[layer]
        assert mask is None or mask.shape[-1] == size[0] * size[1], f"layer {layer} does not attend at {size}"
        return mask

    def feed(self, layer: int, queries: Tensor) -> Tensor:
        """Add the content again to the piloted queries (B, P+Q, hidden) where the toggle asks for it."""
        if layer == 0 or self.toggles.class_embedding_layers == "first":
            return queries
        return queries + F.pad(self.content.to(queries.dtype), (0, 0, 0, queries.shape[1] - self.slots))


@torch.compiler.disable  # shapes depend on the targets, and a generator is no graph's input
def pilot_batch(
    toggles: Toggles,
    targets: Targets,
    table: Tensor,
    queries: int,
    layer_sizes: Sequence[Size],
    generator: torch.Generator | None,
    noise: PilotNoise | None = None,
) -> PilotBatch | None:
    """Make the piloted part of a batch; None if no image has an object.

    ``table`` (C or 1, hidden) holds the contents, ``queries`` is Q, ``layer_sizes`` the (h, w) that each decoder
    layer attends at. Random numbers come from ``generator``, labels first, then layer by layer; none at zero noise.
    """
    largest = max(targets.counts)
    if largest == 0:
        return None
    noise = noise or PilotNoise()
    groups = group_count(toggles, largest)
    slots = _Slots(targets.counts, groups, table.device)
    labels = noise.labels
    if labels is None:
        labels = flip_labels(targets.all_labels.repeat(groups), toggles.flip_noise, len(table), generator)
    content, slot_labels = _content(toggles, slots, labels.to(table.device), table)
    masks = noise.masks
    if masks is None:
        masks = _layer_masks(toggles, targets, slots, layer_sizes, generator)
    hide_padding = toggles.pilot_padding == "masked" and slots.some_are_padding
    hidden = self_attention_mask(slots.real, groups, queries, hide_padding)
    return PilotBatch(content, slots.real, groups, slot_labels, hidden, tuple(masks), toggles)


class _Slots:
    """Where the objects of a batch sit: flat order is group-major, then image, then object."""

    def __init__(self, counts: Sequence[int], groups: int, device: torch.device) -> None:
        largest = max(counts)
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        index = torch.cat([torch.arange(count) for count in counts])
        slot = torch.arange(groups)[:, None] * largest + index
        self.groups = groups
        self.some_are_padding = min(counts) < largest
        self._shape = (len(counts), groups * largest)
        self._places = (image * groups * largest + slot).flatten().to(device, non_blocking=True)

    def place(self, values: Tensor, padding: float) -> Tensor:
        """Put values (groups * objects, ...) into slots (B, P, ...); padding slots get ``padding``."""
        placed = values.new_full((self._shape[0] * self._shape[1], *values.shape[1:]), padding)
        return placed.index_copy(0, self._places, values).unflatten(0, self._shape)

    @cached_property
    def real(self) -> Tensor:
        """(B, P) bool: the slot holds an object."""
        return self.place(torch.ones_like(self._places, dtype=torch.bool), False)


def _content(toggles: Toggles, slots: _Slots, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    rows = labels if toggles.class_embedding == "label" else torch.zeros_like(labels)
    return slots.place(table[rows], 0.0), slots.place(labels, 0)


def self_attention_mask(real: Tensor, groups: int, queries: int, hide_padding: bool) -> Tensor:
    """Who may not read whom, (1 or B, P+Q, P+Q), piloted slots first.

    Matching queries read no piloted slot and groups do not read each other; piloted slots read all matching queries.
    ``real`` is (B, P); with ``hide_padding`` nothing reads a padding slot, which then differs per image.
    """
    slots = real.shape[1]
    group = torch.arange(slots, device=real.device) // (slots // groups)
    mask = torch.zeros(slots + queries, slots + queries, dtype=torch.bool, device=real.device)
    mask[slots:, :slots] = True
    mask[:slots, :slots] = group[:, None] != group
    if not hide_padding:
        return mask[None]
    return mask | F.pad(~real, (0, queries))[:, None]


def flip_labels(labels: Tensor, flip_noise: float, classes: int, generator: torch.Generator | None) -> Tensor:
    """Replace each label, with probability ``flip_noise``, by a uniform draw over all classes, its own included."""
    if flip_noise == 0:
        return labels
    chosen, drawn = uniform((2, len(labels)), generator, labels.device)
    replacement = (drawn * classes).long().clamp(max=classes - 1)
    return torch.where(chosen < flip_noise, replacement, labels)


def _layer_masks(
    toggles: Toggles,
    targets: Targets,
    slots: _Slots,
    layer_sizes: Sequence[Size],
    generator: torch.Generator | None,
) -> list[Tensor | None]:
    objects = targets.all_masks
    noisy = toggles.point_noise > 0
    shared: dict[Size, Tensor] = {}
    clean: dict[Size, Tensor] = {}
    masks: list[Tensor | None] = []
    for layer, size in enumerate(layer_sizes):
        if not is_guided(toggles, layer):
            masks.append(None)
            continue
        if size not in shared or (noisy and toggles.redraw == "layer"):
            blocked = _noised(toggles, objects, slots.groups, size, clean, generator)
            shared[size] = slots.place(blocked.flatten(1), True)
        masks.append(shared[size])
    return masks


def _noised(
    toggles: Toggles,
    objects: Tensor,
    groups: int,
    size: Size,
    clean: dict[Size, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """Attention masks (groups * objects, h, w) of objects (n, H, W) at a size, with a fresh draw of the noise."""
    if toggles.point_noise > 0 and toggles.mask_noise != "point":
        moved = move_masks(objects.repeat(groups, 1, 1), toggles.point_noise, toggles.mask_noise, generator)
        return blocked_cells(moved, size)
    if size not in clean:
        clean[size] = blocked_cells(objects, size).repeat(groups, 1, 1)
    return flip_points(clean[size], toggles.point_noise, generator)


def blocked_cells(masks: Tensor, size: Size) -> Tensor:
    """Reduce masks (n, H, W) to cells: blocked where the area average is 0, so that masks only grow; (n, h, w)."""
    n, (height, width) = len(masks), masks.shape[-2:]
    if height % size[0] == 0 and width % size[1] == 0:
        cells = masks.view(n, size[0], height // size[0], size[1], width // size[1])
        return ~cells.any(dim=4).any(dim=2)
    return F.adaptive_avg_pool2d(masks.float(), size) <= 1e-8


def flip_points(blocked: Tensor, point_noise: float, generator: torch.Generator | None) -> Tensor:
    """Flip each cell of masks (n, h, w) with probability min(1, point_noise * open cells / all cells)."""
    if point_noise == 0:
        return blocked
    probability = (~blocked).float().mean(dim=(1, 2), keepdim=True) * point_noise
    return blocked ^ (uniform(blocked.shape, generator, blocked.device) < probability)


def move_masks(masks: Tensor, point_noise: float, mask_noise: str, generator: torch.Generator | None) -> Tensor:
    """Shift and/or scale every mask (n, H, W) within its box's proportions (nearest pixel; True = object).

    With r = ``point_noise``, ``shift`` moves each axis by U(-1, 1) * r * half the box; ``scale`` resizes each axis
    about the box centre by U(1 - r, 1 + r), at least 0.05; ``shift-scale`` does both. r = 0 draws nothing.
    """
    if point_noise == 0 or len(masks) == 0:
        return masks
    draws = 2 * uniform((4, len(masks)), generator, masks.device) - 1
    shift = draws[:2] if mask_noise in ("shift", "shift-scale") else torch.zeros_like(draws[:2])
    scale = draws[2:] if mask_noise in ("scale", "shift-scale") else torch.zeros_like(draws[2:])
    rows, rows_inside = _source(masks.any(2), shift[0] * point_noise, scale[0] * point_noise)
    columns, columns_inside = _source(masks.any(1), shift[1] * point_noise, scale[1] * point_noise)
    index = torch.arange(len(masks), device=masks.device)[:, None, None]
    inside = rows_inside[:, :, None] & columns_inside[:, None]
    return masks[index, rows[:, :, None], columns[:, None]] & inside


def _source(occupied: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Where each position of one axis comes from, and whether that lies in the image.

    ``occupied`` (n, length) marks the positions that the mask covers; shift (n,) is in half boxes, scale (n,) the
    relative change of size. Returns indices and validity, both (n, length).
    """
    length = occupied.shape[1]
    position = torch.arange(length, device=occupied.device)
    first = occupied.int().argmax(1)
    last = length - 1 - occupied.flip(1).int().argmax(1)
    centre, half = (first + last) / 2, (last - first + 1) / 2
    source = centre[:, None] + (position - (centre + shift * half)[:, None]) / (1 + scale).clamp(min=0.05)[:, None]
    index = source.round().long()
    return index.clamp(0, length - 1), (index >= 0) & (index < length)
