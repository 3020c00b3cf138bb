"""From an image and its labels to a training sample: augmentation, drawn from the generator that is handed in.

Three kinds (``config.dataset.augmentation.kind``): ``fixed`` keeps the image's size, ``lsj`` is large-scale jitter on a
fixed square (COCO), ``crop`` is a random shortest side, a crop and SSD colours (ADE20K, Cityscapes). The pixel work
is fvcore's and detectron2's transforms; only the draws are ours, since those of detectron2's augmentations come from
numpy's global state.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import CropTransform, HFlipTransform, PadTransform, ResizeTransform
from detectron2.structures import Instances
from numpy.typing import NDArray

from mpformer.config.schema import AugmentationConfig
from mpformer.data.targets import IGNORE_LABEL, Labels, Masks, Objects, Pixels, SegmentMap, decode_segmentation

Transforms = Sequence[Any]
PAD_VALUE = 128.0
#: how often a crop is drawn again when one category fills too much of it
_CROP_ATTEMPTS = 10


def training_sample(
    image: Pixels, labels: Labels, config: AugmentationConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """Augment and pack: image (H, W, 3) -> {"image": (3, h, w) uint8 tensor, "instances": gt_classes, gt_masks}."""
    if config.kind == "fixed":
        classes, masks = labels.masks()
        if config.flip and rng.random() < 0.5:
            image, masks = image[:, ::-1], masks[..., ::-1]
        return pack(image, classes, masks)
    if config.kind == "lsj":
        return _jittered(image, labels, config, rng)
    return _cropped(image, labels, config, rng)


def pack(image: Pixels, classes: NDArray[np.int64], masks: Masks) -> dict[str, Any]:
    """The tensors of a sample: image (3, H, W) uint8, Instances with gt_classes (n,) and gt_masks (n, H, W) bool."""
    instances = Instances(image.shape[:2])
    instances.gt_classes = torch.from_numpy(np.ascontiguousarray(classes))
    instances.gt_masks = torch.from_numpy(np.ascontiguousarray(masks))
    return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), "instances": instances}


def _jittered(image: Pixels, labels: Labels, config: AugmentationConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Large-scale jitter: flip, scale to a random multiple of the square, crop and pad to the square."""
    h, w = image.shape[:2]
    transforms: list[Any] = [HFlipTransform(w)] if config.flip and rng.random() < 0.5 else []
    size = config.lsj_size
    factor = rng.uniform(config.lsj_min_scale, config.lsj_max_scale) * min(size / h, size / w)
    nh, nw = max(1, round(h * factor)), max(1, round(w * factor))
    transforms.append(ResizeTransform(h, w, nh, nw))
    share = rng.random()  # one draw for both axes, as in detectron2's FixedSizeCrop
    y, x = round(max(nh - size, 0) * share), round(max(nw - size, 0) * share)
    transforms.append(CropTransform(x, y, min(size, nw), min(size, nh), nw, nh))
    transforms += _padding(min(size, nh), min(size, nw), (size, size))
    return _apply(image, labels, transforms)


def _cropped(image: Pixels, labels: Labels, config: AugmentationConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Random shortest side, crop in which no category fills more than its share, SSD colours, flip."""
    h, w = image.shape[:2]
    transforms: list[Any] = []
    if config.min_sizes:
        shortest = config.min_sizes[int(rng.integers(len(config.min_sizes)))]
        nh, nw = shortest_edge(h, w, shortest, config.max_size)
        transforms.append(ResizeTransform(h, w, nh, nw))
        h, w = nh, nw
    if config.crop_size:
        transforms.append(_constrained_crop(labels, transforms, (h, w), config, rng))
        h, w = min(h, config.crop_size[0]), min(w, config.crop_size[1])
    flip = config.flip and rng.random() < 0.5
    image_only = _ssd_colors(rng) if config.color else []
    transforms += [HFlipTransform(w)] if flip else []
    transforms += _padding(h, w, config.crop_size or (h, w))
    return _apply(image, labels, transforms, image_only)


def shortest_edge(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """The (height, width) with the shortest side as given, unless that makes the longest too long. 0: no limit."""
    if not shortest:
        return height, width
    factor = shortest / min(height, width)
    if longest and factor * max(height, width) > longest:
        factor = longest / max(height, width)
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _constrained_crop(
    labels: Labels, before: Transforms, size: tuple[int, int], config: AugmentationConfig, rng: np.random.Generator
) -> Any:
    """A crop in which one category fills at most its share; the last of ten draws is taken whatever it holds."""
    assert config.crop_size is not None
    (h, w), (ch, cw) = size, (min(config.crop_size[0], size[0]), min(config.crop_size[1], size[1]))
    classes = None
    if config.category_max_area < 1:
        classes = labels.classes()
        for transform in before:
            classes = transform.apply_segmentation(classes)
    for _ in range(_CROP_ATTEMPTS):
        y, x = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
        if classes is None or _mixed(classes[y : y + ch, x : x + cw], config.category_max_area):
            break
    return CropTransform(x, y, cw, ch, w, h)


def _mixed(classes: NDArray[np.uint8], largest: float) -> bool:
    counts = np.bincount(classes.ravel(), minlength=IGNORE_LABEL + 1)[:IGNORE_LABEL]
    return np.count_nonzero(counts) > 1 and bool(counts.max() < counts.sum() * largest)


def _padding(height: int, width: int, size: tuple[int, int]) -> list[Any]:
    right, bottom = max(size[1] - width, 0), max(size[0] - height, 0)
    return [PadTransform(0, 0, right, bottom, width, height, PAD_VALUE, 0)] if right or bottom else []


def _apply(image: Pixels, labels: Labels, transforms: Transforms, image_only: Sequence[Any] = ()) -> dict[str, Any]:
    for transform in transforms:
        # padding comes last and must not be coloured
        if image_only and isinstance(transform, PadTransform):
            image, image_only = _recolor(image, image_only), ()
        image = transform.apply_image(image)
    image = _recolor(image, image_only)
    classes, masks = transform_labels(labels, transforms).masks()
    return pack(np.clip(image, 0, 255).astype(np.uint8), classes, masks)


def transform_labels(labels: Labels, transforms: Transforms) -> Labels:
    """Move the labels with the image: maps by nearest neighbour, polygons exactly, RLE through its mask."""
    if isinstance(labels, SegmentMap):
        ids, pairs = _compact(labels)
        for transform in transforms:
            ids = transform.apply_segmentation(ids)
        return SegmentMap(ids, pairs)
    h, w = labels.height, labels.width
    moved = tuple((_move(s, transforms, h, w), c) for s, c in labels.pairs)
    for transform in transforms:
        h, w = transform.apply_segmentation(np.zeros((h, w), dtype=np.uint8)).shape
    return Objects(h, w, moved)


def _compact(labels: SegmentMap) -> tuple[NDArray[Any], tuple[tuple[int, int], ...]]:
    """The map with ids 1 ... n, and 0 for what is not labelled (as is padding); in a type that resizing knows."""
    ids = np.array(sorted(i for i, _ in labels.pairs), dtype=np.int64)
    compact = np.zeros(labels.ids.shape, dtype=np.uint8 if len(ids) < 256 else np.float32)
    if len(ids):
        index = np.searchsorted(ids, labels.ids).clip(max=len(ids) - 1)
        known = ids[index] == labels.ids
        compact[known] = index[known] + 1
    number = {int(i): n for n, i in enumerate(ids, start=1)}
    return compact, tuple((number[i], c) for i, c in labels.pairs)


def _move(segmentation: Any, transforms: Transforms, height: int, width: int) -> Any:
    if not isinstance(segmentation, list):
        from mpformer.data.coco_layout import encode_mask

        mask = decode_segmentation(segmentation, height, width).astype(np.uint8)
        for transform in transforms:
            mask = transform.apply_segmentation(mask)
        return encode_mask(mask.astype(bool))
    # not clipped to the crop: rasterising leaves out what lies outside
    polygons = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in segmentation]
    for transform in transforms:
        polygons = [transform.apply_coords(p.copy()) for p in polygons]
    return [p.reshape(-1).tolist() for p in polygons]


# --- colours ----------------------------------------------------------------------------------------------------


def _ssd_colors(rng: np.random.Generator) -> list[Any]:
    """The photometric distortions of SSD (Liu et al., ECCV 2016), each with probability one half."""
    brightness = _maybe(rng, lambda: _linear(1.0, rng.uniform(-32, 32)))
    contrast = _maybe(rng, lambda: _linear(rng.uniform(0.5, 1.5), 0.0))
    saturation = _maybe(rng, lambda: _saturation(rng.uniform(0.5, 1.5)))
    hue = _maybe(rng, lambda: _hue(int(rng.integers(-18, 19))))
    late = rng.random() < 0.5
    return brightness + ([] if late else contrast) + saturation + hue + (contrast if late else [])


def _maybe(rng: np.random.Generator, make: Any) -> list[Any]:
    change = make()
    return [change] if rng.random() < 0.5 else []


def _recolor(image: Pixels, changes: Sequence[Any]) -> Pixels:
    for change in changes:
        image = change(image)
    return image


def _linear(factor: float, offset: float) -> Any:
    return lambda image: np.clip(image.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def _saturation(factor: float) -> Any:
    def change(hsv: NDArray[np.uint8]) -> NDArray[np.uint8]:
        hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(factor), 0, 255).astype(np.uint8)
        return hsv

    return lambda image: _in_hsv(image, change)


def _hue(degrees: int) -> Any:
    """Turn the hue; OpenCV keeps it in halves of a degree below 180, and SSD's 18 are in that unit."""

    def change(hsv: NDArray[np.uint8]) -> NDArray[np.uint8]:
        hsv[..., 0] = ((hsv[..., 0].astype(np.int32) + degrees) % 180).astype(np.uint8)
        return hsv

    return lambda image: _in_hsv(image, change)


def _in_hsv(image: Pixels, change: Any) -> Pixels:
    import cv2

    return cv2.cvtColor(change(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)), cv2.COLOR_HSV2RGB)
