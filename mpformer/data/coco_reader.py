"""Reading COCO instance JSON, COCO panoptic JSON + PNG and semantic PNG into detectron2's standard dicts.

detectron2's ``load_coco_json`` parses the instances; what it leaves out is added here: images that are not .jpg, the
category lists compared with the dataset's own, and one clear error for each way in which a file can be broken.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpformer.config.classes import category_ids, class_table, tasks_of
from mpformer.data.coco_layout import Layout, read_json
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
) -> list[Record]:
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


def read_coco_like(files: SplitFiles, tasks: frozenset[str]) -> list[Record]:
    """Read the annotations that the tasks need and join them by image."""
    parts = []
    if "instance" in tasks:
        parts.append(_read_instances(files))
    if "panoptic" in tasks:
        parts.append(_read_panoptic(files))
    if "semantic" in tasks:
        parts.append(_read_semantic(files))
    return _join(parts, files)


def _join(parts: list[dict[str, Record]], files: SplitFiles) -> list[Record]:
    """Merge the records of one image, known by its file's stem (ours: by its id), from several annotation files."""
    stems = set(parts[0]).intersection(*parts[1:])
    if any(len(part) != len(stems) for part in parts) or not stems:
        counts = ", ".join(str(len(part)) for part in parts)
        raise UserError(f"the annotation files of {files.images} list different images ({counts}); {files.advice}")
    joined = []
    for stem in sorted(stems):
        record: Record = {}
        for part in parts:
            record = {**part[stem], **record}
        joined.append(record)
    if any("image_id" not in r for r in joined):
        joined = [{"image_id": i + 1, **r} for i, r in enumerate(joined)]
    return joined


def _read_instances(files: SplitFiles) -> dict[str, Record]:
    assert files.instances is not None
    ids = category_ids(files.dataset, "instance")
    _check_categories(files, files.instances, "instance")
    from detectron2.data.datasets.coco import load_coco_json

    try:
        loaded = load_coco_json(str(files.instances), str(files.images), None, ["area"])
        lookup = {category: i for i, category in enumerate(ids)}
        for record in loaded:
            for annotation in record["annotations"]:
                annotation["category_id"] = lookup[annotation["category_id"]]
    except KeyError as error:
        raise _unknown_category(files, files.instances, error) from None
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{files.instances} is not valid COCO annotations: {error}; {files.advice}") from None
    return {_key(files, r): r for r in loaded}


def _read_panoptic(files: SplitFiles) -> dict[str, Record]:
    assert files.panoptic is not None
    assert files.panoptic_png is not None
    content = _check_categories(files, files.panoptic, "panoptic")
    table = class_table(files.dataset, "panoptic")
    lookup = {category: i for i, category in enumerate(category_ids(files.dataset, "panoptic"))}
    images = {image["id"]: image for image in content["images"]}
    found = {}
    try:
        for annotation in content["annotations"]:
            stem = Path(annotation["file_name"]).stem
            segments = [_segment(s, lookup, table.is_thing) for s in annotation["segments_info"]]
            image = images[annotation["image_id"]]
            name = image["file_name"] if files.exact_names else stem + files.suffix
            record = {
                "file_name": str(files.images / name),
                "image_id": annotation["image_id"],
                "height": image.get("height"),
                "width": image.get("width"),
                "pan_seg_file_name": str(files.panoptic_png / annotation["file_name"]),
                "segments_info": segments,
            }
            found[_key(files, record)] = record
    except KeyError as error:
        raise _unknown_category(files, files.panoptic, error) from None
    return found


def _segment(info: Record, lookup: dict[int, int], is_thing: tuple[bool, ...]) -> Record:
    category = lookup[info["category_id"]]
    return {**info, "category_id": category, "isthing": is_thing[category], "iscrowd": info.get("iscrowd", 0)}


def _read_semantic(files: SplitFiles) -> dict[str, Record]:
    assert files.semantic_png is not None
    if not files.semantic_png.is_dir():
        raise UserError(f"{files.semantic_png} is not there; {files.advice}")
    if files.exact_names:
        return _read_own_semantic(files, files.semantic_png)
    # of images and of labels, so that a file that only one of the folders has is missed in the other
    stems = {p.stem for p in files.semantic_png.glob("*.png")} | {p.stem for p in files.images.glob(f"*{files.suffix}")}
    return {
        stem: {
            "file_name": str(files.images / (stem + files.suffix)),
            "sem_seg_file_name": str(files.semantic_png / f"{stem}.png"),
        }
        for stem in sorted(stems)
    }


def _read_own_semantic(files: SplitFiles, folder: Path) -> dict[str, Record]:
    """What this project wrote lists its images, and its label maps are called after their ids."""
    assert files.panoptic is not None
    records = [
        {
            "file_name": str(files.images / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "sem_seg_file_name": str(folder / f"{image['id']:06d}.png"),
        }
        for image in read_json(files.panoptic, files.advice)["images"]
    ]
    return {_key(files, record): record for record in records}


def _key(files: SplitFiles, record: Record) -> str:
    return f"{record['image_id']:012d}" if files.exact_names else Path(record["file_name"]).stem


def _check_categories(files: SplitFiles, path: Path, task: str) -> Record:
    """Read an annotation file and compare its category list with the static table."""
    content = read_json(path, files.advice)
    lists = [content.get(key) for key in ("images", "annotations", "categories")] if isinstance(content, dict) else []
    if not lists or not all(isinstance(part, list) for part in lists):
        raise UserError(f"{path} lacks images, annotations or categories; {files.advice}")
    expected = dict(zip(category_ids(files.dataset, task), class_table(files.dataset, task).names, strict=True))
    given = {c["id"]: c["name"] for c in content["categories"]}
    # release files differ in how they spell names ("tub" and "bathtub"): there the ids are what counts
    same = given == expected if files.exact_names else set(given) == set(expected)
    if not same:
        wrong = sorted(set(given.items()) ^ set(expected.items()), key=str)[:3]
        raise UserError(
            f"{path} has another class list than {files.dataset} ({len(given)} categories, {len(expected)} expected; "
            f"first differences: {wrong}); {files.advice}"
        )
    return content


def _unknown_category(files: SplitFiles, path: Path, error: KeyError) -> UserError:
    return UserError(f"{path} uses the category id or key {error} that is not in its class list; {files.advice}")
