"""What the scores of decoder layers are made of, counted in one pass over an image without a mask being kept.

AP needs of a detection its area, the pixels that it shares with each object and its mean probability; panoptic quality
the pixels that each query wins of each true segment; mIoU a confusion matrix. All are sums over pixels, so that they
are added up tile by tile, for several layers at once, on the model's device. What is alive at once is some
``_PIXELS`` values of tiles and, of an image whose mask logits of all layers are few enough, these
(:data:`mpformer.evaluation.layer_pass.KEPT_LOGITS`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mpformer.evaluation.layer_pass import KEPT_LOGITS, ImageOutput
from mpformer.evaluation.resized_tiles import Tile, tiles
from mpformer.evaluation.scoring.from_counts import Detected, LayerCounts, Owned, TruthMaps
from mpformer.modeling.inference import InferenceSettings, best_pairs, confident

#: values of one tile of all masks that are alive at once: on a CPU what stays in the cache
_PIXELS = {"cpu": 1 << 19}
_MANY_PIXELS = 1 << 27


@torch.no_grad()
def count_layers(image: ImageOutput, layers: range, truth: TruthMaps) -> Iterator[LayerCounts]:
    """Count an image's predictions at some layers, ``layers`` in order, by Mask2Former's inference rules.

    The rules are those of :mod:`mpformer.modeling.inference`; a test holds the two equal.
    """
    settings, device = image.model.inference, image.output.logits.device
    output = (image.truth.height, image.truth.width)
    # for semantics alone Mask2Former resizes the class map, not the masks
    late = not (settings.instance or settings.panoptic)
    plan = tiles(image.mask_cells, image.padded, image.size, output, device, late)
    maps = _DeviceMaps.of(truth, device)
    step = _layers_at_a_time(image, plan, dense=settings.semantic)
    for start in range(layers.start, layers.stop, step):
        stop = min(start + step, layers.stop)
        counter = _Counter(settings, image.output.logits[start:stop, image.index].float(), maps)
        masks = image.mask_logits(start, stop).flatten(0, 1)
        for rows, row in groupby(plan, key=lambda tile: tile.source_rows):
            highest = masks[:, rows].amax(1)
            for tile in row:
                counter.add(tile, masks, highest[:, tile.source_columns].amax(1) > 0)
        yield from counter.counts()


def _layers_at_a_time(image: ImageOutput, plan: Sequence[Tile], dense: bool) -> int:
    """Layers whose mask logits may be alive at once; dense: all masks of a tile are needed, too."""
    queries, device = image.output.logits.shape[2], image.output.logits.device
    cells = image.mask_cells[0] * image.mask_cells[1]
    most = KEPT_LOGITS // (queries * cells)
    if dense:
        largest = max((tile.down.shape[0] * tile.across.shape[1] for tile in plan), default=1)
        most = min(most, _PIXELS.get(device.type, _MANY_PIXELS) // (largest * queries))
    return max(1, most)


@dataclass(frozen=True)
class _DeviceMaps:
    """:class:`TruthMaps` on the model's device, with the number of true segments."""

    objects: Tensor | None
    segments: Tensor | None
    segment_count: int
    classes: Tensor | None

    @classmethod
    def of(cls, truth: TruthMaps, device: torch.device) -> "_DeviceMaps":
        def moved(values: NDArray[np.generic] | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).to(device)

        count = 0 if truth.segment_ids is None else len(truth.segment_ids)
        return cls(moved(truth.objects), moved(truth.segments), count, moved(truth.classes))


class _Counter:
    """Adds up tiles of A layers; logits (A, Q, C + 1)."""

    def __init__(self, settings: InferenceSettings, logits: Tensor, truth: _DeviceMaps) -> None:
        self.instance = None if truth.objects is None else _Instances(settings, logits, truth.objects)
        self.panoptic = None if truth.segments is None else _Panoptic(settings, logits, truth)
        self.semantic = None if truth.classes is None else _Semantic(logits, truth.classes)
        self.layers = len(logits)

    def add(self, tile: Tile, masks: Tensor, reaching: Tensor) -> None:
        """Add one tile of the layers' masks (A · Q, h, w), of which some are positive near it: reaching (A · Q,)."""
        source, rows = tile.source(masks), None
        if self.semantic is None and self.instance is not None:
            rows = self._rows(reaching)
            source = source.index_select(0, rows)
        values = tile.resized(source).sigmoid_()
        if self.semantic is not None:
            self.semantic.add(tile, values)
        if self.panoptic is not None:
            self.panoptic.add(tile, values, rows)
        if self.instance is not None:
            self.instance.add(tile, values, rows)

    def _rows(self, reaching: Tensor) -> Tensor:
        """The masks (M,) that a tile has to be made of: of detections alone, those that reach into it."""
        assert self.instance is not None
        needed = self.instance.used & reaching
        if self.panoptic is not None:
            needed |= self.panoptic.used
        return needed.nonzero().flatten()

    def counts(self) -> Iterator[LayerCounts]:
        """One value a layer."""
        parts = [
            [None] * self.layers if part is None else part.counts()
            for part in (self.instance, self.panoptic, self.semantic)
        ]
        for instance, panoptic, semantic in zip(*parts, strict=True):
            yield LayerCounts(instance, panoptic, semantic)


class _Instances:
    """Detections of A layers; their masks are those of ``used`` (A · Q,) queries."""

    def __init__(self, settings: InferenceSettings, logits: Tensor, objects: Tensor) -> None:
        self.layers, self.queries = logits.shape[:2]
        self.pairs = best_pairs(settings, logits)
        self.kept = torch.ones_like(self.pairs[2], dtype=torch.bool)
        if settings.panoptic:  # Mask2Former then lists things alone
            self.kept = torch.isin(self.pairs[2], torch.tensor(sorted(settings.things), device=logits.device))
        used = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        self.used = used.scatter_(1, self.pairs[1], True).flatten()
        self.objects = objects
        # probability inside, pixels, pixels shared with each object; a tile's sums are exact in float32
        self.sums = logits.new_zeros(len(self.used), 2 + len(objects), dtype=torch.float64)

    def add(self, tile: Tile, values: Tensor, rows: Tensor | None) -> None:
        """Add a tile of probabilities (M, p) of the masks ``rows`` (M,), None: of all."""
        objects = self.objects[:, tile.rows, tile.columns].flatten(1).float()
        inside = F.threshold(values, 0.5, 0.0)
        probability = inside.sum(1, keepdim=True)
        inside.ceil_()
        sums = torch.cat([probability, inside.sum(1, keepdim=True), inside @ objects.T], 1).double()
        if rows is None:
            self.sums += sums
        else:
            self.sums.index_add_(0, rows, sums)

    def counts(self) -> list[Detected]:
        """One value a layer."""
        scores, queries, _ = self.pairs
        sums = self.sums.unflatten(0, (self.layers, self.queries))
        sums = sums[torch.arange(self.layers, device=queries.device)[:, None], queries]
        scores = scores * (sums[..., 0] / (sums[..., 1] + 1e-6)).float()
        values = (*self.pairs[1:], scores, sums[..., 1].long(), sums[..., 2:].long(), self.kept)
        return [
            Detected(*(part[keep] for part in parts))
            for *parts, keep in zip(*(value.cpu().numpy() for value in values), strict=True)
        ]


class _Panoptic:
    """Who owns each pixel, in A layers of at most K confident queries each."""

    def __init__(self, settings: InferenceSettings, logits: Tensor, truth: _DeviceMaps) -> None:
        assert truth.segments is not None
        sure = confident(settings, logits)
        self.numbers = sure.sum(1)
        # the confident queries first, in their order, then others that never win
        self.chosen = (~sure).sort(dim=1, stable=True).indices[:, : max(1, int(self.numbers.max()))]
        scores, classes = logits.softmax(-1).max(-1)
        self.classes = classes.gather(1, self.chosen)
        self.scores = torch.where(sure, scores, -1.0).gather(1, self.chosen)
        self.layers, self.most = self.chosen.shape
        first = torch.arange(self.layers, device=logits.device)[:, None]
        self.places = first * logits.shape[1] + self.chosen
        self.used = sure.flatten().clone()
        self.used[self.places.flatten()] = True
        self.segments, self.segment_count = truth.segments, truth.segment_count
        self.first = first * self.most
        self.pixels = logits.new_zeros(self.layers * self.most * 2 * self.segment_count, dtype=torch.int64)
        self.whole = torch.zeros_like(self.classes)

    def add(self, tile: Tile, values: Tensor, rows: Tensor | None) -> None:
        """Add a tile of probabilities (M, p) of the masks ``rows`` (M,), None: of all."""
        places = self.places
        if rows is not None:
            place = torch.empty_like(self.used, dtype=torch.int64)
            place[rows] = torch.arange(len(rows), device=rows.device)
            places = place[places]
        masks = values.index_select(0, places.flatten()).unflatten(0, self.chosen.shape)
        owner = first_best(masks * self.scores[..., None])
        inside = masks.gather(1, owner[:, None])[:, 0] >= 0.5
        true = self.segments[tile.rows, tile.columns].flatten()
        flat = ((self.first + owner) * 2 + inside) * self.segment_count + true
        self.pixels += torch.bincount(flat.flatten(), minlength=len(self.pixels))
        self.whole += reaches(masks, 0.5).sum(-1).long()

    def counts(self) -> list[Owned]:
        pixels = self.pixels.view(self.layers, self.most, 2, self.segment_count).cpu().numpy()
        classes, whole = self.classes.cpu().numpy(), self.whole.cpu().numpy()
        numbers = enumerate(self.numbers.tolist())
        return [Owned(classes[a, :n], whole[a, :n], pixels[a, :n]) for a, n in numbers]


class _Semantic:
    """Confusion matrices of A layers."""

    def __init__(self, logits: Tensor, classes: Tensor) -> None:
        self.probability = logits.softmax(-1)[..., :-1].transpose(1, 2).contiguous()
        self.layers, self.number, self.queries = self.probability.shape
        self.classes = classes
        self.first = torch.arange(self.layers, device=logits.device)[:, None] * self.number
        self.pixels = logits.new_zeros(self.layers * self.number * (self.number + 1), dtype=torch.int64)

    def add(self, tile: Tile, values: Tensor) -> None:
        """Add a tile of probabilities (A · Q, p) of all masks."""
        sums = self.probability @ values.view(self.layers, self.queries, -1)
        predicted = first_best(tile.resized_again(sums))
        true = self.classes[tile.rows, tile.columns].flatten()
        flat = (self.first + predicted) * (self.number + 1) + true
        self.pixels += torch.bincount(flat.flatten(), minlength=len(self.pixels))

    def counts(self) -> list[NDArray[np.int64]]:
        return list(self.pixels.view(self.layers, self.number, self.number + 1).cpu().numpy())


def first_best(values: Tensor) -> Tensor:
    """``values.argmax(1)`` of (A, N, p), the first of equal ones; faster along memory that is not the last."""
    number = values.shape[1]
    falling = torch.arange(number, 0, -1, device=values.device, dtype=values.dtype)[:, None]
    best = reaches(values, values.amax(1, keepdim=True)).mul_(falling)
    return number - best.amax(1).long()


def reaches(values: Tensor, bound: Tensor | float) -> Tensor:
    """``values >= bound`` as 0 and 1 of the values' type: on CPUs many times faster than by way of bool."""
    return torch.ge(values, bound, out=torch.empty_like(values))
