"""Writing labelled images as COCO instance JSON, COCO panoptic JSON and PNG, and semantic PNG. No torch.

One prepared dataset is a directory::

    manifest.json                        name, fingerprint, parameters, splits, checksums, share of empty masks
    {split}/{id}.png                     images; of a set of the user's own kept whole, a link to where they lie
    annotations/instances_{split}.json   things; void objects are there as crowds, which detections may match freely
    annotations/panoptic_{split}.json    all segments (datasets with stuff only)
    panoptic_{split}/{id}.png            segment ids as red + 256 green + 65536 blue; 0 is void
    semantic_{split}/{id}.png            contiguous classes (things, then stuff); 255 is void

Every file is written under a temporary name and renamed, so that a file that is there is whole.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.datasets import ClassTable
from mpformer.data.scene import Scene, Segment
from mpformer.runtime.errors import UserError

VOID_CLASS = 255
STRIDES = (4, 8, 16, 32)
#: the two meanings of "empty at a stride", for the manifest
EMPTY_DEFINITIONS = {
    "area": "no cell of stride x stride pixels is covered by one half or more (beyond the border nothing is covered)",
    "bilinear": "no cell centre's bilinear sample (the mean of the four pixels around it) reaches one half",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where the files of one split of a prepared dataset are."""

    root: Path
    split: str

    @property
    def images(self) -> Path:
        return self.root / self.split

    @property
    def instances_json(self) -> Path:
        return self.root / "annotations" / f"instances_{self.split}.json"

    @property
    def panoptic_json(self) -> Path:
        return self.root / "annotations" / f"panoptic_{self.split}.json"

    @property
    def panoptic(self) -> Path:
        return self.root / f"panoptic_{self.split}"

    @property
    def semantic(self) -> Path:
        return self.root / f"semantic_{self.split}"

    def make(self, stuff: bool) -> None:
        """Create the directories."""
        self.instances_json.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.images, self.panoptic, self.semantic) if stuff else (self.images,):
            path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> str:
    """Write a file so that it is either absent or whole; returns its sha256."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, content: Any) -> str:
    """Write JSON atomically; returns its sha256."""
    return write_atomically(path, json.dumps(content, separators=(",", ":")).encode())


def png(array: NDArray[np.uint8]) -> bytes:
    """(H, W) or (H, W, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """(H, W) bool as COCO's compressed RLE with its counts as a string."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def id_to_rgb(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(H, W) segment ids as the (H, W, 3) colours of a panoptic PNG."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def rgb_to_id(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The segment ids (H, W) of a panoptic PNG (H, W, 3)."""
    r, g, b = (rgb[..., k].astype(np.int32) for k in range(3))
    return r + (g << 8) + (b << 16)


def semantic_map(scene: Scene) -> NDArray[np.uint8]:
    """(H, W) contiguous classes of a scene, 255 where it is void."""
    lookup = np.full(len(scene.segments) + 1, VOID_CLASS, dtype=np.uint8)
    for segment in scene.segments:
        lookup[segment.id] = segment.category
    return lookup[scene.ids]


def empty_at_stride(masks: NDArray[np.bool_], stride: int, kind: str = "area") -> NDArray[np.bool_]:
    """Which of the masks (n, H, W) vanish at an attention stride (a power of two); kind: see EMPTY_DEFINITIONS."""
    n, h, w = masks.shape
    cells = np.zeros((n, -(-h // stride) * stride, -(-w // stride) * stride), dtype=np.int16 if stride < 128 else int)
    cells[:, :h, :w] = masks
    half = stride // 2
    if kind == "bilinear":
        rows = cells[:, half - 1 :: stride] + cells[:, half::stride]
        cells, full = rows[:, :, half - 1 :: stride] + rows[:, :, half::stride], 4
    else:
        full = stride * stride
        while stride > 1:
            rows = cells[:, ::2] + cells[:, 1::2]
            cells, stride = rows[:, :, ::2] + rows[:, :, 1::2], stride // 2
    return np.asarray(~(2 * cells >= full).any(axis=(1, 2)))


def write_scene(layout: Layout, image_id: int, scene: Scene, stuff: bool) -> Record:
    """Write one image and its label images; returns what the JSON files and the manifest need of it."""
    name = f"{image_id:06d}.png"
    files = {layout.images / name: png(scene.image)}
    if stuff:
        files[layout.panoptic / name] = png(id_to_rgb(scene.ids))
        files[layout.semantic / name] = png(semantic_map(scene))
    h, w = scene.ids.shape
    masks = scene.ids == np.array([s.id for s in scene.segments], dtype=np.int32)[:, None, None]
    if not scene.segments and scene.objects:
        masks = np.stack([thing.mask for thing in scene.objects])
    return {
        "image": {"id": image_id, "file_name": name, "height": h, "width": w},
        "annotations": _annotations(image_id, scene, masks),
        "segments": [_segment_info(s, m) for s, m in zip(scene.segments, masks, strict=False)],
        "files": {str(p.relative_to(layout.root)): write_atomically(p, content) for p, content in files.items()},
        "content": _content(scene),
        "masks": len(masks),
        "empty": {k: {str(s): int(empty_at_stride(masks, s, k).sum()) for s in STRIDES} for k in EMPTY_DEFINITIONS},
    }


def _content(scene: Scene) -> str:
    """Checksum of the raw arrays and classes: the same on every machine, unlike a PNG's bytes."""
    digest = hashlib.sha256(scene.image.tobytes() + scene.ids.astype("<i4").tobytes())
    digest.update(repr([(s.id, s.category, s.thing) for s in scene.segments]).encode())
    for thing in scene.objects or ():
        digest.update(repr((thing.category, thing.crowd)).encode() + thing.mask.tobytes())
    return digest.hexdigest()


def _annotations(image_id: int, scene: Scene, masks: NDArray[np.bool_]) -> list[Record]:
    if scene.objects is not None:
        things = [(thing.category, thing.mask, int(thing.crowd)) for thing in scene.objects]
    else:
        things = [(s.category, m, int(s.crowd)) for s, m in zip(scene.segments, masks, strict=True) if s.thing]
    things += [(category, mask, 1) for category, mask in scene.hidden]
    return [
        {
            "id": image_id * 1000 + i + 1,
            "image_id": image_id,
            "category_id": category + 1,
            "iscrowd": crowd,
            "area": int(mask.sum()),
            "bbox": box(mask),
            "segmentation": encode_mask(mask),
        }
        for i, (category, mask, crowd) in enumerate(things)
    ]


def _segment_info(segment: Segment, mask: NDArray[np.bool_]) -> Record:
    what = {"id": segment.id, "category_id": segment.category + 1, "iscrowd": int(segment.crowd)}
    return {**what, "area": int(mask.sum()), "bbox": box(mask)}


def box(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's (x, y, width, height)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def write_annotations(layout: Layout, records: list[Record], table: ClassTable) -> dict[str, str]:
    """Write the JSON files of a split; returns their checksums by path."""
    images = [r["image"] for r in records]
    categories = [
        {"id": i + 1, "name": name, "isthing": int(thing)}
        for i, (name, thing) in enumerate(zip(table.names, table.is_thing, strict=True))
    ]
    annotations = [a for r in records for a in r["annotations"]]
    things = [c for c in categories if c["isthing"]]
    written = {layout.instances_json: {"images": images, "annotations": annotations, "categories": things}}
    if table.stuff:
        segments = [
            {
                "image_id": r["image"]["id"],
                "file_name": f"{r['image']['id']:06d}.png",
                "segments_info": r["segments"],
            }
            for r in records
        ]
        written[layout.panoptic_json] = {"images": images, "annotations": segments, "categories": categories}
    return {str(p.relative_to(layout.root)): write_json(p, content) for p, content in written.items()}


def split_summary(records: list[Record]) -> Record:
    """What the manifest says of a split."""
    return {
        "images": len(records),
        "objects": sum(len(r["annotations"]) for r in records),
        "masks": sum(r["masks"] for r in records),
        "content_sha256": hashlib.sha256("".join(r["content"] for r in records).encode()).hexdigest(),
    }


def attention_shares(records: Iterable[Record]) -> Record:
    """Percent of ground-truth masks that are empty at each attention stride, over the images where it was counted."""
    listed = [r for r in records if "empty" in r]
    total = max(sum(r["masks"] for r in listed), 1)
    shares = {
        kind: {str(s): round(100 * sum(r["empty"][kind][str(s)] for r in listed) / total, 3) for s in STRIDES}
        for kind in EMPTY_DEFINITIONS
    }
    return {"definitions": EMPTY_DEFINITIONS, "empty_percent": shares}


def write_manifest(
    root: Path,
    name: str,
    fingerprint: str,
    parameters: Mapping[str, Any],
    splits: Mapping[str, list[Record]],
    files: Mapping[str, str],
) -> None:
    """Write manifest.json, the last file of a prepared dataset."""
    everything = [r for records in splits.values() for r in records]
    checksums = {path: sha for r in everything for path, sha in r["files"].items()} | dict(files)
    manifest = {
        "schema": 1,
        "name": name,
        "fingerprint": fingerprint,
        "parameters": dict(parameters),
        "splits": {split: split_summary(records) for split, records in splits.items()},
        "attention": attention_shares(everything) if any("empty" in r for r in everything) else {},
        "files": dict(sorted(checksums.items())),
    }
    write_json(root / "manifest.json", manifest)


def read_json(path: Path, advice: str) -> Any:
    """Read a JSON file; raises UserError with the advice if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, not JSON ({error}); {advice}") from None
