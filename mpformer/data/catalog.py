"""Registering datasets with detectron2's catalogs, and reading their annotation files into its standard dicts.

detectron2's own loaders do the parsing (``load_coco_json`` and the Cityscapes ones); what they leave out is added here:
images that are not .jpg, the category lists compared with the static tables, and one clear error for each way in which
a dataset can be broken.

A record has ``file_name, image_id, height, width`` and, by what was asked for, ``annotations`` (contiguous thing
classes), ``pan_seg_file_name`` with ``segments_info`` (contiguous classes of all), ``sem_seg_file_name``.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from mpformer.config.classes import category_ids, class_table, tasks_of
from mpformer.config.schema import Config
from mpformer.data.coco_layout import Layout, read_json
from mpformer.data.prepare import PREPARED, dataset_dir
from mpformer.runtime.errors import UserError

Record = dict[str, Any]
IGNORE_LABEL = 255


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

    def advice(self) -> str:
        if self.dataset in PREPARED:
            return f"remove {self.images.parent} and run: mpformer data prepare {self.dataset}"
        return f"see: mpformer data check {self.dataset}"


def records(config: Config, data_root: Path, split: str, tasks: Iterable[str]) -> list[Record]:
    """The images of ``train`` or ``val`` with the annotations that the tasks need, ordered by image id.

    Raises UserError if a file is missing or damaged, or its categories are not the expected ones.
    """
    name = register(config, data_root, split, frozenset(tasks))
    return sorted(DatasetCatalog.get(name), key=lambda r: r["image_id"])


def register(config: Config, data_root: Path, split: str, tasks: frozenset[str]) -> str:
    """Register a split with detectron2's catalogs (once) and return its name there."""
    dataset, root = config.dataset.name, dataset_dir(config, data_root)
    name = f"mpformer/{dataset}/{'+'.join(sorted(tasks))}/{split}@{root.absolute()}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, _reader(dataset, root, split, tasks))
        table = class_table(dataset, tasks_of(dataset)[-1])
        MetadataCatalog.get(name).set(
            thing_classes=list(table.things),
            stuff_classes=list(table.names),
            ignore_label=IGNORE_LABEL,
            evaluator_type="coco_panoptic_seg" if table.stuff else "coco",
        )
    return name


def _reader(dataset: str, root: Path, split: str, tasks: frozenset[str]) -> Callable[[], list[Record]]:
    if dataset == "cityscapes":
        from mpformer.data.cityscapes import read_split

        return partial(read_split, root / "cityscapes", split, tasks)
    return partial(read_coco_like, split_files(dataset, root, split), tasks)


def split_files(dataset: str, root: Path, split: str) -> SplitFiles:
    """Where a dataset's files are: below ``root``, in the layout that its users already have."""
    if dataset == "coco":
        coco, annotations = root / "coco", root / "coco" / "annotations"
        return SplitFiles(
            dataset,
            coco / f"{split}2017",
            annotations / f"instances_{split}2017.json",
            annotations / f"panoptic_{split}2017.json",
            coco / f"panoptic_{split}2017",
            coco / f"panoptic_semseg_{split}2017",
            ".jpg",
        )
    if dataset == "ade20k":
        ade, folder = root / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
        return SplitFiles(
            dataset,
            ade / "images" / folder,
            ade / f"ade20k_instance_{split}.json",
            ade / f"ade20k_panoptic_{split}.json",
            ade / f"ade20k_panoptic_{split}",
            ade / "annotations_detectron2" / folder,
            ".jpg",
        )
    layout = Layout(root, split)
    if "panoptic" not in tasks_of(dataset):
        return SplitFiles(dataset, layout.images, layout.instances_json)
    return SplitFiles(
        dataset, layout.images, layout.instances_json, layout.panoptic_json, layout.panoptic, layout.semantic
    )


def read_coco_like(files: SplitFiles, tasks: frozenset[str]) -> list[Record]:
    """Read the annotations that the tasks need and join them by image; checks that every file is there."""
    parts = []
    if "instance" in tasks:
        parts.append(_read_instances(files))
    if "panoptic" in tasks:
        parts.append(_read_panoptic(files))
    if "semantic" in tasks:
        parts.append(_read_semantic(files))
    joined = _join(parts, files)
    check_files(joined, files.dataset, files.advice())
    return joined


def _join(parts: list[dict[str, Record]], files: SplitFiles) -> list[Record]:
    """Merge the records of one image, known by its file's stem, from several annotation files."""
    stems = set(parts[0]).intersection(*parts[1:])
    if any(len(part) != len(stems) for part in parts) or not stems:
        counts = ", ".join(str(len(part)) for part in parts)
        raise UserError(f"the annotation files of {files.images} list different images ({counts}); {files.advice()}")
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
    try:
        loaded = load_coco_json(str(files.instances), str(files.images), None, ["area"])
        lookup = {category: i for i, category in enumerate(ids)}
        for record in loaded:
            for annotation in record["annotations"]:
                annotation["category_id"] = lookup[annotation["category_id"]]
    except KeyError as error:
        raise _unknown_category(files, files.instances, error) from None
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{files.instances} is not valid COCO annotations: {error}; {files.advice()}") from None
    return {Path(r["file_name"]).stem: r for r in loaded}


def _read_panoptic(files: SplitFiles) -> dict[str, Record]:
    assert files.panoptic is not None
    assert files.panoptic_png is not None
    content = _check_categories(files, files.panoptic, "panoptic")
    table = class_table(files.dataset, "panoptic")
    lookup = {category: i for i, category in enumerate(category_ids(files.dataset, "panoptic"))}
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}
    found = {}
    try:
        for annotation in content["annotations"]:
            stem = Path(annotation["file_name"]).stem
            segments = [_segment(s, lookup, table.is_thing) for s in annotation["segments_info"]]
            height, width = sizes[annotation["image_id"]]
            found[stem] = {
                "file_name": str(files.images / (stem + files.suffix)),
                "image_id": annotation["image_id"],
                "height": height,
                "width": width,
                "pan_seg_file_name": str(files.panoptic_png / annotation["file_name"]),
                "segments_info": segments,
            }
    except KeyError as error:
        raise _unknown_category(files, files.panoptic, error) from None
    return found


def _segment(info: Record, lookup: dict[int, int], is_thing: tuple[bool, ...]) -> Record:
    category = lookup[info["category_id"]]
    return {**info, "category_id": category, "isthing": is_thing[category], "iscrowd": info.get("iscrowd", 0)}


def _read_semantic(files: SplitFiles) -> dict[str, Record]:
    assert files.semantic_png is not None
    if not files.semantic_png.is_dir():
        raise UserError(f"{files.semantic_png} is not there; {files.advice()}")
    # of images and of labels, so that a file that only one of the folders has is missed in the other
    stems = {p.stem for p in files.semantic_png.glob("*.png")} | {p.stem for p in files.images.glob(f"*{files.suffix}")}
    return {
        stem: {
            "file_name": str(files.images / (stem + files.suffix)),
            "sem_seg_file_name": str(files.semantic_png / f"{stem}.png"),
        }
        for stem in sorted(stems)
    }


def _check_categories(files: SplitFiles, path: Path, task: str) -> Record:
    """Read an annotation file and compare its category list with the static table."""
    content = read_json(path, files.advice())
    lists = [content.get(key) for key in ("images", "annotations", "categories")] if isinstance(content, dict) else []
    if not lists or not all(isinstance(part, list) for part in lists):
        raise UserError(f"{path} lacks images, annotations or categories; {files.advice()}")
    expected = dict(zip(category_ids(files.dataset, task), class_table(files.dataset, task).names, strict=True))
    given = {c["id"]: c["name"] for c in content["categories"]}
    # release files differ in how they spell names ("tub" and "bathtub"): there the ids are what counts
    same = given == expected if files.dataset in PREPARED else set(given) == set(expected)
    if not same:
        wrong = sorted(set(given.items()) ^ set(expected.items()), key=str)[:3]
        raise UserError(
            f"{path} has another class list than {files.dataset} ({len(given)} categories, {len(expected)} expected; "
            f"first differences: {wrong}); {files.advice()}"
        )
    return content


def _unknown_category(files: SplitFiles, path: Path, error: KeyError) -> UserError:
    return UserError(f"{path} uses the category id or key {error} that is not in its class list; {files.advice()}")


def check_files(found: list[Record], dataset: str, advice: str) -> None:
    """Raise UserError if files that the records name do not exist; reads each directory once."""
    named = [r[key] for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name") for r in found if key in r]
    present: dict[str, set[str]] = {}
    missing = []
    for file in named:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            missing.append(file)
    if missing:
        raise UserError(
            f"{dataset} is incomplete: {len(missing)} of {len(named)} files are missing (first: {missing[0]}); {advice}"
        )
