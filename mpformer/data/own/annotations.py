"""The annotation files of a set of the user's own, as they come: COCO instances, COCO panoptic, or semantic PNGs.

What exports get wrong and what can be read without doubt is read: categories of one name that stand twice are one,
a category that nothing uses is left out, ids may begin anywhere and differ from file to file (names are what counts).
No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpformer.data.coco_layout import read_json
from mpformer.data.own.registration import Sources
from mpformer.runtime.errors import UserError, choices

KINDS = ("instance", "panoptic", "semantic")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ADVICE = "give COCO instances or panoptic JSON, or a folder of PNGs"


@dataclass(frozen=True)
class OwnImage:
    """An image with its labels as the file has them: ``marks`` are annotations (instance) or segments (panoptic)."""

    file: str
    """Path below the folder of images."""
    height: int
    width: int
    marks: tuple[Mapping[str, Any], ...] = ()
    labels: str = ""
    """Path of its PNG (panoptic, semantic)."""


@dataclass(frozen=True)
class OwnSplit:
    """One annotation file: its kind, images in its order, and the name of each of its categories by id."""

    kind: str
    images: tuple[OwnImage, ...]
    names: Mapping[int, str] = field(default_factory=dict)
    isthing: Mapping[str, bool] = field(default_factory=dict)
    """By name, where the file says so (panoptic)."""


@lru_cache(maxsize=4)
def read_split(sources: Sources, split: str, classes: tuple[str, ...] = ()) -> OwnSplit:
    """Read the annotations of a split; ``classes`` are those of semantic PNGs, in the order of their values.

    Raises UserError for a file that is missing, damaged, or of no kind that is known.
    """
    path = sources.annotations(split)
    if path.is_dir():
        return _semantic(path, sources.folder(split), classes)
    content = read_json(path, _ADVICE)
    parts = [content.get(key) for key in ("images", "annotations", "categories")] if isinstance(content, dict) else []
    if not parts or not all(isinstance(part, list) for part in parts):
        raise UserError(f"{path} lacks images, annotations or categories; {_ADVICE}")
    try:
        names = {c["id"]: str(c["name"]).strip() for c in content["categories"]}
        if any("segments_info" in a for a in content["annotations"]):
            things = {str(c["name"]).strip(): bool(c["isthing"]) for c in content["categories"] if "isthing" in c}
            return OwnSplit("panoptic", tuple(_panoptic_images(content, path)), names, things)
        return OwnSplit("instance", tuple(_instance_images(content)), names)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not valid COCO: {type(error).__name__} {error}; {_ADVICE}") from None


def _instance_images(content: dict[str, Any]) -> Iterable[OwnImage]:
    marks: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in marks:
            raise ValueError(
                f"annotation {annotation.get('id')} is of image {annotation['image_id']}, which is not listed"
            )
        marks[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        yield OwnImage(image["file_name"], int(image["height"]), int(image["width"]), tuple(marks[image["id"]]))


def _panoptic_images(content: dict[str, Any], path: Path) -> Iterable[OwnImage]:
    folder = path.with_suffix("")
    if not folder.is_dir():
        raise UserError(f"the PNGs of {path} are looked for in {folder}, which is not there; put them there")
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        marks, labels = tuple(annotation["segments_info"]), str(folder / annotation["file_name"])
        yield OwnImage(image["file_name"], int(image["height"]), int(image["width"]), marks, labels)


def _semantic(folder: Path, images: Path, classes: tuple[str, ...]) -> OwnSplit:
    from PIL import Image

    if not classes:
        raise UserError(f"{folder} is a folder of semantic PNGs: say what their values mean with --classes NAME,NAME,…")
    found: list[OwnImage] = []
    files = {p.stem: p for p in images.iterdir() if p.suffix.lower() in SUFFIXES} if images.is_dir() else {}
    for labels in sorted(folder.glob("*.png")):
        if labels.stem not in files:
            raise UserError(f"{labels} has no image of its name in {images}")
        with Image.open(labels) as opened:
            width, height = opened.size
        found.append(OwnImage(files[labels.stem].name, height, width, (), str(labels)))
    if not found:
        raise UserError(f"{folder} holds no *.png; {_ADVICE}")
    return OwnSplit("semantic", tuple(found), dict(enumerate(classes)), dict.fromkeys(classes, False))


# --- classes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """The classes of both splits, and what was merged or left out."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


def classes_of(splits: Sequence[OwnSplit]) -> Classes:
    """The names that are used, in the order of the first file's ids; raises UserError for an id without a category."""
    listed: dict[str, None] = {}
    notes: dict[str, None] = {}
    used: set[str] = set()
    for split in splits:
        given = [split.names[key] for key in sorted(split.names)]
        for name in given:
            if given.count(name) > 1:
                notes[f"category {name!r} stands {given.count(name)} times and is one class"] = None
            listed[name] = None
        used |= {_name(split, mark) for image in split.images for mark in image.marks}
        used |= set(split.names.values()) if split.kind == "semantic" else set()
    unused = [name for name in listed if name not in used]
    if unused:
        notes[f"left out, since nothing is of it: {', '.join(unused)}"] = None
    return Classes(tuple(name for name in listed if name in used), tuple(notes))


def _name(split: OwnSplit, mark: Mapping[str, Any]) -> str:
    try:
        return split.names[mark["category_id"]]
    except KeyError:
        what = f"annotation {mark.get('id')}"
        raise UserError(f"{what} has category {mark.get('category_id')!r}; listed: {sorted(split.names)}") from None


def divided(
    names: Sequence[str],
    splits: Sequence[OwnSplit],
    things: Sequence[str] | None,
    stuff: Sequence[str] | None,
    paint: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Things and stuff: as asked, else as a panoptic file says, else by size where instances are painted.

    Raises UserError for names that are no classes.
    """
    for option, given in (("--things", things), ("--stuff", stuff)):
        unknown = [name for name in given or () if name not in names]
        if unknown:
            raise choices(f"class in {option}", unknown[0], names)
    if things is not None:
        stuff = [name for name in names if name not in things]
    elif stuff is None:
        stuff = _stuff_of(names, splits, paint)
    return tuple(n for n in names if n not in stuff), tuple(n for n in names if n in stuff)


def _stuff_of(names: Sequence[str], splits: Sequence[OwnSplit], paint: bool) -> list[str]:
    kind = splits[0].kind
    if kind != "instance":
        return [name for name in names if not splits[0].isthing.get(name, True)]
    return stuff_by_size(splits[0]) if paint else []


STUFF_SHARE, STUFF_REGIONS = 0.1, 2
"""A class that covers a tenth of the images where it is, in at most two regions, is taken for stuff."""


def stuff_by_size(split: OwnSplit) -> list[str]:
    """Classes that look like stuff by how much of an image they cover, and in how many regions."""
    shares: dict[str, list[float]] = {}
    regions: dict[str, list[int]] = {}
    for image in split.images:
        found: dict[str, list[float]] = {}
        for mark in image.marks:
            found.setdefault(_name(split, mark), []).append(area_of(mark) / (image.height * image.width))
        for name, areas in found.items():
            shares.setdefault(name, []).append(sum(areas))
            regions.setdefault(name, []).append(len(areas))
    return [
        name
        for name, covered in shares.items()
        if sum(covered) / len(covered) >= STUFF_SHARE and _median(regions[name]) <= STUFF_REGIONS
    ]


def area_of(mark: Mapping[str, Any]) -> float:
    """Pixels of an annotation: as it says, else of its box."""
    if mark.get("area"):
        return float(mark["area"])
    box = mark.get("bbox") or (0, 0, 0, 0)
    return float(box[2] * box[3])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
