"""Reading COCO instance JSON, COCO panoptic JSON + PNG and semantic PNG into detectron2's standard dicts.

The records are detectron2's own reader's (a test compares them), read piece by piece and kept packed; the category
lists are compared with the dataset's own, and each way in which a file can be broken is one clear error.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpformer.config.classes import category_ids, class_table, tasks_of
from mpformer.data.coco_layout import Layout
from mpformer.data.json_stream import ARRAY, elements
from mpformer.data.packed import FIELDS, Packed, Packer, Records, grouped, pack
from mpformer.runtime.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class SplitFiles:
    """Where one split of a COCO-like dataset keeps its files; None: it has no such annotations."""

    dataset: str
    images: Path
    instances: Path | None = None
    panoptic: Path | None = None
    panoptic_png: Path | None = None
    semantic_png: Path | None = None
    suffix: str = ".png"
    advice: str = ""
    """What to do where something is wrong."""
    exact_names: bool = False
    """This project wrote it: class names must be the table's, not only their ids; images are known by id, and by the
    names that the files give them."""


def read_prepared(
    dataset: str, root: Path, split: str, tasks: frozenset[str], command: str = "mpformer data prepare"
) -> Records:
    """Read a split of a dataset that this project wrote below ``root``, see :mod:`mpformer.data.coco_layout`.

    ``command`` is what writes it, for the line on what is wrong with it.
    """
    layout, stuff = Layout(root, split), "semantic" in tasks_of(dataset)
    files = SplitFiles(
        dataset,
        layout.images,
        layout.instances_json,
        layout.panoptic_json if stuff else None,
        layout.panoptic if stuff else None,
        layout.semantic if stuff else None,
        advice=f"remove {root} and run: {command} {dataset}",
        exact_names=True,
    )
    return read_coco_like(files, tasks)


def read_coco_like(files: SplitFiles, tasks: frozenset[str]) -> Records:
    """Read the annotations that the tasks need and join them by image, in the order of image ids."""
    parts = []
    if "instance" in tasks:
        parts.append(_read_instances(files))
    if "panoptic" in tasks:
        parts.append(_read_panoptic(files))
    if "semantic" in tasks:
        parts.append(_read_semantic(files))
    return _join(parts, files)


@dataclass(frozen=True)
class _Part:
    """What one annotation file says: a record an image, in the order of image ids, with the keys that join them."""

    keys: Sequence[str]
    records: Records


def _join(parts: Sequence[_Part], files: SplitFiles) -> Records:
    """Merge the records of one image, known by its file's stem (ours: by its id), from several annotation files."""
    stems = set(parts[0].keys).intersection(*(part.keys for part in parts[1:]))
    if any(len(part.keys) != len(stems) for part in parts) or not stems:
        counts = ", ".join(str(len(part.keys)) for part in parts)
        raise UserError(f"the annotation files of {files.images} list different images ({counts}); {files.advice}")
    return parts[0].records if len(parts) == 1 else pack(_merged(parts))


def _merged(parts: Sequence[_Part]) -> Iterator[Record]:
    """The first part that says something counts; image ids are those of annotation files before made-up ones."""
    indices = [{key: index for index, key in enumerate(part.keys)} for part in parts]
    for key in parts[0].keys:
        record: Record = {}
        for part, index in zip(parts, indices, strict=True):
            record = {**part.records[index[key]], **record}
        yield record


def _stream(path: Path, advice: str) -> Iterator[tuple[str, Any]]:
    """The elements of an annotation file; raises UserError if it is missing, damaged, or lacks what one has."""
    arrays = set()
    try:
        for key, element in elements(path):
            if element is ARRAY:
                arrays.add(key)
            else:
                yield key, element
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, not JSON ({error}); {advice}") from None
    if not arrays >= {"images", "annotations", "categories"}:
        raise UserError(f"{path} lacks images, annotations or categories; {advice}")


def _read_instances(files: SplitFiles) -> _Part:
    """What detectron2's ``load_coco_json`` gives, read piece by piece: the files are too large to be read whole."""
    path = files.instances
    assert path is not None
    lookup = {category: i for i, category in enumerate(category_ids(files.dataset, "instance"))}
    images, categories, of, numbers, marks = [], [], [], array("q"), Packer()
    same: dict[Any, Any] = {}  # one object an image id, not one an annotation
    unknown: KeyError | None = None
    try:
        for key, element in _stream(path, files.advice):
            if key == "images":
                images.append((element["id"], element["file_name"], element["height"], element["width"]))
            elif key == "categories":
                categories.append(element)
            elif key == "annotations":
                numbers.append(element["id"])
                try:
                    mark = _mark(element, lookup)
                except KeyError as error:
                    unknown = unknown or error
                    continue
                if mark is not None:
                    marks.add(tuple(mark.get(name) for name in FIELDS))
                    of.append(same.setdefault(element["image_id"], element["image_id"]))
    except KeyError as error:
        raise _unknown_category(files, path, error) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid COCO annotations: {error}; {files.advice}") from None
    _check_categories(files, path, "instance", categories)
    if unknown is not None:
        raise _unknown_category(files, path, unknown)
    if len(np.unique(np.asarray(numbers))) < len(numbers):
        raise UserError(f"{path} is not valid COCO annotations: its annotation ids are not unique; {files.advice}")
    return _instance_part(files, sorted(images), marks, of)


def _instance_part(files: SplitFiles, images: Sequence[tuple[Any, ...]], marks: Packer, of: Sequence[Any]) -> _Part:
    heads, keys = Packer(), []
    for number, name, height, width in images:
        record = {"file_name": str(files.images / name), "height": height, "width": width, "image_id": number}
        heads.add(record)
        keys.append(_key(files, record))
    indices = {image[0]: index for index, image in enumerate(images)}
    return _Part(keys, grouped(heads.packed(), marks.packed(), [indices.get(image, -1) for image in of]))


def _mark(annotation: Record, lookup: Mapping[int, int]) -> Record | None:
    """An annotation as it is kept; None if it has polygons and none of three corners. KeyError for its category."""
    kept = {name: annotation[name] for name in FIELDS[:3] if name in annotation}
    kept["category_id"] = lookup[annotation["category_id"]]
    if "bbox" in kept and not kept["bbox"]:
        raise ValueError(f"annotation {annotation['id']} has an empty bbox")
    if annotation.get("ignore", 0):
        raise ValueError(f"annotation {annotation['id']} is to be ignored, which nothing here does")
    outline = annotation.get("segmentation")
    if isinstance(outline, dict) and isinstance(outline["counts"], list):
        from pycocotools import mask as coco

        outline = coco.frPyObjects(outline, *outline["size"])
    elif outline and not isinstance(outline, dict):
        outline = [polygon for polygon in outline if len(polygon) % 2 == 0 and len(polygon) >= 6]
        if not outline:
            return None
    return {**kept, "segmentation": outline} if outline else kept


def _read_panoptic(files: SplitFiles) -> _Part:
    path = files.panoptic
    assert path is not None
    assert files.panoptic_png is not None
    table = class_table(files.dataset, "panoptic")
    lookup = {category: i for i, category in enumerate(category_ids(files.dataset, "panoptic"))}
    images: dict[Any, tuple[Any, ...]] = {}
    categories, found, of = [], Packer(), []
    unknown: KeyError | None = None
    try:
        for key, element in _stream(path, files.advice):
            if key == "images":
                images[element["id"]] = (element.get("file_name"), element.get("height"), element.get("width"))
            elif key == "categories":
                categories.append(element)
            elif key == "annotations":
                try:
                    segments = [_segment(s, lookup, table.is_thing) for s in element["segments_info"]]
                except KeyError as error:
                    unknown = unknown or error
                    continue
                found.add((element["file_name"], segments))
                of.append(element["image_id"])
    except KeyError as error:
        raise _unknown_category(files, path, error) from None
    _check_categories(files, path, "panoptic", categories)
    missing = next((KeyError(image) for image in of if image not in images), None)
    if unknown or missing:
        raise _unknown_category(files, path, unknown or missing or KeyError())
    return _panoptic_part(files, files.panoptic_png, images, found.packed(), of)


def _panoptic_part(
    files: SplitFiles, folder: Path, images: Mapping[Any, tuple[Any, ...]], found: Packed, of: Sequence[Any]
) -> _Part:
    records, keys = Packer(), []
    for index in sorted(range(len(of)), key=lambda index: of[index]):
        png, segments = found[index]
        name, height, width = images[of[index]]
        image = files.images / (name if files.exact_names else Path(png).stem + files.suffix)
        about = {"file_name": str(image), "image_id": of[index], "height": height, "width": width}
        records.add({**about, "pan_seg_file_name": str(folder / png), "segments_info": segments})
        keys.append(_key(files, about))
    return _Part(keys, Records(records.packed()))


def _segment(info: Record, lookup: dict[int, int], is_thing: tuple[bool, ...]) -> Record:
    category = lookup[info["category_id"]]
    return {**info, "category_id": category, "isthing": is_thing[category], "iscrowd": info.get("iscrowd", 0)}


def _read_semantic(files: SplitFiles) -> _Part:
    folder = files.semantic_png
    assert folder is not None
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; {files.advice}")
    records = list(_own_semantic(files, folder) if files.exact_names else _found_semantic(files, folder))
    return _Part([_key(files, record) for record in records], pack(records))


def _found_semantic(files: SplitFiles, folder: Path) -> Iterator[Record]:
    # of images and of labels, so that a file that only one of the folders has is missed in the other
    stems = {p.stem for p in folder.glob("*.png")} | {p.stem for p in files.images.glob(f"*{files.suffix}")}
    for number, stem in enumerate(sorted(stems), start=1):
        labels = str(folder / f"{stem}.png")
        image = str(files.images / (stem + files.suffix))
        yield {"file_name": image, "sem_seg_file_name": labels, "image_id": number}


def _own_semantic(files: SplitFiles, folder: Path) -> Iterator[Record]:
    """What this project wrote lists its images, and its label maps are called after their ids."""
    assert files.panoptic is not None
    images = [element for key, element in _stream(files.panoptic, files.advice) if key == "images"]
    for image in sorted(images, key=lambda image: image["id"]):
        yield {
            "file_name": str(files.images / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "sem_seg_file_name": str(folder / f"{image['id']:06d}.png"),
        }


def _key(files: SplitFiles, record: Record) -> str:
    return f"{record['image_id']:012d}" if files.exact_names else Path(record["file_name"]).stem


def _check_categories(files: SplitFiles, path: Path, task: str, categories: Sequence[Record]) -> None:
    """Compare an annotation file's category list with the static table; raises UserError."""
    expected = dict(zip(category_ids(files.dataset, task), class_table(files.dataset, task).names, strict=True))
    given = {c["id"]: c["name"] for c in categories}
    # release files differ in how they spell names ("tub" and "bathtub"): there the ids are what counts
    same = given == expected if files.exact_names else set(given) == set(expected)
    if not same:
        wrong = sorted(set(given.items()) ^ set(expected.items()), key=str)[:3]
        raise UserError(
            f"{path} has another class list than {files.dataset} ({len(given)} categories, {len(expected)} expected; "
            f"first differences: {wrong}); {files.advice}"
        )


def _unknown_category(files: SplitFiles, path: Path, error: KeyError) -> UserError:
    return UserError(f"{path} uses the category id or key {error} that is not in its class list; {files.advice}")
