"""Overlays of a model's predictions on images of one's own: ``predict IMAGE… --weights W``."""

from collections.abc import Iterator, Sequence
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

__all__ = ["Prediction", "load_model", "overlay", "predict"]

Prediction = dict[str, Any]
"""One image's results in detectron2's format, at the image's size."""

_MIN_SCORE = 0.5
_OPACITY = 0.5
_GOLDEN_RATIO = 0.618034


def predict(images: Sequence[Path], weights: Path, config: Config, out: Path) -> list[Path]:
    """Write one overlay PNG an image into `out` and return their paths.

    The overlay shows the panoptic result where ``evaluation.panoptic`` is on, else instances, else the semantic map.
    Which piloting and position parameters the weights have is read from the file. Raises UserError for images or
    weights that are missing, cannot be read or do not fit.
    """
    names = _names(images)
    model = load_model(weights, config)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for image, name in zip(images, names, strict=True):
        pixels, result = run(model, image, config)
        Image.fromarray(overlay(pixels, result, config)).save(out / name)
        written.append(out / name)
    return written


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


def overlay(pixels: np.ndarray, result: Prediction, config: Config) -> np.ndarray:
    """Paint the masks of a result over pixels (H, W, 3), with outlines and class names."""
    canvas = pixels.astype(np.float32)
    labels = []
    names = class_table(config.dataset.name, config.dataset.task).names
    for index, (mask, category, score) in enumerate(_regions(result)):
        color = _color(index)
        canvas[mask] = (1 - _OPACITY) * canvas[mask] + _OPACITY * color
        canvas[_outline(mask)] = color
        labels.append((mask, f"{names[category]}{f' {score:.2f}' if score else ''}"))
    return _with_text(canvas.round().clip(0, 255).astype(np.uint8), labels)


def _regions(result: Prediction) -> Iterator[tuple[np.ndarray, int, float]]:
    """(mask (H, W) bool, class, score or 0) of what is to be painted."""
    if "panoptic_seg" in result:
        ids, segments = result["panoptic_seg"]
        for segment in segments:
            yield (ids == segment["id"]).cpu().numpy(), segment["category_id"], 0.0
    elif "instances" in result:
        found = result["instances"]
        found = found[found.scores >= _MIN_SCORE]
        for mask, category, score in zip(found.pred_masks, found.pred_classes, found.scores, strict=True):
            yield mask.cpu().numpy(), int(category), float(score)
    else:
        classes: Tensor = result["sem_seg"].argmax(0)
        for category in classes.unique().tolist():
            yield (classes == category).cpu().numpy(), category, 0.0


def _color(index: int) -> np.ndarray:
    """Well separated hues by the golden ratio, as RGB (3,) in 0 … 255."""
    import colorsys

    return 255 * np.array(colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, 0.75, 1.0), dtype=np.float32)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (H, W) with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _with_text(pixels: np.ndarray, labels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Write each label at the top left of its mask's box."""
    from PIL import ImageDraw

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for mask, text in labels:
        left, top = boxes_of(torch.from_numpy(mask)[None])[0, :2].tolist()
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
