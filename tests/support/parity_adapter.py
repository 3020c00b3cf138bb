"""Golden cases through the product path: ``run(case)`` returns every key that a case of any kind can hold.

    python parity.py --impl tests/support/parity_adapter.py:run --case case2_4_mp_all_layers.npz

Nothing of the model is replaced: points and noise are injected through its own arguments, intermediate values
are read with hooks.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # a checker elsewhere loads this file by its path

from tests.support import golden_io  # isort: skip
from detectron2.structures import Instances

from mpformer.modeling.criterion import Criterion
from mpformer.modeling.inference import InferenceSettings, infer
from mpformer.modeling.mask_piloting import PilotBatch, PilotNoise, is_guided
from mpformer.modeling.matcher import Matching, match
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.outputs import DecoderOutput, Targets
from mpformer.modeling.pixel_decoder import PixelFeatures
from mpformer.modeling.points import FixedPoints, most_uncertain, sample
from tests.support.present import present


def piloted_masks(output: DecoderOutput, layer: int) -> Tensor:
    """Mask logits (B, P, h, w) of one head of the piloted part."""
    return torch.einsum("bqd,bdhw->bqhw", present(output.pilot_mask_embed)[layer], output.mask_features)


@dataclass
class Trace:
    """What the decoder did, layer by layer."""

    blocked: list[Tensor] = field(default_factory=list)
    opened: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    self_masks: list[Tensor | None] = field(default_factory=list)


def build(case: golden_io.Case) -> MPFormer:
    config = case.meta["config"]
    model = build_model(golden_io.full_config(case), config["num_classes"], config["thing_classes"])
    model.load_state_dict(golden_io.state(case))
    return model


def run(case: golden_io.Case) -> dict[str, Any]:
    """Everything a golden case holds, computed by the product path."""
    model = build(case)
    if "out_size" in case.inputs:
        with torch.no_grad():
            return _evaluation(case, model.eval())
    return _training(case, model.train())


def batch_of(case: golden_io.Case) -> list[dict[str, Any]]:
    """The case as detectron2's list of items."""
    items: list[dict[str, Any]] = [{"image": image} for image in golden_io.images(case)]
    for item, labels, masks in zip(items, golden_io.labels(case), golden_io.masks(case), strict=False):
        instances = Instances(item["image"].shape[-2:])
        instances.gt_classes, instances.gt_masks = labels, masks
        item["instances"] = instances
    return items


def _evaluation(case: golden_io.Case, model: MPFormer) -> dict[str, Any]:
    images = model.preprocess(batch_of(case))
    result, pixels = _features(model, images.tensor)
    with traced(model) as trace:
        output = model.sem_seg_head.predictor(pixels)
    return result | _outputs(output, None, trace) | _post_processing(case, model, output, images)


def _training(case: golden_io.Case, model: MPFormer) -> dict[str, Any]:
    items = batch_of(case)
    images = model.preprocess(items)
    targets = model.targets(items, images)
    result, pixels = _features(model, images.tensor)
    pilot = model.pilot(targets, pixels, None, _noise(case, model))
    with traced(model) as trace:
        output = model.sem_seg_head.predictor(pixels, pilot)
    result |= _outputs(output, pilot, trace)
    if not golden_io.has_points(case):
        return result
    points = _fixed_points(case)
    matching = match(output, targets, points.matching, model.criterion.settings.weights)
    losses = model.criterion(output, targets, pilot, points, matching)
    total = torch.stack(list(model.criterion.weighted(losses).values())).sum()
    total.backward()
    result |= _losses(case, "out/loss/", losses) | {"out/total_weighted": total}
    result |= {
        f"out/match/layer{layer}/{image}": torch.stack(matching.pairs(layer, image))
        for layer in range(len(output.logits))
        for image in range(len(items))
    }
    if "criterion_seed" in case.meta:
        result |= _losses(case, "out/seeded_loss/", _seeded(case, model.criterion, output, targets, pilot))
    found = {name: p.grad for name, p in model.named_parameters()}
    return result | golden_io.gradients(case, found, golden_io.all_shapes(case))


def _features(model: MPFormer, images: Tensor) -> tuple[dict[str, Any], PixelFeatures]:
    """Run ``pixel_features``, keeping what the backbone gave."""
    kept: dict[str, Tensor] = {}
    hook = model.backbone.register_forward_hook(lambda _, __, out: kept.update(out))
    pixels = model.pixel_features(images)
    hook.remove()
    result = {f"mid/backbone/{name}": value for name, value in kept.items()}
    result["mid/mask_features"] = pixels.mask_features
    return result | {f"mid/multi_scale/{i}": value for i, value in enumerate(pixels.levels)}, pixels


@contextmanager
def traced(model: MPFormer) -> Iterator[Trace]:
    """Record attention masks and queries of every decoder layer."""
    trace, decoder = Trace(), model.sem_seg_head.predictor
    compute = decoder._blocked

    def blocked(*args: Any, **kwargs: Any) -> Tensor:
        trace.blocked.append(compute(*args, **kwargs))
        return trace.blocked[-1]

    def hooks(layers: nn.ModuleList, record: Any) -> list[Any]:
        return [layer.register_forward_hook(lambda _, args, out: record(args, out)) for layer in layers]

    decoder._blocked = blocked  # type: ignore[method-assign]  # the one value that no hook sees
    handles = hooks(decoder.transformer_cross_attention_layers, lambda args, _: trace.opened.append(~args[-1]))
    handles += hooks(
        decoder.transformer_self_attention_layers, lambda args, _: trace.self_masks.append(_inverted(args[-1]))
    )
    handles += hooks(decoder.transformer_ffn_layers, lambda _, out: trace.queries.append(out))
    try:
        yield trace
    finally:
        del decoder._blocked
        for handle in handles:
            handle.remove()


def _inverted(allowed: Tensor | None) -> Tensor | None:
    return None if allowed is None else ~allowed


def _outputs(output: DecoderOutput, pilot: PilotBatch | None, trace: Trace) -> dict[str, Any]:
    layers = range(len(output.logits))
    result: dict[str, Any] = {
        "out/pred_logits": output.logits,
        "out/pred_masks": torch.stack([output.masks(i) for i in layers]),
    }
    result |= {f"mid/query/layer{i}": q.transpose(0, 1) for i, q in enumerate(trace.queries)}
    result |= {f"out/xattn_mask_raw/layer{i}": m for i, m in enumerate(trace.blocked)}
    result |= {f"out/xattn_mask/layer{i}": m for i, m in enumerate(trace.opened)}
    if pilot is None:
        return result
    self_mask = trace.self_masks[0]
    assert self_mask is not None
    return result | {
        "out/mp/pred_logits": output.pilot_logits,
        "out/mp/pred_masks": torch.stack([piloted_masks(output, i) for i in layers]),
        "out/mp/slot_is_gt": pilot.real,
        "out/mp/labels_used": _flat_labels(pilot),
        "out/self_attn_mask": self_mask[0],
    }


def _flat_labels(pilot: PilotBatch) -> Tensor:
    """Embedded labels in the order group, image, object."""
    by_group = zip(pilot.labels.chunk(pilot.groups, 1), pilot.real.chunk(pilot.groups, 1), strict=True)
    return torch.cat([labels[real] for labels, real in by_group])


def _noise(case: golden_io.Case, model: MPFormer) -> PilotNoise:
    given = golden_io.pilot_masks(case)
    layers = model.sem_seg_head.predictor.settings.layers
    masks = None
    if given is not None and model.piloting is not None:
        masks = [given[i] if is_guided(model.piloting, i) else None for i in range(layers)]
    return PilotNoise(masks, golden_io.pilot_labels(case))


def _fixed_points(case: golden_io.Case) -> FixedPoints:
    matched, piloted = golden_io.loss_points(case)
    return FixedPoints(
        _stacked(golden_io.match_points(case)), _stacked(matched), None if piloted is None else _stacked(piloted)
    )


def _stacked(by_layer: dict[int, Tensor]) -> Tensor:
    return torch.stack([by_layer[i] for i in sorted(by_layer)])


def _losses(case: golden_io.Case, prefix: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {name.replace("_pilot", "_dn"): value for name, value in losses.items()}
    return {prefix + name: value for name, value in golden_io.named_losses(case, named).items()}


def _seeded(
    case: golden_io.Case, criterion: Criterion, output: DecoderOutput, targets: Targets, pilot: PilotBatch | None
) -> dict[str, Tensor]:
    """Losses at the points that the public implementation draws after ``manual_seed``.

    The product draws other numbers in another order, so the draws come from outside; the matching and the choice
    of the most uncertain points are the product's.
    """
    queries = output.logits.shape[2]
    matched_rows = sum(min(queries, count) for count in targets.counts)
    piloted_rows = 0 if pilot is None else int(pilot.real.sum())
    match_points, matched, piloted = golden_io.seeded_draws(case, matched_rows, piloted_rows)
    with torch.no_grad():
        matching = match(output, targets, _stacked(match_points), criterion.settings.weights)
        keep = criterion.settings.points.uncertain
        own = _stacked({i: _chosen(_matched_logits(output, matching, i), matched, i, keep) for i in match_points})
        theirs = None
        if pilot is not None:
            theirs = _stacked(
                {i: _chosen(piloted_masks(output, i)[pilot.real], piloted, i, keep) for i in match_points}
            )
        fixed = FixedPoints(_stacked(match_points), own, theirs)
        return criterion(output, targets, pilot, fixed, matching)


def _matched_logits(output: DecoderOutput, matching: Matching, layer: int) -> Tensor:
    """Mask logits (rows, h, w), image by image in ascending order of the query."""
    masks = output.masks(layer)
    pairs = [matching.pairs(layer, image)[0].sort().values for image in range(len(masks))]
    return torch.cat([masks[image, queries] for image, queries in enumerate(pairs)])


def _chosen(logits: Tensor, draws: golden_io.Draws, layer: int, keep: int) -> Tensor:
    candidates = draws.candidates[layer]
    if len(logits) == 0:
        return candidates[:, : keep + draws.uniform[layer].shape[1]]
    index = most_uncertain(sample(logits[:, None], candidates)[:, 0], keep)
    return torch.cat([candidates.gather(1, index[..., None].expand(-1, -1, 2)), draws.uniform[layer]], dim=1)


def _post_processing(case: golden_io.Case, model: MPFormer, output: DecoderOutput, images: Any) -> dict[str, Any]:
    variants = {
        "all": replace(model.inference, instance=True, panoptic=True, semantic=True),
        "inst": replace(model.inference, instance=True, panoptic=False, semantic=False),
        "sem": replace(model.inference, instance=False, panoptic=False, semantic=True),
    }
    result: dict[str, Any] = {}
    masks, padded = output.masks(-1), tuple(images.tensor.shape[-2:])
    for b, size in enumerate(images.image_sizes):
        height, width = (int(v) for v in case.inputs["out_size"][b])
        for name, settings in variants.items():
            found = infer(settings, output.logits[-1, b], masks[b], padded, tuple(size), (height, width))
            result |= _variant(f"out/{name}", b, found, settings)
    return result


def _variant(prefix: str, image: int, found: dict[str, Any], settings: InferenceSettings) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if settings.semantic:
        result[f"{prefix}/sem_seg/{image}"] = found["sem_seg"]
    if settings.panoptic:
        ids, segments = found["panoptic_seg"]
        rows = [(s["id"], s["category_id"], int(s["isthing"])) for s in segments]
        result[f"{prefix}/panoptic_seg/{image}"] = ids
        result[f"{prefix}/panoptic_info/{image}"] = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
    if settings.instance:
        instances = found["instances"]
        result[f"{prefix}/inst_scores/{image}"] = instances.scores
        result[f"{prefix}/inst_classes/{image}"] = instances.pred_classes
        result[f"{prefix}/inst_masks/{image}"] = instances.pred_masks
    return result
