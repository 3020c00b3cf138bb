"""Make the study's photographs from a checkout of a-hwang/building-facade-segmentation at fdf5324 (GitHub).

    python results/mini/facades.py CHECKOUT OUT

That export has a category twice, images of a split in a folder below it, and crops of one photograph in several splits.
Here each name is one category, and a hash of the photograph's name decides its part: train, val, or rest, which the
study does not use. Photographs are scaled to 320 pixels. CC BY 4.0 according to the annotation files.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 320
THINGS = ("window", "balcony-fence", "car", "shop", "traffic-infrastructure")
STUFF = ("facade", "street", "vegetation", "fence", "non-building-infrastructure")
IDS = {name: number for number, name in enumerate(THINGS + STUFF, 1)}
_ABOUT = {
    "info": {
        "description": "Building facades, 320 px",
        "source": "github.com/a-hwang/building-facade-segmentation at fdf5324",
    },
    "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}],
    "categories": [{"id": number, "name": name, "supercategory": "none"} for name, number in IDS.items()],
}


def part(photo: str) -> str:
    """The part that all crops of a photograph belong to."""
    rank = int(hashlib.sha256(photo.encode()).hexdigest(), 16) % 100
    return "rest" if rank < 12 else "val" if rank < 32 else "train"


def images(checkout: Path) -> Iterator[tuple[str, Path, list[tuple[str, dict[str, Any]]]]]:
    """Each image as (photograph, file, its annotations by category name)."""
    for split in ("train", "valid", "test"):
        content = json.loads((checkout / split / "_annotations.coco.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        marks = defaultdict(list)
        for annotation in content["annotations"]:
            marks[annotation["image_id"]].append((names[annotation["category_id"]], annotation))
        for image in content["images"]:
            name = image["file_name"]
            places = (checkout / split / name, checkout / split / "images" / name)
            photo = name.split("_scaled_")[0] if "_scaled_" in name else name.split(".rf.")[0]
            yield photo, next(place for place in places if place.exists()), marks[image["id"]]


def scaled(annotation: dict[str, Any], across: float, down: float) -> dict[str, Any] | None:
    """An annotation at the new size; None if it has no outline."""
    outlines = [ring for ring in annotation["segmentation"] if len(ring) >= 6]
    rings = [[round(x * (down if k % 2 else across), 1) for k, x in enumerate(ring)] for ring in outlines]
    if not rings:
        return None
    xs, ys = ([x for ring in rings for x in ring[first::2]] for first in (0, 1))
    box = [round(x, 1) for x in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))]
    area = round(annotation["area"] * across * down, 1)
    return {"segmentation": rings, "bbox": box, "area": area, "iscrowd": 0}


def make(checkout: Path, out: Path) -> None:
    """Write ``out/facades/<part>``: JPEGs, and ``_annotations.coco.json`` in COCO's instance format."""
    parts: dict[str, dict[str, list[Any]]] = defaultdict(lambda: {"images": [], "annotations": []})
    for photo, path, marks in images(checkout):
        name, content = part(photo), parts[part(photo)]
        folder = out / "facades" / name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        file = f"{hashlib.sha1(path.name.encode()).hexdigest()[:12]}.jpg"
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(folder / file, quality=88)
        number = len(content["images"]) + 1
        content["images"].append({"id": number, "file_name": file, "width": SIDE, "height": SIDE, "photo": photo})
        for category, annotation in marks:
            shape = scaled(annotation, SIDE / image.width, SIDE / image.height)
            if shape is not None:
                ids = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": IDS[category]}
                content["annotations"].append({**ids, **shape})
    for name, content in parts.items():
        (out / "facades" / name / "_annotations.coco.json").write_text(
            json.dumps({**_ABOUT, **content}, separators=(",", ":"))
        )
        print(name, len(content["images"]), "images,", len(content["annotations"]), "annotations")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
