"""Miniature copies of COCO, ADE20K and Cityscapes in their true on-disk layouts, made of drawn images. No torch.

They let every step of the path to the real datasets run where those are not at hand. A miniature holds what the
official download holds; :func:`mpformer.data.convert.convert` makes the rest, as for the real thing. The classes are
the full official lists; which drawn shape stands for which class changes from image to image.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.classes import category_ids, class_table
from mpformer.config.datasets import ClassTable
from mpformer.config.schema import ShapesConfig
from mpformer.data.coco_layout import box, id_to_rgb, write_json
from mpformer.data.scene import Scene, Segment
from mpformer.data.sets.shapes import generate
from mpformer.runtime.errors import choices


def write_miniature(name: str, data_root: Path, images: int = 6, side: int = 96) -> Path:
    """Write ``images`` training and half as many validation images of about ``side`` px; returns the directory.

    Raises UserError for a dataset that has no miniature.
    """
    if name not in _WRITERS:
        raise choices("dataset with a miniature", name, _WRITERS)
    config = ShapesConfig(side=side, train_images=images, val_images=images)
    table = class_table(name, "panoptic")
    counts = {"train": images, "val": max(images // 2, 1)}
    scenes = {
        split: [_official(generate(config, split, i), table, i) for i in range(count)]
        for split, count in counts.items()
    }
    return _WRITERS[name](Path(data_root), scenes, table)


def _official(scene: Scene, table: ClassTable, index: int) -> Scene:
    """The scene with the dataset's own classes, and not always square."""
    things = table.thing_indices
    stuff = [i for i, thing in enumerate(table.is_thing) if not thing]

    def category(segment: Segment) -> int:
        pool, offset = (things, 0) if segment.thing else (stuff, 8)
        return pool[(segment.category - offset + 5 * index) % len(pool)]

    image, ids = scene.image[: -(index % 3) * 4 or None], scene.ids[: -(index % 3) * 4 or None]
    present = set(np.unique(ids).tolist())
    segments = tuple(Segment(s.id, category(s), s.thing) for s in scene.segments if s.id in present)
    return Scene(image, ids, segments)


def _jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=92)


def _png(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """The outer outlines (x, y, x, y ...) of a mask's parts, by falling area; parts without an area are left out."""
    import cv2

    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    found = sorted((c.reshape(-1, 2) for c in contours if len(c) >= 3), key=cv2.contourArea, reverse=True)
    return [c.reshape(-1).tolist() for c in found]


# --- COCO -------------------------------------------------------------------------------------------------------


def _write_coco(root: Path, scenes: dict[str, list[Scene]], table: ClassTable) -> Path:
    coco = root / "coco"
    ids = category_ids("coco", "panoptic")
    categories = [
        {"id": i, "name": n, "isthing": int(t)} for i, n, t in zip(ids, table.names, table.is_thing, strict=True)
    ]
    for split, found in scenes.items():
        images: list[Any] = []
        objects: list[Any] = []
        panoptic: list[Any] = []
        for index, scene in enumerate(found):
            # COCO's image ids neither start at 1 nor count up by 1
            number = 139 + 146 * index
            h, w = scene.ids.shape
            _jpeg(coco / f"{split}2017" / f"{number:012d}.jpg", scene.image)
            _png(coco / f"panoptic_{split}2017" / f"{number:012d}.png", id_to_rgb(scene.ids * 1000))
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": h, "width": w})
            objects += [_coco_object(scene, s, number, ids, len(objects) + k) for k, s in enumerate(_things(scene))]
            segments = [_coco_segment(scene, s, ids) for s in scene.segments]
            panoptic.append({"image_id": number, "file_name": f"{number:012d}.png", "segments_info": segments})
        annotations = coco / "annotations"
        annotations.mkdir(parents=True, exist_ok=True)
        things = [c for c in categories if c["isthing"]]
        instances = {"images": images, "annotations": objects, "categories": things}
        write_json(annotations / f"instances_{split}2017.json", instances)
        whole = {"images": images, "annotations": panoptic, "categories": categories}
        write_json(annotations / f"panoptic_{split}2017.json", whole)
    return coco


def _things(scene: Scene) -> list[Segment]:
    return [s for s in scene.segments if s.thing]


def _coco_object(scene: Scene, segment: Segment, image: int, ids: tuple[int, ...], number: int) -> dict[str, Any]:
    """A COCO annotation: polygons; every ninth a crowd, with uncompressed RLE as in COCO's files."""
    mask = scene.ids == segment.id
    crowd = number % 9 == 8
    outlines = polygons(mask)
    return {
        "id": 900100 + number,
        "image_id": image,
        "category_id": ids[segment.category],
        "iscrowd": int(crowd),
        "area": int(mask.sum()),
        "bbox": box(mask),
        "segmentation": _uncompressed(mask) if crowd or not outlines else outlines,
    }


def _uncompressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths in column order, the first of zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    ends = np.concatenate([[0], changes, [flat.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends).tolist()}


def _coco_segment(scene: Scene, segment: Segment, ids: tuple[int, ...]) -> dict[str, Any]:
    mask = scene.ids == segment.id
    category = ids[segment.category]
    return {"id": segment.id * 1000, "category_id": category, "iscrowd": 0, "area": int(mask.sum()), "bbox": box(mask)}


# --- ADE20K -----------------------------------------------------------------------------------------------------


def _write_ade20k(root: Path, scenes: dict[str, list[Scene]], table: ClassTable) -> Path:
    """The scene parsing release and the instance annotations beside it."""
    ade = root / "ADEChallengeData2016"
    challenge = {contiguous: i + 1 for i, contiguous in enumerate(table.thing_indices)}
    for split, found in scenes.items():
        folder = {"train": "training", "val": "validation"}[split]
        for index, scene in enumerate(found):
            stem = f"ADE_{split}_{index + 1:08d}"
            semantic = np.zeros(scene.ids.shape, dtype=np.uint8)
            instances = np.zeros((*scene.ids.shape, 3), dtype=np.uint8)
            for segment in scene.segments:
                mask = scene.ids == segment.id
                semantic[mask] = segment.category + 1
                if segment.thing:
                    instances[mask, :2] = challenge[segment.category], segment.id
            _jpeg(ade / "images" / folder / f"{stem}.jpg", scene.image)
            _png(ade / "annotations" / folder / f"{stem}.png", semantic)
            _png(ade / "annotations_instance" / folder / f"{stem}.png", instances)
    return ade


# --- Cityscapes -------------------------------------------------------------------------------------------------


def _write_cityscapes(root: Path, scenes: dict[str, list[Scene]], table: ClassTable) -> Path:
    """Images, polygons, label ids and instance ids; two cities a split. Every seventh thing is a group (a crowd)."""
    cityscapes = root / "cityscapes"
    ids = category_ids("cityscapes", "panoptic")
    for split, found in scenes.items():
        for index, scene in enumerate(found):
            city = f"{split}city{'ab'[index % 2]}"
            stem = f"{city}_{index:06d}_000019"
            fine = cityscapes / "gtFine" / split / city
            fine.mkdir(parents=True, exist_ok=True)
            _png(cityscapes / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", scene.image)
            labels, numbers, objects = _cityscapes_labels(scene, table, ids)
            _png(fine / f"{stem}_gtFine_labelIds.png", labels)
            _png(fine / f"{stem}_gtFine_instanceIds.png", numbers)
            h, w = scene.ids.shape
            content = {"imgHeight": h, "imgWidth": w, "objects": objects}
            (fine / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    return cityscapes


def _cityscapes_labels(
    scene: Scene, table: ClassTable, ids: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16], list[dict[str, Any]]]:
    labels, numbers = np.zeros(scene.ids.shape, np.uint8), np.zeros(scene.ids.shape, np.uint16)
    objects: list[dict[str, Any]] = []
    seen: dict[int, int] = {}
    for segment in scene.segments:
        mask, category = scene.ids == segment.id, ids[segment.category]
        group = segment.thing and len(objects) % 7 == 6
        count = seen[category] = seen.get(category, -1) + 1
        labels[mask] = category
        numbers[mask] = 1000 * category + count if segment.thing and not group else category
        name = table.names[segment.category] + ("group" if group else "")
        objects += [{"label": name, "polygon": np.reshape(p, (-1, 2)).tolist()} for p in polygons(mask)[:1]]
    return labels, numbers, objects


Writer = Callable[[Path, dict[str, list[Scene]], ClassTable], Path]
_WRITERS: dict[str, Writer] = {"coco": _write_coco, "ade20k": _write_ade20k, "cityscapes": _write_cityscapes}
