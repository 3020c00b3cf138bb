"""Augmentations: deterministic by generator, the masks move with the image, the sizes are the configured ones."""

import numpy as np
import pytest
import torch

from mpformer.config.schema import AugmentationConfig
from mpformer.data.coco_layout import encode_mask
from mpformer.data.mappers import shortest_edge, training_sample
from mpformer.data.targets import Labels, Objects, SegmentMap

H, W = 60, 90


def scene() -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour is its label: (H, W, 3) and ids (H, W) with 0 void, two halves and two objects."""
    ids = np.ones((H, W), dtype=np.int32)
    ids[:, W // 2 :] = 2
    ids[10:30, 12:40] = 3
    ids[35:55, 50:80] = 4
    ids[:4] = 0
    return np.repeat((50 * ids).astype(np.uint8)[..., None], 3, axis=2), ids


def labels(kind: str) -> Labels:
    _, ids = scene()
    if kind == "map":
        return SegmentMap(ids, ((1, 8), (2, 9), (3, 0), (4, 5)))
    if kind == "rle":
        return Objects(H, W, ((encode_mask(ids == 3), 0), (encode_mask(ids == 4), 5)))
    boxes = (((12, 10, 40, 30), 0), ((50, 35, 80, 55), 5))
    return Objects(H, W, tuple(([[x0, y0, x1, y0, x1, y1, x0, y1]], c) for (x0, y0, x1, y1), c in boxes))


LSJ = AugmentationConfig(kind="lsj", lsj_size=128)
CROP = AugmentationConfig(kind="crop", min_sizes=(48, 64, 96), max_size=400, crop_size=(64, 80))


def sample(config: AugmentationConfig, kind: str, seed: int) -> dict:
    return training_sample(scene()[0], labels(kind), config, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", ["map", "rle", "polygons"])
@pytest.mark.parametrize("config", [AugmentationConfig(), LSJ, CROP], ids=["fixed", "lsj", "crop"])
def test_masks_move_with_the_image(config: AugmentationConfig, kind: str) -> None:
    """The image's colour tells the label: most pixels of a mask have its colour wherever the mask went."""
    colors = {8: 50, 9: 100, 0: 150, 5: 200}
    seen = 0
    for seed in range(12):
        item = sample(config, kind, seed)
        for category, mask in zip(item["instances"].gt_classes.tolist(), item["instances"].gt_masks, strict=True):
            values = item["image"][0][mask].float()
            if len(values) > 60:
                seen += 1
                assert values.median() == colors[category]
                assert (values - colors[category]).abs().mean() < 12
    assert seen > 8


@pytest.mark.parametrize("config", [AugmentationConfig(), LSJ, CROP.model_copy(update={"color": True})])
def test_the_generator_decides_everything(config: AugmentationConfig) -> None:
    np.random.seed(0)
    first = sample(config, "map", 5)
    np.random.seed(1)
    again, others = sample(config, "map", 5), [sample(config, "map", seed) for seed in range(6, 12)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["instances"].gt_masks, again["instances"].gt_masks)
    assert not all(torch.equal(first["image"], other["image"]) for other in others)


def test_large_scale_jitter_fills_its_square() -> None:
    shares = []
    for seed in range(40):
        item = sample(LSJ, "map", seed)
        assert item["image"].shape == (3, 128, 128)
        assert item["instances"].gt_masks.shape[1:] == (128, 128)
        shares.append((item["image"][0] == 128).float().mean().item())
    assert max(shares) > 0.8  # scale 0.1: a small image on grey
    assert min(shares) < 0.1


def test_padding_is_never_labelled() -> None:
    for seed in range(20):
        item = sample(LSJ, "map", seed)
        padded = item["image"][0] == 128
        inner = torch.nn.functional.max_pool2d((~padded).float()[None], 3, 1, 1)[0] == 0
        assert not item["instances"].gt_masks.any(0)[inner].any()


def test_crops_have_their_size_and_small_images_are_padded() -> None:
    sizes = {tuple(sample(CROP, "map", seed)["image"].shape) for seed in range(30)}
    assert sizes == {(3, 64, 80)}


def test_category_area_constraint_avoids_uniform_crops() -> None:
    """Left half class 8, right half class 9: a crop of one class only is drawn again."""
    ids = np.ones((60, 400), dtype=np.int32)
    ids[:, 200:] = 2
    image = np.zeros((60, 400, 3), dtype=np.uint8)
    config = AugmentationConfig(kind="crop", crop_size=(60, 80), flip=False)
    constrained = config.model_copy(update={"category_max_area": 0.75})
    pairs = ((1, 8), (2, 9))

    def mixed(chosen: AugmentationConfig) -> int:
        found = 0
        for seed in range(60):
            item = training_sample(image, SegmentMap(ids, pairs), chosen, np.random.default_rng(seed))
            areas = item["instances"].gt_masks.flatten(1).sum(1).float()
            found += bool(len(areas) == 2 and areas.max() < 0.75 * areas.sum())
        return found

    assert mixed(config) < 25
    assert mixed(constrained) > 35


def test_void_does_not_count_as_a_category() -> None:
    ids = np.zeros((40, 40), dtype=np.int32)
    ids[:20] = 1
    config = AugmentationConfig(kind="crop", crop_size=(20, 20), category_max_area=0.75)
    rng = np.random.default_rng(0)
    item = training_sample(np.zeros((40, 40, 3), np.uint8), SegmentMap(ids, ((1, 3),)), config, rng)
    assert item["image"].shape == (3, 20, 20)  # after ten draws the last is taken


def test_colors_change_colours_alone() -> None:
    config = AugmentationConfig(kind="crop", color=True, flip=False)
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    plain = training_sample(image, labels("map"), AugmentationConfig(flip=False), np.random.default_rng(0))
    changed = 0
    for seed in range(12):
        item = training_sample(image, labels("map"), config, np.random.default_rng(seed))
        assert item["image"].dtype == torch.uint8
        assert torch.equal(item["instances"].gt_masks, plain["instances"].gt_masks)
        changed += not torch.equal(item["image"], plain["image"])
    assert changed >= 9


def test_nothing_left_is_a_sample_without_targets() -> None:
    empty = training_sample(scene()[0], SegmentMap(scene()[1], ()), LSJ, np.random.default_rng(0))
    assert empty["instances"].gt_masks.shape == (0, 128, 128)
    none = training_sample(scene()[0], Objects(H, W, ()), CROP, np.random.default_rng(0))
    assert none["instances"].gt_masks.shape == (0, 64, 80)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((200, 1000), (800, 1333), (267, 1333)),
        ((480, 640), (0, 0), (480, 640)),
        ((100, 100), (50, 0), (50, 50)),
    ],
)
def test_shortest_edge(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shortest_edge(*size, *limits) == expected


def test_shortest_edge_is_detectron2s() -> None:
    from detectron2.data.transforms import ResizeShortestEdge

    for h, w in ((480, 640), (333, 500), (1024, 2048), (97, 31)):
        assert shortest_edge(h, w, 512, 1333) == ResizeShortestEdge.get_output_shape(h, w, 512, 1333)
