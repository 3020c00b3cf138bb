"""Layer masks of images that the evaluation did not keep, computed again from the weights for the explorer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.masks import layer_mask_record, read_layer_masks, write_layer_masks
from mpformer.config.classes import class_table
from mpformer.config.schema import Config
from mpformer.data.validation import ValidationItems, validation_items
from mpformer.evaluation.layer_pass import ImageOutput, image_outputs
from mpformer.modeling.matcher import match_weights
from mpformer.modeling.meta_arch import build_model
from mpformer.modeling.weights import load_weights
from mpformer.runtime.errors import UserError
from mpformer.runtime.process import prepare_process

__all__ = ["mask_record", "pixels_of", "write_further_masks"]


def write_further_masks(config: Config, weights: Path, images: Sequence[int], out: Path, data_root: Path) -> None:
    """Add the layer masks of these validation images to the directory ``out``, which may hold some already.

    The files are those of ``layer_masks/``. Raises UserError for an image that is not among the evaluated ones, and
    for data or weights that are missing or do not fit.
    """
    items = _only(validation_items(config, data_root), images)
    device = prepare_process(config.runtime.device, config.runtime.threads, tf32=config.runtime.tf32)
    model = build_model(config)
    load_weights(model, weights)
    records = {int(record["image_id"]): record for record in _present(out)}
    pixels: dict[int, np.ndarray] = {i: _read_png(out / record["image"]) for i, record in records.items()}
    for image in image_outputs(model.to(device), items):
        records[image.image_id] = mask_record(config, image)
        pixels[image.image_id] = pixels_of(image)
    write_layer_masks(out, [{**record, "image": f"{i}.png"} for i, record in sorted(records.items())], pixels)


def mask_record(config: Config, image: ImageOutput) -> dict[str, Any]:
    """One image's record of ``layer_masks/``, see :func:`analysis.masks.layer_mask_record`."""
    table = class_table(config.dataset.name, config.dataset.task)
    return layer_mask_record(
        image.image_id,
        image.prediction,
        image.masks,
        image.labels,
        class_names=table.names,
        things=table.is_thing,
        file_name=Path(image.item.inputs["file_name"]).name,
        weights=match_weights(config.model),
    )


def pixels_of(image: ImageOutput) -> np.ndarray:
    """The model's input as (H, W, 3) uint8 RGB."""
    pixels: np.ndarray = image.item.inputs["image"].permute(1, 2, 0).contiguous().numpy()
    return pixels


def _only(items: ValidationItems, images: Sequence[int]) -> ValidationItems:
    """Restrict the items to some images."""
    known = {int(record["image_id"]) for record in items.records}
    if unknown := [i for i in images if i not in known]:
        ids = sorted(known)
        raise UserError(
            f"unknown validation image {unknown[0]}; {len(ids)} images have ids from {ids[0]} to {ids[-1]}, "
            f"such as {', '.join(map(str, ids[:5]))}"
        )
    return items.only([index for index, record in enumerate(items.records) if int(record["image_id"]) in set(images)])


def _present(out: Path) -> list[dict[str, Any]]:
    return read_layer_masks(out) if (out / "index.json").exists() else []


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)
