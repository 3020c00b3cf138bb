"""Cases like the golden files whose values come from the direct implementation, for kinds that no file covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import direct_adapter
from tests.support.golden_rules import Arrays, GoldenCase

SIZES = ((120, 150), (96, 117), (64, 90))


@dataclass(frozen=True)
class MadeCase:
    """Inputs made here; ``golden`` is what the direct implementation says."""

    meta: dict[str, Any]
    inputs: Arrays
    state: Arrays
    golden: Arrays


def make_case(
    objects: Sequence[int],
    *,
    num_dn: int = 1,
    guided: int = 9,
    noise: float = 0.0,
    points: int = 256,
    seed: int = 0,
) -> MadeCase:
    """One image per entry of ``objects``; ``noise`` flips mask cells and labels with that probability."""
    random = np.random.default_rng(seed)
    base = GoldenCase.named("case2_4_mp_all_layers")
    config = base.meta["config"] | {"num_dn": num_dn, "all_ly_dn": guided == 9}
    active = num_dn > 0 and any(objects)
    layers = list(range(guided))
    meta = {"config": config, "mp_active": active, "gt_mask_layers": layers, "criterion_seed": 7}
    inputs: Arrays = {}
    for b, n in enumerate(objects):
        inputs[f"image/{b}"] = random.integers(0, 256, (3, *SIZES[b]), dtype=np.uint8)
        inputs[f"gt_masks/{b}"] = _blobs(random, n, SIZES[b])
        inputs[f"gt_labels/{b}"] = random.integers(0, config["num_classes"], n)
    groups = group_count(num_dn, max(objects)) if active else 0
    rows = sum(objects)
    inputs["match_points"] = random.random((10 * len(objects), points, 2), dtype=np.float32)
    matched = sum(min(config["num_queries"], n) for n in objects)
    calls = [matched, rows * groups] * 10 if active else [matched] * 10
    for i, count in enumerate(calls):
        inputs[f"loss_points/{i:02d}"] = random.random((count, points, 2), dtype=np.float32)
    if noise and active:
        inputs |= _noise(random, inputs, objects, groups, noise, config["num_classes"])
    case = MadeCase(meta, inputs, base.state, {})
    case.golden.update(_without_vanishing_gradients(arrays(direct_adapter.run(case))))
    return case


def _without_vanishing_gradients(found: Arrays) -> Arrays:
    """Leave out gradients that are 0 but for rounding (a bias in front of a normalisation); their norms stay."""
    largest = found["out/grad_norms"].max()
    names = [n for n, v in zip(found["out/grad_names"], found["out/grad_norms"], strict=True) if v < 1e-5 * largest]
    return {k: v for k, v in found.items() if k.removeprefix("out/grad/") not in names}


def group_count(num_dn: int, largest: int) -> int:
    """The public implementation's rule: from 100 on ``num_dn`` is a number of slots."""
    return num_dn // largest if num_dn >= 100 else num_dn


def arrays(result: dict[str, Any]) -> Arrays:
    """Tensors as numpy, booleans as 0/1, as in the golden files."""
    found = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in result.items()}
    return {k: v.astype(np.uint8) if v.dtype == bool else v for k, v in found.items()}


def _blobs(random: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Ellipses (count, H, W), a speck of one pixel among them."""
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((count, *size), dtype=np.uint8)
    for mask in masks:
        centre, radius = random.random(2) * size, random.uniform(3, 40, 2)
        mask |= (((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1).astype(np.uint8)
        mask[tuple(centre.astype(int))] = 1
    return masks


def _noise(
    random: np.random.Generator, inputs: Arrays, objects: Sequence[int], groups: int, share: float, classes: int
) -> Arrays:
    slots = groups * max(objects)
    cells = [20, 80, 320]  # strides 32, 16, 8 of the padded 128 x 160 image
    found = {}
    for layer in range(9):
        # One quarter blocked, so that rows differ; slot 0 of image 0 is blocked everywhere and must be opened.
        mask = random.random((len(objects), slots, cells[layer % 3])) < 0.25 + share
        mask[0, 0] = True
        found[f"mp_masks/layer{layer}"] = mask.astype(np.uint8)
    clean = np.concatenate([inputs[f"gt_labels/{b}"] for b in range(len(objects))] * groups)
    flipped = random.random(len(clean)) < share
    found["mp_labels"] = np.where(flipped, random.integers(0, classes, len(clean)), clean)
    return found
