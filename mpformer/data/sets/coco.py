"""COCO 2017: its files, and panoptic PNG -> semantic PNG, as Mask2Former's users have them. No torch but to read it."""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mpformer.config.classes import category_ids
from mpformer.data.chunks import Progress
from mpformer.data.coco_layout import Record, png, read_json, rgb_to_id
from mpformer.data.coco_reader import SplitFiles, read_coco_like
from mpformer.data.convert import IGNORE, Job, checksums, read_labels, run_jobs, written
from mpformer.data.packed import Records
from mpformer.data.sources import Expected, Release
from mpformer.runtime.errors import UserError

FILES = tuple(
    expected
    for split, images in (("train", 118287), ("val", 5000))
    for expected in (
        Expected(f"coco/{split}2017", "all tasks", images, ".jpg"),
        Expected(f"coco/annotations/instances_{split}2017.json", "instance"),
        Expected(f"coco/annotations/panoptic_{split}2017.json", "panoptic"),
        Expected(f"coco/panoptic_{split}2017", "panoptic", images, ".png"),
        Expected(f"coco/panoptic_semseg_{split}2017", "semantic", images, ".png"),
    )
)
ADVICE = (
    "get train2017, val2017, annotations_trainval2017 and panoptic_annotations_trainval2017 from "
    "https://cocodataset.org/#download and unpack them below <data root>/coco; then: mpformer data prepare coco"
)


def read_split(root: Path, split: str, tasks: frozenset[str]) -> Records:
    """Read a split below the data root ``root``; see :mod:`mpformer.data.catalog` for the records."""
    coco, annotations = root / "coco", root / "coco" / "annotations"
    files = SplitFiles(
        "coco",
        coco / f"{split}2017",
        annotations / f"instances_{split}2017.json",
        annotations / f"panoptic_{split}2017.json",
        coco / f"panoptic_{split}2017",
        coco / f"panoptic_semseg_{split}2017",
        ".jpg",
        "see: mpformer data check coco",
    )
    return read_coco_like(files, tasks)


def labels_of(data_root: Path, image: Path) -> Path:
    """The semantic labels of a validation image."""
    return data_root / "coco/panoptic_semseg_val2017" / f"{image.stem}.png"


def convert(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    jobs = []
    for split in ("train2017", "val2017"):
        count = len(_coco_annotations(root / "annotations" / f"panoptic_{split}.json"))
        jobs.append(Job(root, f"panoptic_semseg_{split}", count, partial(_coco_semantic, root, split)))
    return checksums(run_jobs(jobs, progress, workers))


@lru_cache(maxsize=2)
def _coco_annotations(path: Path) -> list[Record]:
    return read_json(path, "see: mpformer data check coco")["annotations"]


def _coco_semantic(root: Path, split: str, index: int) -> Record:
    """Every pixel gets its segment's contiguous class (a crowd's too); void is ignored."""
    annotation = _coco_annotations(root / "annotations" / f"panoptic_{split}.json")[index]
    ids = rgb_to_id(read_labels(root / f"panoptic_{split}" / annotation["file_name"], "coco"))
    contiguous = {category: i for i, category in enumerate(category_ids("coco", "panoptic"))}
    semantic = np.full(ids.shape, IGNORE, dtype=np.uint8)
    for segment in annotation["segments_info"]:
        if segment["category_id"] not in contiguous:
            where = f"annotations/panoptic_{split}.json, {annotation['file_name']}"
            raise UserError(f"{where}: category id {segment['category_id']} is not in COCO's list of {len(contiguous)}")
        semantic[ids == segment["id"]] = contiguous[segment["category_id"]]
    return {"files": written(root, root / f"panoptic_semseg_{split}" / annotation["file_name"], png(semantic))}


SOURCE = Release("coco-2017", read_split, FILES, ADVICE, labels_of, convert)
