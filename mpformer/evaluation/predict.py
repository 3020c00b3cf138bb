"""Overlays of a model's predictions on images of one's own: ``predict IMAGE… --weights W``."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpformer.config.classes import class_table
from mpformer.config.schema import Config
from mpformer.data.mappers import shortest_edge
from mpformer.data.targets import CorruptImage, read_image
from mpformer.modeling.inference import boxes_of
from mpformer.modeling.meta_arch import MPFormer, build_model
from mpformer.modeling.weights import detect_toggles, load_weights
from mpformer.runtime.errors import UserError
from mpformer.runtime.process import prepare_process

__all__ = ["Prediction", "Region", "Seen", "load_model", "overlay", "predict", "regions"]

Prediction = dict[str, Any]
"""One image's results in detectron2's format, at the image's size."""

MIN_SCORE = 0.5
"""Of an instance that is shown, unless another threshold is asked for."""

_OPACITY = 0.5
_GOLDEN_RATIO = 0.618034


@dataclass(frozen=True)
class Region:
    """One instance, segment, or class of the semantic map."""

    mask: np.ndarray
    """(H, W) bool."""
    name: str
    score: float | None
    """Of an instance; segments and classes have none."""


@dataclass(frozen=True)
class Seen:
    """One image's prediction and the files that were written of it."""

    image: Path
    overlay: Path
    regions: tuple[Region, ...]
    masks: tuple[Path, ...] = ()
    """A black and white PNG of each region, in their order, where they were asked for."""

    def record(self) -> dict[str, Any]:
        """Return it as plain data; boxes are x0, y0, x1, y1 in pixels, areas in pixels."""
        masks: list[str | None] = [str(path) for path in self.masks] or [None] * len(self.regions)
        found = [
            {"class": one.name, "score": one.score, "box": _box(one.mask), "area": int(one.mask.sum()), "mask": mask}
            for one, mask in zip(self.regions, masks, strict=True)
        ]
        return {"image": str(self.image), "overlay": str(self.overlay), "regions": found}


def predict(
    images: Sequence[Path],
    weights: Path,
    config: Config,
    out: Path,
    *,
    threshold: float | None = None,
    masks: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Seen]:
    """Write one overlay PNG an image into `out`, and its masks into ``masks/<image>/``; yields what was seen.

    The overlay shows the panoptic result where ``evaluation.panoptic`` is on, else instances, else the semantic map.
    `threshold` is the least score of an instance (default 0.5) or of a panoptic segment (default: the configuration's).
    Which piloting and position parameters the weights have is read from the file. Raises UserError, before the first
    is written, for images, weights and folders that are missing, cannot be read or do not fit.
    """
    names = _names(images)
    _check_folders(images, names, out, masks)
    config = _with_threshold(config, threshold)
    model = load_model(weights, config)
    out.mkdir(parents=True, exist_ok=True)
    return _each(model, list(zip(images, names, strict=True)), config, out, threshold, masks, progress)


def _each(
    model: MPFormer,
    images: Sequence[tuple[Path, str]],
    config: Config,
    out: Path,
    threshold: float | None,
    masks: Path | None,
    progress: Callable[[int, int], None],
) -> Iterator[Seen]:
    least = MIN_SCORE if threshold is None else threshold
    for number, (image, name) in enumerate(images):
        progress(number, len(images))
        pixels, result = run(model, image, config)
        found = regions(result, config, least)
        Image.fromarray(overlay(pixels, found)).save(out / name)
        written = () if masks is None else _write_masks(found, masks / Path(name).stem)
        yield Seen(image, out / name, found, written)
    progress(len(images), len(images))


def _with_threshold(config: Config, threshold: float | None) -> Config:
    scored = config.evaluation
    if threshold is None or (scored.instance and not scored.panoptic):
        return config
    if scored.panoptic:
        return config.replace({"evaluation.object_mask_threshold": threshold})
    raise UserError("--threshold does not apply: a semantic map gives every pixel its likeliest class")


def _check_folders(images: Sequence[Path], names: Sequence[str], out: Path, masks: Path | None) -> None:
    for option, folder in (("--out", out), ("--masks", masks)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{option} {folder} is a file; give a directory")
    ours = {image.resolve() for image in images}
    same = next((out / name for name in names if (out / name).resolve() in ours), None)
    if same is not None:
        raise UserError(f"the overlay would overwrite {same}; give another directory with --out")


def _write_masks(found: Sequence[Region], folder: Path) -> tuple[Path, ...]:
    """One black and white PNG a region; those of an earlier prediction of the image are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("[0-9][0-9][0-9]-*.png"):
        earlier.unlink()
    written = []
    for number, one in enumerate(found):
        written.append(folder / f"{number:03}-{re.sub('[^a-zA-Z0-9]+', '-', one.name)}.png")
        Image.fromarray(one.mask.astype(np.uint8) * 255).save(written[-1])
    return tuple(written)


def load_model(weights: Path, config: Config) -> MPFormer:
    """Build the model of `config` in evaluation mode, with the toggles that the file's parameters ask for."""
    device = prepare_process(config.runtime.device, config.runtime.threads, tf32=config.runtime.tf32)
    model = build_model(config.replace(detect_toggles(weights)))
    load_weights(model, weights)
    return model.to(device).eval()


@torch.no_grad()
def run(model: MPFormer, path: Path, config: Config) -> tuple[np.ndarray, Prediction]:
    """Return an image file's pixels (H, W, 3) uint8 RGB and the model's results at that size."""
    try:
        pixels = read_image({"file_name": str(path)})
    except CorruptImage as error:
        raise UserError(str(error)) from None
    height, width = pixels.shape[:2]
    size = shortest_edge(height, width, config.evaluation.min_size_test, config.evaluation.max_size_test)
    resized = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    tensor = torch.from_numpy(resized.transpose(2, 0, 1).copy())
    results = model([{"image": tensor, "height": height, "width": width}])
    assert isinstance(results, list)
    return pixels, results[0]


def overlay(pixels: np.ndarray, found: Sequence[Region]) -> np.ndarray:
    """Paint regions over pixels (H, W, 3), with outlines and class names."""
    canvas = pixels.astype(np.float32)
    labels = []
    for index, one in enumerate(found):
        color = _color(index)
        canvas[one.mask] = (1 - _OPACITY) * canvas[one.mask] + _OPACITY * color
        canvas[_outline(one.mask)] = color
        labels.append((one.mask, one.name if one.score is None else f"{one.name} {one.score:.2f}"))
    return _with_text(canvas.round().clip(0, 255).astype(np.uint8), labels)


def regions(result: Prediction, config: Config, least: float = MIN_SCORE) -> tuple[Region, ...]:
    """Return what a result shows; of instances those with at least a score, and with a mask."""
    names = class_table(config.dataset.name, config.dataset.task).names
    found = (Region(mask, names[category], score) for mask, category, score in _regions(result, least))
    return tuple(one for one in found if one.mask.any())


def _regions(result: Prediction, least: float) -> Iterator[tuple[np.ndarray, int, float | None]]:
    if "panoptic_seg" in result:
        ids, segments = result["panoptic_seg"]
        for segment in segments:
            yield (ids == segment["id"]).cpu().numpy(), segment["category_id"], None
    elif "instances" in result:
        found = result["instances"]
        found = found[found.scores >= least]
        for mask, category, score in zip(found.pred_masks, found.pred_classes, found.scores, strict=True):
            yield mask.cpu().numpy().astype(bool), int(category), float(score)
    else:
        classes: Tensor = result["sem_seg"].argmax(0)
        for category in classes.unique().tolist():
            yield (classes == category).cpu().numpy(), category, None


def _color(index: int) -> np.ndarray:
    """Well separated hues by the golden ratio, as RGB (3,) in 0 … 255."""
    import colorsys

    return 255 * np.array(colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, 0.75, 1.0), dtype=np.float32)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (H, W) with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _box(mask: np.ndarray) -> list[float]:
    """x0, y0, x1, y1 of a mask (H, W)."""
    return [float(edge) for edge in boxes_of(torch.from_numpy(mask)[None])[0].tolist()]


def _with_text(pixels: np.ndarray, labels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Write each label at the top left of its mask's box."""
    from PIL import ImageDraw

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for mask, text in labels:
        left, top = _box(mask)[:2]
        box = draw.textbbox((left + 1, top + 1), text)
        draw.rectangle(box, fill=(0, 0, 0))
        draw.text((left + 1, top + 1), text, fill=(255, 255, 255))
    return np.asarray(image)


def _names(images: Sequence[Path]) -> list[str]:
    """A file name for each overlay; raises UserError for a missing image or two that would share a name."""
    missing = [str(image) for image in images if not Path(image).is_file()]
    if missing or not images:
        raise UserError(f"no such image: {', '.join(missing)}" if missing else "give at least one image")
    names = [f"{Path(image).stem}.png" for image in images]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"several images would be written as {', '.join(sorted(twice))}: predict them separately")
    return names
