"""ADE20K (ADEChallengeData2016): its files; scene parsing and instance annotations -> semantic, panoptic, instances."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpformer.config.classes import class_table
from mpformer.data.chunks import Progress
from mpformer.data.coco_layout import Record, encode_mask, id_to_rgb, png, write_json
from mpformer.data.coco_reader import SplitFiles, read_coco_like
from mpformer.data.convert import IGNORE, Job, checksums, read_labels, run_jobs, segment_of, stems_in, written
from mpformer.data.packed import Records
from mpformer.data.sources import Expected, Release
from mpformer.runtime.errors import UserError

FILES = tuple(
    expected
    for folder, split, images in (("training", "train", 20210), ("validation", "val", 2000))
    for expected in (
        Expected(f"ADEChallengeData2016/images/{folder}", "all tasks", images, ".jpg"),
        Expected(f"ADEChallengeData2016/annotations_detectron2/{folder}", "semantic", images, ".png"),
        Expected(f"ADEChallengeData2016/ade20k_panoptic_{split}.json", "panoptic"),
        Expected(f"ADEChallengeData2016/ade20k_panoptic_{split}", "panoptic", images, ".png"),
        Expected(f"ADEChallengeData2016/ade20k_instance_{split}.json", "instance"),
    )
)
ADVICE = (
    "get ADEChallengeData2016 and data/ChallengeData2017/annotations_instance.tar from "
    "http://sceneparsing.csail.mit.edu, the second into the first (annotations_instance beside annotations); then: "
    "mpformer data prepare ade20k"
)


def read_split(root: Path, split: str, tasks: frozenset[str]) -> Records:
    """Read a split below the data root ``root``; see :mod:`mpformer.data.catalog` for the records."""
    ade, folder = root / "ADEChallengeData2016", _ADE_FOLDERS[split]
    files = SplitFiles(
        "ade20k",
        ade / "images" / folder,
        ade / f"ade20k_instance_{split}.json",
        ade / f"ade20k_panoptic_{split}.json",
        ade / f"ade20k_panoptic_{split}",
        ade / "annotations_detectron2" / folder,
        ".jpg",
        "see: mpformer data check ade20k",
    )
    return read_coco_like(files, tasks)


def labels_of(data_root: Path, image: Path) -> Path:
    """The semantic labels of a validation image."""
    return data_root / "ADEChallengeData2016/annotations_detectron2/validation" / f"{image.stem}.png"


_ADE_FOLDERS = {"train": "training", "val": "validation"}


def convert(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    stems = {split: stems_in(root / "annotations" / f, ".png", "ade20k") for split, f in _ADE_FOLDERS.items()}
    jobs = [Job(root, split, len(names), partial(_ade_image, root, split, names)) for split, names in stems.items()]
    results = run_jobs(jobs, progress, workers)
    files = checksums(results)
    for split, records in zip(stems, results, strict=True):
        files |= _write_ade_json(root, split, records)
    return files


def _ade_image(root: Path, split: str, stems: Sequence[str], index: int) -> Record:
    """Semantic PNG; and, if the instance annotations are there, panoptic PNG, segments and instances.

    In the scene parsing PNG 0 is "other", 1-150 are classes. In the instance PNG red is the class of the instance
    challenge (1-100), green the number of the instance (0: none). Panoptic things are the instances; pixels of a thing
    class without an instance are void.
    """
    stem, folder = stems[index], _ADE_FOLDERS[split]
    classes = read_labels(root / "annotations" / folder / f"{stem}.png", "ade20k").astype(np.int32) - 1
    if classes.max(initial=0) >= 150:
        raise UserError(f"annotations/{folder}/{stem}.png holds class {classes.max() + 1}; valid: 0-150")
    semantic = np.where(classes < 0, IGNORE, classes).astype(np.uint8)
    files = written(root, root / "annotations_detectron2" / folder / f"{stem}.png", png(semantic))
    record: Record = {
        "image": {"id": stem, "file_name": f"{stem}.jpg", "height": classes.shape[0], "width": classes.shape[1]}
    }
    instance_file = root / "annotations_instance" / folder / f"{stem}.png"
    if instance_file.exists():
        numbers = _instance_numbers(instance_file, classes.shape)
        ids, record["segments"], record["objects"] = _ade_segments(classes, numbers[..., 0], numbers[..., 1])
        files |= written(root, root / f"ade20k_panoptic_{split}" / f"{stem}.png", png(id_to_rgb(ids)))
    return {**record, "files": files}


def _instance_numbers(file: Path, size: tuple[int, ...]) -> NDArray[np.int32]:
    """The instance PNG (H, W, 3), checked: its size, and a class of the challenge wherever there is an instance."""
    numbers = read_labels(file, "ade20k").astype(np.int32)
    where = f"{file.parent.parent.name}/{file.parent.name}/{file.name}"
    if numbers.ndim != 3 or numbers.shape[:2] != size:
        raise UserError(f"{where} is {numbers.shape}, an RGB map of {size} is needed; see: mpformer data check ade20k")
    classes, things = numbers[..., 0][numbers[..., 1] > 0], len(class_table("ade20k", "instance"))
    outside = classes[(classes < 1) | (classes > things)]
    if len(outside):
        raise UserError(f"{where} holds an instance of class {outside[0]}; valid: 1-{things}")
    return numbers


def _ade_segments(
    classes: NDArray[np.int32], instance_class: NDArray[np.int32], number: NDArray[np.int32]
) -> tuple[NDArray[np.int32], list[Record], list[Record]]:
    table = class_table("ade20k", "panoptic")
    ids = np.zeros(classes.shape, dtype=np.int32)
    segments: list[Record] = []
    objects: list[Record] = []
    for category in np.unique(classes[classes >= 0]).tolist():
        if not table.is_thing[category]:
            mask = classes == category
            segments.append(segment_of(len(segments) + 1, category, mask))
            ids[mask] = len(segments)
    for instance in np.unique(number[number > 0]).tolist():
        mask = number == instance
        challenge = int(instance_class[mask][0])
        segments.append(segment_of(len(segments) + 1, table.thing_indices[challenge - 1], mask))
        objects.append({**segments[-1], "category_id": challenge, "segmentation": encode_mask(mask)})
        ids[mask] = len(segments)
    # an instance may have covered a stuff region whole
    present = {s["id"]: int((ids == s["id"]).sum()) for s in segments}
    kept = [segment_of(s["id"], s["category_id"], ids == s["id"]) for s in segments if present[s["id"]]]
    return ids, kept, objects


def _write_ade_json(root: Path, split: str, records: Sequence[Record]) -> dict[str, str]:
    complete = [r for r in records if "segments" in r]
    if not complete:
        return {}
    if len(complete) < len(records):
        missing = next(r["image"]["id"] for r in records if "segments" not in r)
        raise UserError(
            f"annotations_instance lacks {len(records) - len(complete)} files of {split} (first: {missing})"
        )
    numbered = [{**r, "image": {**r["image"], "id": i + 1}} for i, r in enumerate(complete)]
    images = [r["image"] for r in numbered]
    table = class_table("ade20k", "panoptic")
    categories = [
        {"id": i, "name": n, "isthing": int(t)}
        for i, (n, t) in enumerate(zip(table.names, table.is_thing, strict=True))
    ]
    panoptic = [
        {
            "image_id": r["image"]["id"],
            "file_name": f"{r['image']['file_name'][:-4]}.png",
            "segments_info": r["segments"],
        }
        for r in numbered
    ]
    objects = [{**o, "image_id": r["image"]["id"]} for r in numbered for o in r["objects"]]
    instances = {
        "images": images,
        "annotations": [{**o, "id": i + 1} for i, o in enumerate(objects)],
        "categories": [{"id": i + 1, "name": n} for i, n in enumerate(table.things)],
    }
    contents = {
        f"ade20k_panoptic_{split}.json": {"images": images, "annotations": panoptic, "categories": categories},
        f"ade20k_instance_{split}.json": instances,
    }
    return {name: write_json(root / name, content) for name, content in contents.items()}


SOURCE = Release("ade20k-challenge-2016", read_split, FILES, ADVICE, labels_of, convert)
