"""What of a dataset is there, what is missing, where to get it, and whether a sample opens. No torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpformer.config.classes import class_table, tasks_of
from mpformer.config.datasets import dataset
from mpformer.data.coco_layout import Layout, read_json, rgb_to_id
from mpformer.data.convert import IGNORE, MANIFEST
from mpformer.data.own import export_check, registration
from mpformer.data.prepared import prepared_dir, read_manifest
from mpformer.data.sources import Expected, Prepared, Release, source_of
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class Item:
    """One thing that was looked at: where, whether it is as it should be, and what was found."""

    path: str
    ok: bool
    detail: str
    doubtful: bool = False
    """It can be used as it is, but should be looked at."""

    def line(self) -> str:
        """The item as a line of text."""
        state = "wrong" if not self.ok else "look " if self.doubtful else "ok   "
        return f"{state} {self.path}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """The state of one dataset (of one prepared version of it): ``ok`` if nothing is missing or damaged.

    ``sample`` says of a release what its first validation image is; of a prepared dataset it is one of the items.
    """

    name: str
    directory: str
    fingerprint: str = ""
    items: tuple[Item, ...] = ()
    sample: str = ""
    advice: tuple[str, ...] = ()
    splits: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.items) and all(item.ok for item in self.items)

    def lines(self) -> Iterator[str]:
        """The report as one screen of text."""
        state = "complete" if self.ok else "incomplete" if self.items else "not there"
        yield f"{self.name} in {self.directory}: {state}"
        if self.splits:
            yield "  " + ", ".join(f"{count:,} {split}" for split, count in self.splits.items()) + " images"
        yield from (f"  {item.line()}" for item in self.items)
        if self.sample:
            yield f"  sample: {self.sample}"
        if not self.ok:
            yield from (f"  {line}" for line in self.advice)


def check(name: str, data_root: Path, full: bool = False) -> tuple[Report, ...]:
    """Look at every prepared version of a dataset, or at the release's files; always at least one report.

    ``full`` compares every file that was prepared with its checksum, not only the annotation files. Raises UserError
    for an unknown name.
    """
    source = source_of(name)
    if isinstance(source, Release):
        return (_release(name, source, Path(data_root), full),)
    if dataset(name).added:
        return _own(name, source, Path(data_root), full)
    found = sorted(p.parent for p in Path(data_root, name).glob("*/manifest.json"))
    advice = (_command(source),)
    if not found:
        return (Report(name, str(Path(data_root, name)), advice=advice),)
    return tuple(_prepared(name, source, directory, full) for directory in found)


def _own(name: str, source: Prepared, data_root: Path, full: bool) -> tuple[Report, ...]:
    """A set of the user's own: its annotations and images as they lie, and what was made of them."""
    registered = registration.load(name, data_root)
    versions = []
    for fingerprint in (registered.fingerprint, registered.tiles):
        directory = prepared_dir(name, fingerprint, data_root)
        if directory.is_dir():
            versions.append(_prepared(name, source, directory, full))
        else:
            versions.append(Report(name, str(directory), fingerprint, advice=(_command(source),)))
    return (_export(registered, source), *versions)


def _export(registered: registration.Registration, source: Prepared) -> Report:
    sources, name = registered.sources, registered.name
    try:
        found = export_check.look(sources, registered.stuff if registered.kind == "semantic" else ())
    except UserError as error:
        found = [export_check.Finding("annotations", str(error), wrong=True)]
    items = [Item(f.where, not f.wrong, f.text, doubtful=True) for f in found]
    items = items or [Item("annotations and images", True, "nothing to remark")]
    advice = (f"mend it, and register it again: {source.command}",)
    return Report(name, sources.train, items=tuple(items), advice=advice, splits=dict(registered.images))


def _command(source: Prepared) -> str:
    return f"run: {source.command}{source.advice}"


def _prepared(name: str, source: Prepared, directory: Path, full: bool) -> Report:
    advice = (f"remove {directory} and {_command(source)}",)
    try:
        manifest = read_manifest(directory / "manifest.json")
    except UserError as error:
        return Report(name, str(directory), items=(Item("manifest.json", False, str(error)),), advice=advice)
    items = list(_folders(directory, manifest["files"]))
    items.append(_checksums(directory, manifest["files"], full))
    sample, opens = _sample(name, directory)
    items.append(Item("sample", opens, sample))
    splits = {split: about["images"] for split, about in manifest["splits"].items()}
    return Report(name, str(directory), manifest["fingerprint"], tuple(items), "", advice, splits)


def _folders(directory: Path, files: dict[str, str]) -> Iterator[Item]:
    expected: dict[str, set[str]] = {}
    for path in files:
        folder, file = os.path.split(path)
        expected.setdefault(folder, set()).add(file)
    for folder, names in sorted(expected.items()):
        present = set(os.listdir(directory / folder)) if (directory / folder).is_dir() else set()
        missing = sorted(names - present)
        first = f" (first missing: {missing[0]})" if missing else ""
        yield Item(folder, not missing, f"{len(names) - len(missing):,} of {len(names):,} files{first}")


def _checksums(directory: Path, files: dict[str, str], full: bool) -> Item:
    chosen = files if full else {path: sha for path, sha in files.items() if path.endswith(".json")}
    wrong = [path for path, sha in chosen.items() if not _matches(directory / path, sha)]
    which = "all files" if full else "annotation files"
    detail = f"{len(chosen) - len(wrong):,} of {len(chosen):,} match" + (f" (first not: {wrong[0]})" if wrong else "")
    return Item(f"checksums of {which}", not wrong, detail)


def _matches(path: Path, checksum: str) -> bool:
    try:
        return sha256(path) == checksum
    except OSError:
        return False


def _sample(name: str, directory: Path) -> tuple[str, bool]:
    """Open the first validation image and say what is in it."""
    layout = Layout(directory, "val")
    table = class_table(name, tasks_of(name)[-1])
    try:
        content = read_json(layout.instances_json, "")
        image = content["images"][0]
        with Image.open(layout.images / image["file_name"]) as file:
            width, height = file.convert("RGB").size
        objects = [a["category_id"] - 1 for a in content["annotations"] if a["image_id"] == image["id"]]
        if table.stuff:
            with Image.open(layout.panoptic / f"{image['id']:06d}.png") as file:
                objects = _listed(layout, image["id"], np.unique(rgb_to_id(np.asarray(file))))
    except (OSError, KeyError, IndexError, ValueError, UserError) as error:
        return f"the first image does not open: {error}", False
    names = ", ".join(sorted({table.names[c] for c in objects}))
    return f"val/{image['file_name']}, {width} x {height}, {len(objects)} masks: {names}", True


def _listed(layout: Layout, image_id: int, present: Any) -> list[int]:
    rows = read_json(layout.panoptic_json, "")["annotations"]
    segments = next(r["segments_info"] for r in rows if r["image_id"] == image_id)
    return [s["category_id"] - 1 for s in segments if s["id"] in present]


# --- official releases ------------------------------------------------------------------------------------------


def _release(name: str, source: Release, data_root: Path, full: bool) -> Report:
    items = [_look(data_root, expected) for expected in source.files]
    items += _conversion(name, data_root, full)
    sample, opens = _release_sample(name, source, data_root)
    items += [] if opens else [Item("sample", False, sample)]
    return Report(name, str(data_root), items=tuple(items), sample=sample, advice=(source.advice,))


def _conversion(name: str, data_root: Path, full: bool) -> Iterator[Item]:
    """What ``data prepare`` wrote, against its checksum manifest."""
    directory = data_root / dataset(name).folder
    path = directory / MANIFEST
    if not path.exists():
        detail = "none: what is there was not written by `mpformer data prepare`, its checksums are not known"
        yield Item(f"{directory.name}/{MANIFEST}", True, detail)
        return
    try:
        files = read_json(path, "")["files"]
    except (UserError, KeyError, TypeError):
        yield Item(f"{directory.name}/{MANIFEST}", False, f"damaged; run: mpformer data prepare {name}")
        return
    missing = [file for file in files if not (directory / file).is_file()]
    first = f" (first missing: {missing[0]})" if missing else ""
    yield Item(f"{directory.name}/{MANIFEST}", not missing, f"{len(files) - len(missing):,} of {len(files):,}{first}")
    if full or any(file.endswith(".json") for file in files):
        yield _checksums(directory, files, full)


def _look(data_root: Path, expected: Expected) -> Item:
    path = data_root / expected.path
    if not expected.count:
        return Item(expected.path, path.is_file(), f"for {expected.needed_for}")
    count = sum(1 for p in path.rglob(f"*{expected.suffix}")) if path.is_dir() else 0
    detail = f"{count:,} of {expected.count:,} *{expected.suffix}, for {expected.needed_for}"
    return Item(expected.path, count >= expected.count, detail)


def _release_sample(name: str, source: Release, data_root: Path) -> tuple[str, bool]:
    """Open the first validation image and its semantic labels and say what is in them; nothing if there is no image."""
    expected = next(e for e in source.files if "val" in e.path and e.needed_for == "all tasks")
    file = min((data_root / expected.path).rglob(f"*{expected.suffix}"), default=None)
    if file is None:
        return "", True
    labels = source.labels(data_root, file)
    try:
        with Image.open(file) as image:
            size = image.convert("RGB").size
        text = f"{file.relative_to(data_root)}, {size[0]} x {size[1]}, opens"
        if not labels.is_file():
            return f"{text}; its semantic labels are not prepared", True
        with Image.open(labels) as image:
            present = np.unique(np.asarray(image))
            if image.size != size:
                return f"{labels.relative_to(data_root)} is {image.size[0]} x {image.size[1]}, its image is not", False
    except (OSError, SyntaxError, ValueError) as error:
        return f"{file.relative_to(data_root)} or its labels do not open: {error}", False
    names = class_table(name, "semantic").names
    outside = [int(value) for value in present if len(names) <= value < IGNORE]
    if outside:
        return (
            f"{labels.relative_to(data_root)} holds class {outside[0]}; valid: 0-{len(names) - 1} and {IGNORE}",
            False,
        )
    return f"{text}: {', '.join(names[value] for value in present if value < IGNORE)}", True
