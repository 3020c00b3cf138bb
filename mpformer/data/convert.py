"""Converting official downloads into what training reads, in the layouts that Mask2Former's users have. No torch.

COCO: panoptic PNG -> semantic PNG. ADE20K: scene parsing and instance annotations -> semantic, panoptic and instance
files. Cityscapes: label and instance ids -> training labels and panoptic files. Conversions run in processes, go on
where they stopped, and leave a checksum manifest (``mpformer_manifest.json``) beside what they wrote.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpformer.config.classes import category_ids, class_table
from mpformer.data.coco_layout import (
    Record,
    box,
    encode_mask,
    id_to_rgb,
    png,
    read_json,
    rgb_to_id,
    write_atomically,
    write_json,
)
from mpformer.data.prepare import Chunk, Progress, chunks_of, run_chunks
from mpformer.runtime.errors import UserError, choices

IGNORE = 255
MANIFEST = "mpformer_manifest.json"
#: converts image ``index`` of a job; returns its record, with the checksums of the files that it wrote under "files"
Convert = Callable[[int], Record]


@dataclass(frozen=True)
class Job:
    """One split of one conversion: where it keeps its progress, how many images, and what makes each."""

    directory: Path
    name: str
    count: int
    convert: Convert


def convert(name: str, data_root: Path, progress: Progress | None = None, workers: int | None = None) -> Path:
    """Convert a downloaded release below the data root; returns its directory.

    Raises UserError if a part of the release is missing or damaged, or the directory cannot be written.
    """
    if name not in _CONVERTERS:
        raise choices("dataset to convert", name, _CONVERTERS)
    directory = Path(data_root) / _DIRECTORIES[name]
    if not directory.is_dir():
        raise UserError(f"{directory} is not there; see: mpformer data check {name}")
    try:
        files = _CONVERTERS[name](directory, progress, workers)
        write_json(directory / MANIFEST, {"schema": 1, "name": name, "files": dict(sorted(files.items()))})
    except PermissionError as error:
        raise UserError(f"cannot write below {directory}: {error.strerror}") from None
    shutil.rmtree(directory / ".convert", ignore_errors=True)
    return directory


def _run(jobs: Sequence[Job], progress: Progress | None, workers: int | None) -> list[list[Record]]:
    """The records of each job's images, in order; finished chunks of an earlier attempt are read back."""
    total, done = sum(job.count for job in jobs), 0
    results = []
    for job in jobs:
        place = job.directory / ".convert" / job.name
        (place / "chunks").mkdir(parents=True, exist_ok=True)
        chunks = chunks_of(job.name, job.count)
        missing = [c for c in chunks if not (place / "chunks" / c.file).exists()]
        done += job.count - sum(c.stop - c.start for c in missing)
        for chunk in run_chunks(partial(_convert_chunk, job.convert), place, missing, workers):
            done += chunk.stop - chunk.start
            if progress:
                progress(done, total)
        results.append([r for c in chunks for r in json.loads((place / "chunks" / c.file).read_text())])
    return results


def _convert_chunk(convert_one: Convert, _: Path, chunk: Chunk) -> list[Record]:
    return [convert_one(index) for index in range(chunk.start, chunk.stop)]


def _written(root: Path, path: Path, content: bytes) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return {str(path.relative_to(root)): write_atomically(path, content)}


def _checksums(results: Sequence[Sequence[Record]]) -> dict[str, str]:
    return {path: sha for records in results for record in records for path, sha in record["files"].items()}


def _labels(path: Path, name: str) -> NDArray[Any]:
    try:
        with Image.open(path) as file:
            return np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); see: mpformer data check {name}") from None


def _stems(folder: Path, suffix: str, name: str) -> list[str]:
    found = sorted(str(p.relative_to(folder)).removesuffix(suffix) for p in folder.rglob(f"*{suffix}"))
    if not found:
        raise UserError(f"{folder} holds no *{suffix}; see: mpformer data check {name}")
    return found


def _segment(number: int, category: int, mask: NDArray[np.bool_], crowd: bool = False) -> Record:
    area = int(mask.sum())
    return {"id": number, "category_id": category, "area": area, "bbox": box(mask), "iscrowd": int(crowd)}


# --- COCO -------------------------------------------------------------------------------------------------------


def _convert_coco(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    jobs = []
    for split in ("train2017", "val2017"):
        count = len(_coco_annotations(root / "annotations" / f"panoptic_{split}.json"))
        jobs.append(Job(root, f"panoptic_semseg_{split}", count, partial(_coco_semantic, root, split)))
    return _checksums(_run(jobs, progress, workers))


@lru_cache(maxsize=2)
def _coco_annotations(path: Path) -> list[Record]:
    return read_json(path, "see: mpformer data check coco")["annotations"]


def _coco_semantic(root: Path, split: str, index: int) -> Record:
    """Every pixel gets its segment's contiguous class (a crowd's too); void is ignored."""
    annotation = _coco_annotations(root / "annotations" / f"panoptic_{split}.json")[index]
    ids = rgb_to_id(_labels(root / f"panoptic_{split}" / annotation["file_name"], "coco"))
    contiguous = {category: i for i, category in enumerate(category_ids("coco", "panoptic"))}
    semantic = np.full(ids.shape, IGNORE, dtype=np.uint8)
    for segment in annotation["segments_info"]:
        if segment["category_id"] not in contiguous:
            where = f"annotations/panoptic_{split}.json, {annotation['file_name']}"
            raise UserError(f"{where}: category id {segment['category_id']} is not in COCO's list of {len(contiguous)}")
        semantic[ids == segment["id"]] = contiguous[segment["category_id"]]
    return {"files": _written(root, root / f"panoptic_semseg_{split}" / annotation["file_name"], png(semantic))}


# --- ADE20K -----------------------------------------------------------------------------------------------------

_ADE_FOLDERS = {"train": "training", "val": "validation"}


def _convert_ade20k(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    stems = {split: _stems(root / "annotations" / f, ".png", "ade20k") for split, f in _ADE_FOLDERS.items()}
    jobs = [Job(root, split, len(names), partial(_ade_image, root, split, names)) for split, names in stems.items()]
    results = _run(jobs, progress, workers)
    files = _checksums(results)
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
    classes = _labels(root / "annotations" / folder / f"{stem}.png", "ade20k").astype(np.int32) - 1
    if classes.max(initial=0) >= 150:
        raise UserError(f"annotations/{folder}/{stem}.png holds class {classes.max() + 1}; valid: 0-150")
    semantic = np.where(classes < 0, IGNORE, classes).astype(np.uint8)
    files = _written(root, root / "annotations_detectron2" / folder / f"{stem}.png", png(semantic))
    record: Record = {
        "image": {"id": stem, "file_name": f"{stem}.jpg", "height": classes.shape[0], "width": classes.shape[1]}
    }
    instance_file = root / "annotations_instance" / folder / f"{stem}.png"
    if instance_file.exists():
        numbers = _instance_numbers(instance_file, classes.shape)
        ids, record["segments"], record["objects"] = _ade_segments(classes, numbers[..., 0], numbers[..., 1])
        files |= _written(root, root / f"ade20k_panoptic_{split}" / f"{stem}.png", png(id_to_rgb(ids)))
    return {**record, "files": files}


def _instance_numbers(file: Path, size: tuple[int, ...]) -> NDArray[np.int32]:
    """The instance PNG (H, W, 3), checked: its size, and a class of the challenge wherever there is an instance."""
    numbers = _labels(file, "ade20k").astype(np.int32)
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
            segments.append(_segment(len(segments) + 1, category, mask))
            ids[mask] = len(segments)
    for instance in np.unique(number[number > 0]).tolist():
        mask = number == instance
        challenge = int(instance_class[mask][0])
        segments.append(_segment(len(segments) + 1, table.thing_indices[challenge - 1], mask))
        objects.append({**segments[-1], "category_id": challenge, "segmentation": encode_mask(mask)})
        ids[mask] = len(segments)
    # an instance may have covered a stuff region whole
    present = {s["id"]: int((ids == s["id"]).sum()) for s in segments}
    kept = [_segment(s["id"], s["category_id"], ids == s["id"]) for s in segments if present[s["id"]]]
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


# --- Cityscapes -------------------------------------------------------------------------------------------------


def _convert_cityscapes(root: Path, progress: Progress | None, workers: int | None) -> dict[str, str]:
    fine = root / "gtFine"
    stems = {s: _stems(fine / s, "_gtFine_instanceIds.png", "cityscapes") for s in ("train", "val")}
    jobs = [Job(root, s, len(names), partial(_cityscapes_image, root, s, names)) for s, names in stems.items()]
    results = _run(jobs, progress, workers)
    files = _checksums(results)
    table, ids = class_table("cityscapes", "panoptic"), category_ids("cityscapes", "panoptic")
    categories = [
        {"id": i, "name": n, "isthing": int(t)} for i, n, t in zip(ids, table.names, table.is_thing, strict=True)
    ]
    for split, records in zip(stems, results, strict=True):
        content = {
            "images": [r["image"] for r in records],
            "annotations": [r["annotation"] for r in records],
            "categories": categories,
        }
        name = f"gtFine/cityscapes_panoptic_{split}.json"
        files[name] = write_json(root / name, content)
    return files


def _cityscapes_image(root: Path, split: str, stems: Sequence[str], index: int) -> Record:
    """Training labels and the panoptic PNG of one image; the same as Cityscapes' own scripts make (tested)."""
    stem = stems[index]
    key = Path(stem).name
    fine = root / "gtFine"
    label_ids = _labels(fine / split / f"{stem}_gtFine_labelIds.png", "cityscapes")
    numbers = _labels(fine / split / f"{stem}_gtFine_instanceIds.png", "cityscapes").astype(np.int32)
    _check_label_ids(label_ids, numbers, f"gtFine/{split}/{stem}")
    train_ids = np.full(256, IGNORE, dtype=np.uint8)
    train_ids[list(category_ids("cityscapes", "semantic"))] = np.arange(19)
    files = _written(root, fine / split / f"{stem}_gtFine_labelTrainIds.png", png(train_ids[label_ids]))
    panoptic, segments = _cityscapes_segments(numbers)
    name = f"{key}_gtFine_panoptic.png"
    files |= _written(root, fine / f"cityscapes_panoptic_{split}" / name, png(id_to_rgb(panoptic)))
    h, w = numbers.shape
    return {
        "image": {"id": key, "width": w, "height": h, "file_name": f"{key}_gtFine_leftImg8bit.png"},
        "annotation": {"image_id": key, "file_name": name, "segments_info": segments},
        "files": files,
    }


_LABELS = 34
"""Cityscapes' label ids are 0-33."""


def _check_label_ids(label_ids: NDArray[Any], numbers: NDArray[np.int32], where: str) -> None:
    found = np.unique(np.where(numbers < 1000, numbers, numbers // 1000))
    outside = sorted({int(i) for i in (*np.unique(label_ids), *found) if i >= _LABELS})
    if label_ids.shape != numbers.shape:
        raise UserError(f"{where}: labelIds are {label_ids.shape}, instanceIds {numbers.shape}; extract gtFine again")
    if outside:
        raise UserError(
            f"{where} holds label id {outside[0]}; valid: 0-{_LABELS - 1}; see: mpformer data check cityscapes"
        )


def _cityscapes_segments(numbers: NDArray[np.int32]) -> tuple[NDArray[np.int32], list[Record]]:
    """Ids below 1000 are label ids (of things: crowds), others label id x 1000 + instance."""
    is_thing = dict(
        zip(category_ids("cityscapes", "panoptic"), class_table("cityscapes", "panoptic").is_thing, strict=True)
    )
    panoptic, segments = np.zeros_like(numbers), []
    for number in np.unique(numbers).tolist():
        category = number if number < 1000 else number // 1000
        if category not in is_thing:
            continue
        mask = numbers == number
        panoptic[mask] = number
        segments.append(_segment(number, category, mask, crowd=number < 1000 and is_thing[category]))
    return panoptic, segments


_CONVERTERS = {"coco": _convert_coco, "ade20k": _convert_ade20k, "cityscapes": _convert_cityscapes}
_DIRECTORIES = {"coco": "coco", "ade20k": "ADEChallengeData2016", "cityscapes": "cityscapes"}
