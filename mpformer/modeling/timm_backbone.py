"""Backbones of timm (PyTorch Image Models): it builds them, converts their published weights, cuts off what is unused.

A model with stages (ConvNeXt, Swin-V2, EfficientNet and most others) gives a feature per stride. A plain vision
transformer (ViT, DINOv2) has one stride; its last block's output becomes features of every stride through the simple
feature pyramid of ViTDet (Li et al., ECCV 2022, section 3), which detectron2 has. Its patches are of 16 pixels: weights
of other patch sizes, such as DINOv2's 14, are resampled by timm.

*Frozen stages* (``freeze_at``) count as detectron2's: 1 is the stem, everything before the stage that gives stride 4;
each stage adds one. A plain transformer has no stages: its blocks are counted in quarters. What is frozen does not
learn, draws no stochastic depth and updates no statistics of a normalisation. The learning rate multiplier of the
backbone is for timm's parameters; those of the pyramid, which no file has weights of, learn at the full rate.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn

from mpformer.config.schema import TimmConfig
from mpformer.runtime.errors import UserError

PATCH = 16
"""Side of a plain transformer's patches, in pixels."""
PYRAMID_CHANNELS = 256
"""Channels of each feature of the pyramid, as in ViTDet."""

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_EXAMPLES = (
    "timm/convnext_tiny",
    "timm/swinv2_tiny_window8_256",
    "timm/efficientnet_b0",
    "timm/vit_small_patch14_dinov2",
)
_CLASSIFIER = re.compile(r"(head|classifier|fc)(\.fc)?\.(weight|bias)")
"""A classifier in the files that timm and the models' authors publish."""

Body = Any
"""timm's ``FeatureGetterNet``: maps images to a list of features, and knows their strides and channels."""


def build_timm(config: TimmConfig, names: Sequence[str]) -> Backbone:
    """Build a timm model as a backbone with the named outputs.

    Raises UserError if timm is not installed, has no such model, or the model gives no features at these strides.
    """
    return (Pyramid if _layout(config, names).plain else Stages)(config, names)


class Stages(Backbone):
    """A timm model with a feature per stride."""

    def __init__(self, config: TimmConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.config, self.layout = config, _layout(config, names)
        self.body = _create(config, self.layout.options)
        self._frozen = _freeze(self.body.model, self.layout, config.freeze_at)
        self._out_features = list(names)
        self._out_feature_strides = {name: _STRIDES[name] for name in names}
        self._out_feature_channels = dict(zip(names, self.body.feature_info.channels(), strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to features by name, each (B, C_i, H/s, W/s)."""
        return dict(zip(self._out_features, self.body(images), strict=True))

    def train(self, mode: bool = True) -> "Stages":
        """Switch to training or evaluation; frozen stages stay in evaluation."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a whole timm model under this module's names, as timm converts what it publishes.

        Raises UserError if they are another model's: a tensor is missing, unexpected or of another shape.
        """
        kept = {name: value for name, value in state.items() if not _CLASSIFIER.fullmatch(name)}
        overlay = {"state_dict": kept, "classifier": None}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                loaded = _create(self.config, self.layout.options, pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, LookupError, ValueError, AssertionError, AttributeError) as error:
            raise UserError(f"not the weights of {self.config.name}: {_line(error)}") from None
        return {f"body.{name}": value for name, value in loaded.state_dict().items()}


class Pyramid(SimpleFeaturePyramid):
    """A plain vision transformer of timm under the simple feature pyramid."""

    def __init__(self, config: TimmConfig, names: Sequence[str]) -> None:
        strides = {name: _STRIDES[name] for name in names}
        scales = [PATCH / stride for stride in strides.values()]
        super().__init__(Stages(config, ("res4",)), "res4", PYRAMID_CHANNELS, scales)
        self._out_features = list(names)
        self._out_feature_strides = strides
        self._out_feature_channels = dict.fromkeys(names, PYRAMID_CHANNELS)

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a whole timm model under this module's names; see :meth:`Stages.converted`."""
        return {f"net.{name}": value for name, value in self.net.converted(state).items()}


@dataclass(frozen=True)
class _Layout:
    """What a model is made of, found without giving it memory."""

    options: Mapping[str, Any]
    """What timm is asked for besides the configuration's own arguments."""
    start: str
    """The first module after the stem."""
    ends: tuple[str, ...]
    """The module that ends each stage, fine first; of a plain transformer, the block that ends each quarter."""
    plain: bool
    """One stride throughout: a plain vision transformer."""


def _layout(config: TimmConfig, names: Sequence[str]) -> _Layout:
    return _look(config.name, json.dumps(config.arguments, sort_keys=True), tuple(names))


@functools.cache
def _look(name: str, arguments: str, names: tuple[str, ...]) -> _Layout:
    config = TimmConfig(name=name, arguments=json.loads(arguments))
    with torch.device("meta"):
        body = _first(config)
    takes_any_size = "dynamic_img_size" in signature(type(body.model).__init__).parameters
    options = {"dynamic_img_size": True} if takes_any_size else {}
    strides, modules = body.feature_info.reduction(), body.feature_info.module_name()
    if len(strides) > 1 and len(set(strides)) == 1:
        blocks, _, last = modules[-1].rpartition(".")
        ends = tuple(f"{blocks}.{math.ceil((int(last) + 1) * part / 4) - 1}" for part in (1, 2, 3, 4))
        layout = _Layout({**options, "patch_size": PATCH, "out_indices": 1}, f"{blocks}.0", ends, plain=True)
    else:
        at = {stride: index for index, stride in enumerate(strides)}
        if any(_STRIDES[feature] not in at for feature in names):
            raise _unusable(name, f"its features have strides {', '.join(map(str, strides))}")
        indices = [at[_STRIDES[feature]] for feature in names]
        ends = tuple(modules[index] for index in indices)
        layout = _Layout({**options, "out_indices": indices}, modules[at[_STRIDES["res2"]]], ends, plain=False)
    _try(config, layout, names)
    return layout


def _first(config: TimmConfig) -> Body:
    """The model as timm gives it; raises UserError if it is unknown, has no features or refuses its arguments."""
    timm, model = _timm(config.name), config.name.removeprefix("timm/")
    if not timm.is_model(model):
        near = get_close_matches(model, timm.list_models(), n=4, cutoff=0.5)
        valid = ", ".join(f"timm/{other}" for other in near) or f"those of timm {timm.__version__}, timm.list_models()"
        raise UserError(f"unknown timm model {config.name!r}; nearest: {valid}")
    try:
        return _create(config, {})
    except Exception as error:  # whatever this model's code raises
        if config.arguments:
            given = json.dumps(config.arguments)
            raise UserError(
                f"{config.name} cannot be made with model.backbone.arguments {given}: {_line(error)}"
            ) from None
        raise _unusable(config.name, _line(error)) from None


def _create(config: TimmConfig, options: Mapping[str, Any], **more: Any) -> Body:
    drop = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    return _timm(config.name).create_model(
        config.name.removeprefix("timm/"),
        **{"features_only": True, "feature_cls": "getter", "num_classes": 0, **drop, **options},
        **config.arguments,
        **more,
    )


def _try(config: TimmConfig, layout: _Layout, names: Sequence[str]) -> None:
    """Raise UserError unless the model gives its features for images of any size, tried without memory."""
    sides = [_STRIDES[names[-1]] * odd for odd in (3, 5)]
    strides = [PATCH] if layout.plain else [_STRIDES[name] for name in names]
    try:
        with torch.device("meta"), torch.no_grad():
            found = _create(config, layout.options).eval()(torch.empty(1, 3, *sides))
    except Exception as error:  # whatever this model's code raises
        raise _unusable(config.name, _line(error)) from None
    sizes = [tuple(maps.shape[2:]) for maps in found]
    if sizes != [tuple(side // stride for side in sides) for stride in strides]:
        raise _unusable(config.name, f"of an image of {sides[0]} x {sides[1]} it makes features of {sizes}")


def _freeze(model: nn.Module, layout: _Layout, freeze_at: int) -> list[nn.Module]:
    """Stop learning in the stem and the first ``freeze_at - 1`` stages; returns the modules that this froze."""
    if not freeze_at:
        return []
    names = [name for name, _ in model.named_modules() if name]
    if freeze_at == 1:
        last, count = layout.start, names.index(layout.start)
    else:
        last = layout.ends[min(freeze_at - 1, len(layout.ends)) - 1]
        count = 1 + max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{last}."))
    whole = [name for name in names[:count] if not last.startswith(f"{name}.")]
    frozen = [model] if freeze_at == _ALL else [model.get_submodule(name) for name in whole]
    for parameter in (*model.parameters(recurse=False), *(p for module in frozen for p in module.parameters())):
        parameter.requires_grad_(False)
    return frozen


_ALL = 5
"""``freeze_at`` of everything: stem and four stages."""


def _timm(wanted: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"backbone {wanted} needs timm, which is not installed: pip install timm") from None
    return timm


def _unusable(name: str, why: str) -> UserError:
    return UserError(
        f"{name} has no features that a backbone here can give ({why}); valid: models with features at strides 4, 8, "
        f"16, 32 and plain vision transformers, for images of any size, such as {', '.join(_EXAMPLES)}"
    )


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
