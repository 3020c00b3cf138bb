"""Mask piloting (MP-Former, Zhang et al., CVPR 2023, section 3): the paper, alone in one file.

In training, queries made from the ground truth are decoded beside the learnable ones. Their masked attention is
*piloted* by (noised) ground-truth masks instead of their own predictions, their content is the embedding of the
(noised) class, and each has to reconstruct its object, without matching. The learnable queries cannot see them.

Slot layout: object j of an image in group g sits in slot g * N + j, N being the largest object count of the
batch; the other slots of an image are padding. True = blocked in every mask here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpformer.config.schema import Toggles
from mpformer.modeling.outputs import Targets
from mpformer.modeling.points import uniform

Size = tuple[int, int]


@dataclass(frozen=True)
class MaskPilotingConfig:
    """The toggles of mask piloting in the form that the code below reads."""

    guided: int | None = None
    """Layers 0 ... guided - 1 attend through ground-truth masks; None: all."""
    noise_ratio: float = 0.0
    noise: Literal["point", "shift", "scale", "shift-scale"] = "point"
    flip: float = 0.0
    groups: int = 1
    budget: int | None = None
    """Slots to spend: max(1, budget // N) groups, instead of ``groups``."""
    label_content: bool = True
    """Content is the embedding of the label; False: one learnt vector."""
    every_layer_content: bool = False
    """The content is added again to the piloted queries before every later layer."""
    hide_padding: bool = True
    """Nothing attends to padding slots and the loss ignores them; False: as the reference has it."""
    redraw_layers: bool = True
    """Mask noise is drawn per layer; False: once per attention size."""
    layer0_supervision: bool = True

    @classmethod
    def from_toggles(cls, toggles: Toggles) -> "MaskPilotingConfig":
        """Read the toggles of a run."""
        budget = isinstance(toggles.mp_groups, str)
        return cls(
            guided=_guided(toggles.guided_layers),
            noise_ratio=toggles.point_noise,
            noise=toggles.mask_noise,
            flip=toggles.flip_noise,
            groups=1 if isinstance(toggles.mp_groups, str) else toggles.mp_groups,
            budget=int(str(toggles.mp_groups).removeprefix("budget-")) if budget else None,
            label_content=toggles.class_embedding == "label",
            every_layer_content=toggles.class_embedding_layers == "every",
            hide_padding=toggles.pilot_padding == "masked",
            redraw_layers=toggles.redraw == "layer",
            layer0_supervision=toggles.layer0_supervision,
        )

    def groups_for(self, largest: int) -> int:
        """Groups of a batch whose largest object count is ``largest``."""
        return self.groups if self.budget is None else max(1, self.budget // largest)

    def guides(self, layer: int) -> bool:
        """Whether a decoder layer attends through ground-truth masks."""
        return self.guided is None or layer < self.guided


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
    config: MaskPilotingConfig

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
        if layer == 0 or not self.config.every_layer_content:
            return queries
        return queries + F.pad(self.content.to(queries.dtype), (0, 0, 0, queries.shape[1] - self.slots))


@torch.compiler.disable  # shapes depend on the targets, and a generator is no graph's input
def pilot_batch(
    config: MaskPilotingConfig,
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
    groups = config.groups_for(largest)
    slots = _Slots(targets.counts, groups, table.device)
    labels = noise.labels
    if labels is None:
        labels = flip_labels(torch.cat(targets.labels).repeat(groups), config.flip, len(table), generator)
    content, slot_labels = _content(config, slots, labels.to(table.device), table)
    masks = noise.masks
    if masks is None:
        masks = _layer_masks(config, targets, slots, layer_sizes, generator)
    hidden = self_attention_mask(slots.real, groups, queries, config.hide_padding)
    return PilotBatch(content, slots.real, groups, slot_labels, hidden, tuple(masks), config)


class _Slots:
    """Where the objects of a batch sit: flat order is group-major, then image, then object."""

    def __init__(self, counts: list[int], groups: int, device: torch.device) -> None:
        largest = max(counts)
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        index = torch.cat([torch.arange(count) for count in counts])
        group = torch.arange(groups)[:, None]
        self.groups = groups
        self.image = image.repeat(groups).to(device)
        self.slot = (group * largest + index).flatten().to(device)
        real = torch.arange(largest) < torch.tensor(counts)[:, None]
        self.real = real.repeat(1, groups).to(device)

    def place(self, values: Tensor, padding: float) -> Tensor:
        """Put values (groups * objects, ...) into slots (B, P, ...); padding slots get ``padding``."""
        placed = values.new_full((*self.real.shape, *values.shape[1:]), padding)
        return placed.index_put((self.image, self.slot), values)


def _content(config: MaskPilotingConfig, slots: _Slots, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    rows = labels if config.label_content else torch.zeros_like(labels)
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
    if not hide_padding or bool(real.all()):
        return mask[None]
    return mask | F.pad(~real, (0, queries))[:, None]


def flip_labels(labels: Tensor, probability: float, classes: int, generator: torch.Generator | None) -> Tensor:
    """Replace each label with the given probability by a uniform draw over all classes (it may come out the same)."""
    if probability == 0:
        return labels
    chosen, drawn = uniform((2, len(labels)), generator, labels.device)
    replacement = (drawn * classes).long().clamp(max=classes - 1)
    return torch.where(chosen < probability, replacement, labels)


def _layer_masks(
    config: MaskPilotingConfig,
    targets: Targets,
    slots: _Slots,
    layer_sizes: Sequence[Size],
    generator: torch.Generator | None,
) -> list[Tensor | None]:
    objects = torch.cat(targets.masks)
    noisy = config.noise_ratio > 0
    shared: dict[Size, Tensor] = {}
    clean: dict[Size, Tensor] = {}
    masks: list[Tensor | None] = []
    for layer, size in enumerate(layer_sizes):
        if not config.guides(layer):
            masks.append(None)
            continue
        if size not in shared or (noisy and config.redraw_layers):
            blocked = _noised(config, objects, slots.groups, size, clean, generator)
            shared[size] = slots.place(blocked.flatten(1), True)
        masks.append(shared[size])
    return masks


def _noised(
    config: MaskPilotingConfig,
    objects: Tensor,
    groups: int,
    size: Size,
    clean: dict[Size, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """Attention masks (groups * objects, h, w) of objects (n, H, W) at a size, with a fresh draw of the noise."""
    ratio = config.noise_ratio
    if ratio > 0 and config.noise != "point":
        moved = move_masks(objects.repeat(groups, 1, 1), ratio, config.noise, generator)
        return blocked_cells(moved, size)
    if size not in clean:
        clean[size] = blocked_cells(objects, size).repeat(groups, 1, 1)
    return flip_points(clean[size], ratio, generator)


def blocked_cells(masks: Tensor, size: Size) -> Tensor:
    """Reduce masks (n, H, W) to cells: blocked where the area average is 0, so that masks only grow; (n, h, w)."""
    n, (height, width) = len(masks), masks.shape[-2:]
    if height % size[0] == 0 and width % size[1] == 0:
        cells = masks.view(n, size[0], height // size[0], size[1], width // size[1])
        return ~cells.any(dim=4).any(dim=2)
    return F.adaptive_avg_pool2d(masks.float(), size) <= 1e-8


def flip_points(blocked: Tensor, ratio: float, generator: torch.Generator | None) -> Tensor:
    """Flip each cell of masks (n, h, w) with probability min(1, ratio * open cells / all cells)."""
    if ratio == 0:
        return blocked
    probability = (~blocked).float().mean(dim=(1, 2), keepdim=True) * ratio
    return blocked ^ (uniform(blocked.shape, generator, blocked.device) < probability)


def move_masks(masks: Tensor, ratio: float, kind: str, generator: torch.Generator | None) -> Tensor:
    """Shift and/or scale every mask (n, H, W) within its box's proportions (nearest pixel; True = object).

    ``shift`` moves each axis by U(-1, 1) * ratio * half the box; ``scale`` resizes each axis about the box centre by
    U(1 - ratio, 1 + ratio), at least 0.05; ``shift-scale`` does both. Ratio 0 is the identity and draws nothing.
    """
    if ratio == 0 or len(masks) == 0:
        return masks
    draws = 2 * uniform((4, len(masks)), generator, masks.device) - 1
    shift = draws[:2] if kind in ("shift", "shift-scale") else torch.zeros_like(draws[:2])
    scale = draws[2:] if kind in ("scale", "shift-scale") else torch.zeros_like(draws[2:])
    rows, rows_inside = _source(masks.any(2), shift[0] * ratio, scale[0] * ratio)
    columns, columns_inside = _source(masks.any(1), shift[1] * ratio, scale[1] * ratio)
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


def _guided(value: str) -> int | None:
    if value == "every":
        return None
    return 1 if value == "first" else int(value.removeprefix("first-"))
