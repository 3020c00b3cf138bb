"""A small set of somebody's own, as an export has it: coloured plates on walls, drawn here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("plate", "bolt", "wall")
"""Bolts lie on plates, plates on walls: annotations overlap. A wall covers the lower three quarters."""
HEIGHT, WIDTH = 96, 128


@dataclass(frozen=True)
class OwnSet:
    """Where it lies."""

    root: Path

    @property
    def options(self) -> list[str]:
        """What `data add` is given."""
        files = {"--train": "train.json", "--val": "val.json", "--images": "train", "--val-images": "val"}
        return [word for option, name in files.items() for word in (option, str(self.root / name))]

    def read(self, split: str = "train") -> dict[str, Any]:
        """The annotation file."""
        content: dict[str, Any] = json.loads((self.root / f"{split}.json").read_text())
        return content

    def write(self, content: Mapping[str, Any], split: str = "train") -> None:
        """Replace the annotation file."""
        (self.root / f"{split}.json").write_text(json.dumps(content))


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    """A polygon."""
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def counts(mask: np.ndarray) -> dict[str, Any]:
    """A mask as uncompressed RLE."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes.tolist(), len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def write_own_set(root: Path, train: int = 6, val: int = 3) -> OwnSet:
    """Write COCO instances with polygons and RLE; the first image of a split has an RLE plate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            name = f"photo_{split}_{number}.jpg"
            images.append({"id": number * 7, "file_name": name, "height": HEIGHT, "width": WIDTH})
            pixels = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            pixels[24:] += 60
            boxes = [("wall", 0, 24, WIDTH, 72)]
            for _ in range(int(rng.integers(3, 5))):
                x, y = (int(v) for v in rng.integers((0, 24), (88, 64)))
                boxes += [("plate", x, y, 36, 28), ("bolt", x + 10, y + 8, 12, 10)]
            for kind, x, y, w, h in boxes:
                if kind != "wall":
                    pixels[y : y + h, x : x + w] = (200, 60, 60) if kind == "plate" else (60, 200, 60)
                annotations.append(_annotation(len(annotations) + 1, number, kind, (x, y, w, h), number == 1))
            Image.fromarray(pixels).save(root / split / name, quality=95)
        categories = [{"id": 3 + 2 * n, "name": name} for n, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return OwnSet(root)


def _annotation(number: int, image: int, kind: str, box: tuple[int, int, int, int], rle: bool) -> dict[str, Any]:
    x, y, w, h = box
    outline: Any = [rectangle(x, y, w, h)]
    if rle and kind == "plate":
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[y : y + h, x : x + w] = 1
        outline = counts(mask)
    of = {"id": number, "image_id": image * 7, "category_id": 3 + 2 * NAMES.index(kind), "iscrowd": 0}
    return {**of, "bbox": [x, y, w, h], "area": w * h, "segmentation": outline}
