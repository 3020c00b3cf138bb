"""Golden cases through the direct implementation: ``run(case)`` returns every key that it can."""

from typing import Any

import torch
from torch import Tensor

from tests.direct.decoder import DirectOutput
from tests.direct.inference import Rules, instance, panoptic, resize, semantic
from tests.direct.losses import Points
from tests.direct.model import DirectMPFormer, Features
from tests.support import golden_io


def build(case: golden_io.Case) -> DirectMPFormer:
    model = DirectMPFormer(golden_io.model_config(case), golden_io.toggles(case), case.meta["config"]["num_classes"])
    model.load_state_dict(golden_io.state(case))
    return model


def run(case: golden_io.Case) -> dict[str, Any]:
    """Everything a golden case holds, computed plainly."""
    model = build(case)
    if "out_size" in case.inputs:
        with torch.no_grad():
            return _evaluation(case, model.eval())
    return _training(case, model)


def _evaluation(case: golden_io.Case, model: DirectMPFormer) -> dict[str, Any]:
    images = golden_io.images(case)
    batch = model.batch(images)
    features = model.features(batch)
    out = model.decode(features)
    return _features(features) | _outputs(out) | _post_processing(case, out, batch)


def _training(case: golden_io.Case, model: DirectMPFormer) -> dict[str, Any]:
    images = golden_io.images(case)
    targets = model.targets(images, golden_io.labels(case), golden_io.masks(case))
    features = model.features(model.batch(images))
    out = model.decode(features, targets, golden_io.pilot_masks(case), golden_io.pilot_labels(case))
    result = _features(features) | _outputs(out)
    if not golden_io.has_points(case):
        return result
    matched, piloted = golden_io.loss_points(case)
    injected = Points(match=golden_io.match_points(case), matched=matched, piloted=piloted)
    losses, matches = model.loss(out, targets, injected)
    total = model.loss.total(losses)
    total.backward()
    result |= {f"out/loss/{k}": v for k, v in golden_io.named_losses(case, losses).items()}
    if "criterion_seed" in case.meta:
        torch.manual_seed(case.meta["criterion_seed"])
        with torch.no_grad():
            seeded, _ = model.loss(out, targets)
        result |= {f"out/seeded_loss/{k}": v for k, v in golden_io.named_losses(case, seeded).items()}
    result["out/total_weighted"] = total
    for layer, images_pairs in matches.items():
        result |= {f"out/match/layer{layer}/{b}": torch.stack(pairs) for b, pairs in enumerate(images_pairs)}
    found = {name: p.grad for name, p in model.named_parameters()}
    return result | golden_io.gradients(case, found, golden_io.all_shapes(case))


def _features(features: Features) -> dict[str, Tensor]:
    out = {f"mid/backbone/res{s.bit_length() - 1}": x for s, x in features.backbone.items()}
    out["mid/mask_features"] = features.mask_features
    return out | {f"mid/multi_scale/{i}": x for i, x in enumerate(features.levels)}


def _outputs(out: DirectOutput) -> dict[str, Tensor]:
    result = {"out/pred_logits": out.matching("logits"), "out/pred_masks": out.matching("masks")}
    result |= {f"mid/query/layer{i}": q for i, q in enumerate(out.queries)}
    result |= {f"out/xattn_mask_raw/layer{i}": m for i, m in enumerate(out.blocked)}
    result |= {f"out/xattn_mask/layer{i}": m for i, m in enumerate(out.opened)}
    if out.pilot is not None and out.self_mask is not None:
        result |= {
            "out/mp/pred_logits": out.piloted("logits"),
            "out/mp/pred_masks": out.piloted("masks"),
            "out/mp/slot_is_gt": out.pilot.slot_is_object,
            "out/mp/labels_used": out.pilot.labels,
            "out/self_attn_mask": out.self_mask[0],
        }
    return result


def _post_processing(case: golden_io.Case, out: DirectOutput, batch: Tensor) -> dict[str, Any]:
    c = case.meta["config"]
    rules = Rules(
        c["num_classes"],
        tuple(c["thing_classes"]),
        c["detections_per_image"],
        c["object_mask_threshold"],
        c["overlap_threshold"],
    )
    result: dict[str, Any] = {}
    masks = torch.nn.functional.interpolate(out.masks[-1], size=batch.shape[-2:], mode="bilinear", align_corners=False)
    for b, image in enumerate(golden_io.images(case)):
        height, width = (int(v) for v in case.inputs["out_size"][b])
        size, wanted = (image.shape[-2], image.shape[-1]), (height, width)
        logits, full = out.logits[-1][b], resize(masks[b], size, wanted)
        segments, info = panoptic(rules, logits, full)
        result[f"out/all/sem_seg/{b}"] = semantic(logits, full)
        result[f"out/all/panoptic_seg/{b}"] = segments
        result[f"out/all/panoptic_info/{b}"] = torch.tensor(info, dtype=torch.long).reshape(-1, 3)
        for variant in ("all", "inst"):
            rows = instance(rules, logits, full, only_things=variant == "all")
            for name, value in zip(("scores", "classes", "masks"), rows, strict=True):
                result[f"out/{variant}/inst_{name}/{b}"] = value
        result[f"out/sem/sem_seg/{b}"] = resize(semantic(logits, masks[b]), size, wanted)
    return result
