"""The three implementations, cut into the same stages: backbone, pixel decoder, decoder, matching, losses."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from benchmarks.settings import MASK2FORMER, Setting, settle
from mpformer.config.schema import Toggles
from mpformer.modeling import matcher as product_matcher
from mpformer.modeling.backbones import strides_of
from mpformer.modeling.mask_piloting import PilotBatch, PilotNoise
from mpformer.modeling.meta_arch import MPFormer
from mpformer.modeling.pixel_decoder import PixelFeatures
from tests.direct import matcher as direct_matcher
from tests.direct.decoder import DirectOutput
from tests.direct.model import DirectMPFormer, Features
from tests.support.paired_models import Drawn, noise_of, pair
from tests.support.transformers_peer import build_peer, load_ours

Maps = dict[Any, Tensor]
Pixels = tuple[Tensor, ...]  # mask features, then the attention levels, coarse first

STAGES = ("backbone", "pixel decoder", "decoder", "matching", "losses")
BACKWARD = ("backward: decoder and losses", "backward: pixel decoder", "backward: backbone")


class Path(ABC):
    """One implementation with its weights, on one batch."""

    name: str
    model: nn.Module
    images: Tensor

    @abstractmethod
    def backbone(self) -> Maps: ...

    @abstractmethod
    def pixel_decoder(self, maps: Maps) -> Pixels: ...

    @abstractmethod
    def decoder(self, pixels: Pixels) -> Any:
        """All heads, the piloted part included."""

    @abstractmethod
    def matching(self, output: Any) -> Any: ...

    @abstractmethod
    def losses(self, output: Any, matching: Any) -> Tensor:
        """The weighted total, a scalar."""

    @abstractmethod
    def final(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """Evaluation: the last head's class logits (B, Q, C + 1) and mask logits (B, Q, h, w)."""


class DirectPath(Path):
    name = "direct"
    model: DirectMPFormer

    def __init__(self, model: DirectMPFormer, batch: list[dict[str, Any]], drawn: Drawn, noise: PilotNoise) -> None:
        self.model, self.drawn = model, drawn
        images = [item["image"] for item in batch]
        found = [item["instances"] for item in batch]
        self.images = model.batch(images)
        self.targets = model.targets(images, [f.gt_classes for f in found], [f.gt_masks for f in found])
        self.masks = {i: m for i, m in enumerate(noise.masks or ()) if m is not None}
        self.labels = noise.labels

    def backbone(self) -> Maps:
        return {int(2 ** int(name[3:])): x for name, x in self.model.backbone(self.images).items()}

    def pixel_decoder(self, maps: Maps) -> Pixels:
        mask_features, levels = self.model.sem_seg_head.pixel_decoder(maps)
        return (mask_features, *levels)

    def decoder(self, pixels: Pixels) -> DirectOutput:
        features = Features({}, pixels[0], list(pixels[1:]))
        return self.model.decode(features, self.targets, self.masks, self.labels)

    def matching(self, output: DirectOutput) -> Any:
        points = self.drawn.direct()
        return {i: self.model.loss.match(output, self.targets, points, i) for i in range(len(output.logits))}

    def losses(self, output: DirectOutput, matching: Any) -> Tensor:
        found, _ = self.model.loss(output, self.targets, self.drawn.direct(), matching)
        return self.model.loss.total(found)

    def final(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        output = self.model.decode(Features({}, pixels[0], list(pixels[1:])))
        return output.logits[-1], output.masks[-1]


class ProductPath(Path):
    name = "product"
    model: MPFormer

    def __init__(self, model: MPFormer, batch: list[dict[str, Any]], drawn: Drawn | None, seed: int = 0) -> None:
        """With ``drawn`` unset the model draws its own points, as in training."""
        self.model, self.drawn, self.seed = model, drawn, seed
        prepared = model.preprocess(batch)
        self.images, self.targets = prepared.tensor, model.targets(batch, prepared)
        self.pilot: PilotBatch | None = None

    def backbone(self) -> Maps:
        features = self.model.backbone(self.images)
        return {stride: features[name] for stride, name in strides_of(self.model.backbone).items()}

    def pixel_decoder(self, maps: Maps) -> Pixels:
        pixels = self.model.sem_seg_head.pixel_decoder(maps)
        return (pixels.mask_features, *pixels.levels)

    def decoder(self, pixels: Pixels) -> Any:
        features = PixelFeatures(pixels[0], pixels[1:])
        self.pilot = self.model.pilot(self.targets, features, torch.Generator().manual_seed(self.seed))
        return self.model.sem_seg_head.predictor(features, self.pilot)

    def matching(self, output: Any) -> Any:
        points, settings = self.points(output), self.model.criterion.settings
        return points, product_matcher.match(output, self.targets, points.matching, settings.weights)

    def losses(self, output: Any, matching: Any) -> Tensor:
        points, pairs = matching
        criterion = self.model.criterion
        found = criterion(output, self.targets, self.pilot, points, pairs)
        return torch.stack(list(criterion.weighted(found).values())).sum()

    def points(self, output: Any) -> Any:
        if self.drawn is not None:
            return self.drawn.product()
        cells = output.mask_features.shape[-2:]
        generator = torch.Generator().manual_seed(self.seed)
        return product_draw(self.model, len(self.images), cells, generator)

    def final(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        output = self.model.sem_seg_head.predictor(PixelFeatures(pixels[0], pixels[1:]))
        return output.logits[-1], output.masks(-1)


def product_draw(model: MPFormer, batch: int, cells: Any, generator: torch.Generator) -> Any:
    """Points as the product draws them in training."""
    from mpformer.modeling.points import draw_points

    return draw_points(model.criterion.settings.points, batch, tuple(cells), generator, torch.device("cpu"))


class PeerPath(Path):
    """transformers' Mask2Former; draws its own points."""

    name = "transformers"
    model: Mask2FormerForUniversalSegmentation

    def __init__(self, setting: Setting, state: dict[str, Tensor], direct: DirectPath) -> None:
        self.model = build_peer(setting.config.model, setting.classes)
        with torch.no_grad():
            load_ours(self.model, state)
        self.images = direct.images
        self.masks = [t.masks.float() for t in direct.targets]
        self.labels = [t.labels for t in direct.targets]

    def backbone(self) -> Maps:
        maps = self.model.model.pixel_level_module.encoder(self.images).feature_maps
        return dict(zip((4, 8, 16, 32), maps, strict=True))

    def pixel_decoder(self, maps: Maps) -> Pixels:
        out = self.model.model.pixel_level_module.decoder(list(maps.values()))
        return (out.mask_features, *out.multi_scale_features)

    def decoder(self, pixels: Pixels) -> Any:
        out = self.model.model.transformer_module(
            multi_scale_features=list(pixels[1:]), mask_features=pixels[0], output_hidden_states=True
        )
        logits = [self.model.class_predictor(x.transpose(0, 1)) for x in out.intermediate_hidden_states]
        return logits, out.masks_queries_logits

    def matching(self, output: Any) -> Any:
        return [
            self.model.criterion.matcher(masks, logits, self.masks, self.labels)
            for logits, masks in [(output[0][-1], output[1][-1]), *zip(output[0][:-1], output[1][:-1], strict=True)]
        ]

    def losses(self, output: Any, matching: Any) -> Tensor:
        logits, masks = output
        auxiliary = self.model.get_auxiliary_logits(logits, masks)
        with self._replayed(matching):
            found = self.model.get_loss_dict(masks[-1], logits[-1], self.masks, self.labels, auxiliary)  # type: ignore[arg-type]
        return self.model.get_loss(found)

    @contextmanager
    def _replayed(self, matching: Any) -> Iterator[None]:
        """Let its criterion find the matching that was timed before."""
        criterion, given = self.model.criterion, iter(matching)
        own = criterion.matcher
        criterion.matcher = _Replay(given)  # type: ignore[assignment]  # a stand-in for this one call
        try:
            yield
        finally:
            criterion.matcher = own

    def final(self, pixels: Pixels) -> tuple[Tensor, Tensor]:
        logits, masks = self.decoder(pixels)
        return logits[-1], masks[-1]


class _Replay(nn.Module):
    def __init__(self, given: Iterator[Any]) -> None:
        super().__init__()
        self.given = given

    def forward(self, *_: Any) -> Any:
        return next(self.given)


def build(setting: Setting, toggles: Toggles, drawn: Drawn) -> tuple[DirectPath, ProductPath]:
    """Direct and product path with the same weights, points and noise."""
    direct, product = pair(setting.with_toggles(toggles), setting.classes)
    state = settle(product.state_dict())
    product.load_state_dict(state)
    direct.load_state_dict(state)
    batch = setting.make_batch()
    fast = ProductPath(product, batch, drawn)
    with torch.no_grad():
        fast.decoder(fast.pixel_decoder(fast.backbone()))
    return DirectPath(direct, batch, drawn, noise_of(fast.pilot)), fast


def build_peer_path(setting: Setting, direct: DirectPath) -> PeerPath | None:
    """The peer, where it exists: it has attention strides 32, 16, 8 and bottleneck ResNets only."""
    if setting.config.model.attention_strides != (32, 16, 8) or direct.model.toggles != MASK2FORMER:
        return None
    return PeerPath(setting, direct.model.state_dict(), direct)


def assignment_modules() -> tuple[Any, ...]:
    """Modules whose ``linear_sum_assignment`` solves the assignments."""
    return (direct_matcher, product_matcher)
