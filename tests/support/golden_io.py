"""From a golden case to our configuration, weights, inputs, injected points and noise.

Shared by the adapters of the direct implementation (``direct_adapter.py``) and of the product path
(``parity_adapter.py``); knows neither. A case is anything with ``meta``, ``inputs``, ``golden`` and ``state``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpformer.config.schema import Config, DatasetConfig, EvaluationConfig, ModelConfig, ResNetConfig, Toggles

PLAIN = "MultiScaleMaskedTransformerDecoder"
PILOTED = "MultiScaleMaskedTransformerDecoderMaskDN"


class Case(Protocol):
    """What both the comparison script's case and ``golden_rules.GoldenCase`` offer."""

    @property
    def meta(self) -> dict[str, Any]: ...

    @property
    def inputs(self) -> dict[str, np.ndarray]: ...

    @property
    def golden(self) -> dict[str, np.ndarray]: ...

    @property
    def state(self) -> dict[str, np.ndarray]: ...


def model_config(case: Case) -> ModelConfig:
    c = case.meta["config"]
    unsupported = {"pre_norm": False, "dropout": 0.0, "pixel_decoder_norm": "GN", "image_format": "RGB"}
    _refuse_other(c, unsupported)
    b = c["backbone"]
    backbone = ResNetConfig(
        depth=b["depth"],
        stem_channels=b["stem"],
        res2_channels=b["res2"],
        width_per_group=b["width_per_group"],
        norm=b["norm"],
    )
    return ModelConfig(
        backbone=backbone,
        hidden_dim=c["hidden_dim"],
        conv_dim=c["conv_dim"],
        mask_dim=c["mask_dim"],
        heads=c["nheads"],
        encoder_layers=c["enc_layers"],
        encoder_ffn=c["enc_ffn"],
        decoder_layers=c["dec_layers"],
        decoder_ffn=c["dim_feedforward"],
        queries=c["num_queries"],
        size_divisibility=c["size_divisibility"],
        pixel_mean=tuple(c["pixel_mean"]),
        pixel_std=tuple(c["pixel_std"]),
        class_weight=c["class_weight"],
        mask_weight=c["mask_weight"],
        dice_weight=c["dice_weight"],
        no_object_weight=c["no_object_weight"],
        train_points=c["train_num_points"],
        oversample_ratio=c["oversample_ratio"],
        importance_sample_ratio=c["importance_sample_ratio"],
    )


def toggles(case: Case) -> Toggles:
    """The public implementation's keys as our toggles; noise comes from the injected masks and labels."""
    c, meta = case.meta["config"], case.meta
    if c["transformer_decoder"] == PLAIN:
        return Toggles()
    _refuse_other(c, {"transformer_decoder": PILOTED, "head_dn": False, "dn_mode": "points"})
    wanted = int(c.get("num_dn", 1))
    layers = meta.get("gt_mask_layers") if meta.get("mp_active") else None
    guided = "every" if c.get("all_ly_dn", True) else "first-4"
    if layers and len(layers) < c["dec_layers"]:
        guided = f"first-{len(layers)}"
    return Toggles(
        mp_queries=wanted > 0,
        guided_layers=guided,
        mp_groups=f"budget-{wanted}" if wanted >= 100 else max(1, wanted),
        query_position=False,
        pilot_padding="reference",
    )


def full_config(case: Case) -> Config:
    """Model and toggles with the inference thresholds; the dataset is a stand-in without data."""
    c = case.meta["config"]
    evaluation = EvaluationConfig(
        detections=c["detections_per_image"],
        object_mask_threshold=c["object_mask_threshold"],
        overlap_threshold=c["overlap_threshold"],
    )
    return Config(
        dataset=DatasetConfig(name="coco", task="panoptic"),
        model=model_config(case),
        toggles=toggles(case),
        evaluation=evaluation,
    )


def state(case: Case) -> dict[str, Tensor]:
    """The weights of a case: the file's, with the case's own additions, without a label embedding nobody uses."""
    weights = dict(case.state)
    for key, value in case.inputs.items():
        if key.startswith("extra_state/"):
            weights[key.removeprefix("extra_state/")] = value
    if not toggles(case).mp_queries:
        weights = {k: v for k, v in weights.items() if ".label_enc." not in k}
    return {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}


def images(case: Case) -> list[Tensor]:
    return [torch.from_numpy(x) for x in _numbered(case, "image/")]


def labels(case: Case) -> list[Tensor]:
    return [torch.from_numpy(x).long() for x in _numbered(case, "gt_labels/")]


def masks(case: Case) -> list[Tensor]:
    return [torch.from_numpy(x).bool() for x in _numbered(case, "gt_masks/")]


def pilot_masks(case: Case) -> dict[int, Tensor] | None:
    """Injected (noised) masks by layer, (B, P, h * w), True = blocked, before full rows are opened."""
    found = {
        int(k.removeprefix("mp_masks/layer")): torch.from_numpy(v).bool().flatten(2)
        for k, v in case.inputs.items()
        if k.startswith("mp_masks/layer")
    }
    return found or None


def pilot_labels(case: Case) -> Tensor | None:
    given = case.inputs.get("mp_labels")
    return None if given is None else torch.from_numpy(given).long()


def has_points(case: Case) -> bool:
    """Whether the case asks for losses; some kinds hold outputs only."""
    return "match_points" in case.inputs


def match_points(case: Case) -> dict[int, Tensor]:
    """Layer 0 ... L -> (B, N, 2). The file starts with the last layer."""
    given = torch.from_numpy(case.inputs["match_points"])
    rows = given.view(-1, len(images(case)), *given.shape[1:])
    return dict(zip(_call_layers(len(rows)), rows, strict=True))


def loss_points(case: Case) -> tuple[dict[int, Tensor], dict[int, Tensor] | None]:
    """Chosen points of the matching part and of the piloted part by layer; None if nothing is piloted."""
    calls = [
        torch.from_numpy(v) for _, v in sorted((k, v) for k, v in case.inputs.items() if k.startswith("loss_points/"))
    ]
    layers = len(match_points(case))
    if len(calls) == layers:
        return dict(zip(_call_layers(layers), calls, strict=True)), None
    order = _call_layers(layers)
    return dict(zip(order, calls[0::2], strict=True)), dict(zip(order, calls[1::2], strict=True))


@dataclass(frozen=True)
class Draws:
    """Random points of one part in the public implementation's order: layer -> (rows, n, 2)."""

    candidates: dict[int, Tensor]
    uniform: dict[int, Tensor]


def seeded_draws(case: Case, matched_rows: int, piloted_rows: int) -> tuple[dict[int, Tensor], Draws, Draws]:
    """What ``manual_seed`` just before the criterion makes it draw: matching points, then both parts' points.

    Per layer (the last one first): the matching points image by image, candidates and uniform points of the
    matched masks, the same of the piloted ones.
    """
    model = model_config(case)
    keep = int(model.importance_sample_ratio * model.train_points)
    match: dict[int, Tensor] = {}
    matched, piloted = Draws({}, {}), Draws({}, {})
    torch.manual_seed(case.meta["criterion_seed"])
    for layer in _call_layers(model.decoder_layers + 1):
        # An image without objects is matched to nothing, but its points are drawn all the same.
        match[layer] = torch.cat([torch.rand(1, model.train_points, 2) for _ in images(case)])
        for draws, rows in ((matched, matched_rows), (piloted, piloted_rows)):
            draws.candidates[layer] = torch.rand(rows, int(model.train_points * model.oversample_ratio), 2)
            draws.uniform[layer] = torch.rand(rows, model.train_points - keep, 2)
    return match, matched, piloted


def gradients(case: Case, found: Mapping[str, Tensor | None], shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """``out/grad...`` keys. A parameter that the case has and the model has not got a gradient of zero."""
    names = [str(n) for n in case.golden["out/grad_names"]] if "out/grad_names" in case.golden else list(found)

    def gradient(name: str) -> Tensor:
        value = found.get(name)
        return value if value is not None else torch.zeros_like(shapes[name])

    out: dict[str, Any] = {f"out/grad/{n}": gradient(n) for n in names}
    out["out/grad_names"] = np.array(names)
    out["out/grad_norms"] = torch.stack([gradient(n).norm() for n in names])
    return out


def all_shapes(case: Case) -> dict[str, Tensor]:
    """Every weight of a case, the unused label embedding included."""
    return {k: torch.from_numpy(np.array(v)) for k, v in case.state.items()} | state(case)


def named_losses(case: Case, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill in the piloted losses that the public implementation reports as 0 when nothing is piloted."""
    if case.meta["config"]["transformer_decoder"] == PLAIN:
        return dict(losses)
    filled = {k.replace(kind, f"{kind}_dn"): torch.zeros(()) for k in losses for kind in _kinds(k) if "_dn" not in k}
    kept = filled | dict(losses)
    return {k: v for k, v in kept.items() if not (case.meta["config"].get("dn_no_lb") and k.startswith("loss_ce_dn"))}


def _kinds(name: str) -> list[str]:
    return [kind for kind in ("loss_ce", "loss_mask", "loss_dice") if name.startswith(kind)]


def _call_layers(count: int) -> list[int]:
    return [count - 1, *range(count - 1)]


def _numbered(case: Case, prefix: str) -> list[np.ndarray]:
    found = {int(k.removeprefix(prefix)): v for k, v in case.inputs.items() if k.startswith(prefix)}
    return [found[i] for i in sorted(found)]


def _refuse_other(given: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    for key, value in supported.items():
        if given.get(key, value) != value:
            raise NotImplementedError(f"{key} = {given[key]!r}: this implementation has {value!r} only")
