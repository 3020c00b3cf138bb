"""``mpformer data add``: register a set of the user's own under a data root. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpformer.config import datasets
from mpformer.data.chunks import Progress
from mpformer.data.coco_layout import Layout, read_json
from mpformer.data.contact_sheet import contact_sheet
from mpformer.data.own import export_check, registration
from mpformer.data.own.added_set import build_tiles, build_whole, tiles_fingerprint, whole_fingerprint, work_of
from mpformer.data.own.annotations import KINDS, OwnSplit, area_of, classes_of, divided, read_split
from mpformer.data.own.registration import PANOPTIC_ORDER, VOID, Registration, Settings, Sources
from mpformer.data.prepared import read_manifest
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What a user asks for; None and 0: reckoned from the set."""

    name: str
    train: Path
    val: Path
    images: Path
    val_images: Path | None = None
    things: tuple[str, ...] | None = None
    stuff: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ()
    """Of semantic PNGs, by value."""
    panoptic: str = ""
    """``largest-first``: paint instances into a panoptic map."""
    uncovered: str = VOID
    crop: int = 128
    resize: int | None = None
    queries: int | None = None
    train_points: int | None = None
    min_pixels: int = 10
    max_objects: int = 0
    mini_images: int = 2000


@dataclass(frozen=True)
class Added:
    """What was registered, and where its picture is."""

    registration: Registration
    sample: Path
    tiles: Mapping[str, int]
    """Tiles by split."""
    findings: tuple[export_check.Finding, ...]
    """What `data check` remarks."""

    def lines(self) -> Iterator[str]:
        """What the command says."""
        r, s = self.registration, self.registration.settings
        yield f"{r.name}: {r.images['train']:,} training and {r.images['val']:,} validation images"
        yield f"  things: {', '.join(r.things) or 'none'}"
        yield f"  stuff: {', '.join(r.stuff) or 'none'}"
        yield from (f"  look: {finding.where}: {finding.text}" for finding in self.findings)
        tiles = " and ".join(f"{count:,}" for count in self.tiles.values())
        shorter = f"images whose shorter side is {s.resize}" if s.resize else "images"
        yield f"  scale mini: {tiles} tiles of {s.crop} px of {shorter}, {s.queries} queries, {s.train_points} points"
        yield f"  look at it: {self.sample}"
        yield f"  then: mpformer launch headline --dataset {r.name}"


def add(asked: Asked, data_root: Path, progress: Progress | None = None, workers: int | None = None) -> Added:
    """Register a set, write its labels and its tiles, and draw a sample of them.

    Raises UserError for files that are missing or damaged, classes that are not there, and options that do not go
    together. A set of that name under the data root gives way; runs keep to the version that they were trained on.
    """
    registration.check_name(asked.name)
    sources = _sources(asked)
    splits = [read_split(sources, split, asked.classes) for split in ("train", "val")]
    found = classes_of(splits)
    _check_options(asked, splits)
    things, stuff = divided(found.names, splits, asked.things, asked.stuff, bool(asked.panoptic))
    if asked.uncovered not in (VOID, *stuff):
        if asked.uncovered in things:
            raise UserError(f"--uncovered {asked.uncovered} is a thing; uncovered pixels can be of a stuff class")
        stuff = (*stuff, asked.uncovered)
    if asked.panoptic and not (things and stuff):
        which = "stuff" if things else "things"
        raise UserError(
            f"a panoptic set needs things and stuff, and {asked.name} has no {which}; see --things, --stuff"
        )
    made = Registration(
        name=asked.name,
        things=things,
        stuff=stuff,
        kind=splits[0].kind,
        sources=sources,
        settings=_settings(asked, splits[0], set(things)),
        fingerprint="",
        tiles="",
        images={name: len(split.images) for name, split in zip(("train", "val"), splits, strict=True)},
        notes=found.notes,
    )
    stages = _Stages(sum(made.images.values()), progress)
    findings = export_check.look(sources, asked.classes, stages.of(0))
    _refuse_wrong(asked.name, findings)
    return _built(made, asked, Path(data_root), stages, tuple(findings), workers)


@dataclass(frozen=True)
class _Stages:
    """Progress over the images, three times: looked through, written whole, cut into tiles."""

    images: int
    progress: Progress | None

    def of(self, stage: int) -> Progress | None:
        """What one stage reports to, in whatever it counts."""
        show, images = self.progress, self.images
        if show is None:
            return None
        return lambda done, total: show(stage * images + done * images // max(total, 1), 3 * images)


def _refuse_wrong(name: str, findings: Sequence[export_check.Finding]) -> None:
    """Raise UserError if a set cannot be used as it is, with the first things to mend."""
    wrong = [f"{finding.where}: {finding.text}" for finding in findings if finding.wrong]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{name} is not added before this is mended: {'; '.join(wrong[:3])}{more}")


def _built(
    made: Registration,
    asked: Asked,
    data_root: Path,
    stages: _Stages,
    findings: tuple[export_check.Finding, ...],
    workers: int | None,
) -> Added:
    """Write both versions, and the registration last."""
    fingerprint = whole_fingerprint(work_of(made))
    made = replace(made, fingerprint=fingerprint, tiles=tiles_fingerprint(fingerprint, made.settings))
    datasets.know(made.entry())
    build_whole(made, data_root, stages.of(1), workers)
    tiles = build_tiles(made, data_root, stages.of(2), workers)
    made = replace(made, settings=replace(made.settings, queries=asked.queries or _queries(tiles, made)))
    registration.save(made, data_root)
    sample = data_root / made.name / registration.SAMPLE
    contact_sheet(tiles, sample)
    splits = read_manifest(tiles / "manifest.json")["splits"]
    return Added(made, sample, {split: about["images"] for split, about in splits.items()}, findings)


def _sources(asked: Asked) -> Sources:
    val_images = asked.val_images or asked.images
    for path in (asked.train, asked.val, asked.images, val_images):
        if not path.exists():
            raise UserError(f"{path} is not there")
    for path in (asked.images, val_images):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give the one that file names of the annotations begin in")
    return Sources(*(str(path.resolve()) for path in (asked.train, asked.val, asked.images, val_images)))


def _check_options(asked: Asked, splits: Sequence[OwnSplit]) -> None:
    kinds = [split.kind for split in splits]
    if len(set(kinds)) > 1:
        raise UserError(f"{asked.train} has {kinds[0]} annotations, {asked.val} {kinds[1]}; give both of one kind")
    kind = kinds[0]
    assert kind in KINDS
    if not all(split.images for split in splits):
        raise UserError(f"{asked.train} and {asked.val} need images, both")
    if asked.panoptic and kind != "instance":
        raise UserError(f"--panoptic-from-instances is for instances; {asked.train} has {kind} annotations already")
    if kind == "instance" and not asked.panoptic and asked.stuff:
        raise UserError(f"instances are of things; --stuff needs --panoptic-from-instances {PANOPTIC_ORDER}")
    if kind == "semantic" and asked.things:
        raise UserError("semantic labels tell no objects apart: leave --things out")
    if asked.uncovered != VOID and not asked.panoptic:
        raise UserError(f"--uncovered is what --panoptic-from-instances {PANOPTIC_ORDER} leaves; give that too")
    if asked.things is not None and asked.stuff is not None:
        raise UserError("give --things or --stuff; the other classes are the rest")


# --- what is reckoned ---------------------------------------------------------------------------------------------

_LEAST_SIDE = 12.0
"""Pixels that half of the objects shall have across (the square root of their area) in a tile."""
_LARGEST = 4
"""Images are made at most so many tiles high."""


def _settings(asked: Asked, split: OwnSplit, things: set[str]) -> Settings:
    return Settings(
        panoptic=asked.panoptic,
        uncovered=asked.uncovered,
        crop=asked.crop,
        resize=asked.resize if asked.resize is not None else resize_for(split, things, asked.crop),
        min_pixels=asked.min_pixels,
        max_objects=asked.max_objects,
        mini_images=asked.mini_images,
        queries=asked.queries or Settings.queries,
        train_points=asked.train_points or (asked.crop // 4) ** 2,  # every cell of a mask
    )


def resize_for(split: OwnSplit, things: set[str], crop: int) -> int:
    """The shorter side, a multiple of the tile's, at which half of the objects are 12 pixels across, if any does.

    Images are not enlarged beyond their own size, but for what a tile needs.
    """
    sides = sorted(min(image.height, image.width) for image in split.images)
    shorter = sides[len(sides) // 2]
    shares = sorted(
        math.sqrt(area_of(mark)) / min(image.height, image.width)
        for image in split.images
        for mark in image.marks
        if split.names.get(mark["category_id"]) in things
    )
    typical = shares[len(shares) // 2] if shares else 1.0
    steps = [k for k in range(1, _LARGEST + 1) if k == 1 or k * crop <= shorter]
    return crop * next((k for k in steps if typical * k * crop >= _LEAST_SIDE), steps[-1])


def _queries(tiles: Path, made: Registration) -> int:
    """A tenth more queries than all but one in a hundred of the training tiles have targets, in fives, 10 to 100."""
    layout = Layout(tiles, "train")
    panoptic = bool(made.stuff)
    content = read_json(layout.panoptic_json if panoptic else layout.instances_json, "")
    held: dict[int, int] = {image["id"]: 0 for image in content["images"]}
    for row in content["annotations"]:
        held[row["image_id"]] += len(row["segments_info"]) if panoptic else not row["iscrowd"]
    counts = sorted(held.values())
    many = counts[min(len(counts) - 1, len(counts) * 99 // 100)] if counts else 0
    return min(100, max(10, 5 * math.ceil(1.1 * many / 5)))
