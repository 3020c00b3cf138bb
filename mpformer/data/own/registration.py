"""The sets that ``mpformer data add`` registered: ``<data root>/<name>/registration.json``, one each. No torch.

A registration belongs to a data root. Whoever reads one, or the copy that a launch leaves in its run store, makes the
set known by its name to everything that asks for datasets.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpformer.config import datasets
from mpformer.config.datasets import Dataset, Mini, dataset
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from mpformer.config.schema import DatasetConfig

FILE = "registration.json"
SAMPLE = "sample.png"
_KIND = "mpformer dataset"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

PANOPTIC_ORDER = "largest-first"
VOID = "void"


@dataclass(frozen=True)
class Sources:
    """Where the user's files are: an annotation file (of semantic labels: a folder) and a folder of images a split."""

    train: str
    val: str
    images: str
    val_images: str

    def annotations(self, split: str) -> Path:
        """The annotations of ``train`` or ``val``."""
        return Path(self.train if split == "train" else self.val)

    def folder(self, split: str) -> Path:
        """The images of ``train`` or ``val``."""
        return Path(self.images if split == "train" else self.val_images)


@dataclass(frozen=True)
class Settings:
    """What was asked for, and what was reckoned from the set where nothing was."""

    panoptic: str = ""
    """``largest-first``: instances are painted into a panoptic map, large before small."""
    uncovered: str = VOID
    """What pixels are that nothing covers: void, or the name of a class."""
    crop: int = 128
    """Side of the tiles of scale mini, in pixels."""
    resize: int = 256
    """Shorter side of the images before they are cut into tiles; 0: as they are."""
    min_pixels: int = 10
    """Objects of fewer pixels in a tile become void."""
    max_objects: int = 0
    """Tiles with more objects are left out; 0: none are."""
    mini_images: int = 2000
    """Training images, at most, that tiles are cut from; of validation images a quarter as many."""
    queries: int = 25
    train_points: int = 576


@dataclass(frozen=True)
class Registration:
    """One set of the user's own."""

    name: str
    things: tuple[str, ...]
    stuff: tuple[str, ...]
    kind: str
    """What the annotations are: ``instance``, ``panoptic`` or ``semantic``."""
    sources: Sources
    settings: Settings
    fingerprint: str
    """Of the set: images, annotations, classes, and how they were read."""
    tiles: str
    """Fingerprint of the tiles that scale mini trains on."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Images by split."""
    notes: tuple[str, ...] = ()
    """What was merged or left out."""

    def entry(self) -> Dataset:
        """What the registry of datasets has of it."""
        s = self.settings
        mini = Mini(
            queries=s.queries,
            seconds=round(0.16 * max(1.0, (s.crop / 96) ** 2) * max(1.0, s.queries / 25) ** 0.5, 2),
            keys={"crop": s.crop},
            changes={"model.train_points": s.train_points},
        )
        return datasets.added(self.name, self.things, self.stuff, mini, self.images.get("val", 0))

    def plain(self) -> dict[str, Any]:
        """The registration as JSON has it."""
        return {"what": _KIND, "schema": 1, **asdict(self)}


def check_name(name: str) -> None:
    """Raise UserError for a name that cannot be a set's: it is part of folders and run ids, and must be free."""
    if not _NAME.fullmatch(name):
        raise UserError(f"a dataset cannot be called {name!r}: use letters, digits and _, beginning with a letter")
    entry = datasets.DATASETS.get(name)
    if entry is not None and not entry.added:
        raise UserError(f"{name!r} is a dataset of this project; choose another name")


def path_of(name: str, data_root: Path) -> Path:
    """Where a set's registration is."""
    return Path(data_root) / name / FILE


def save(registration: Registration, data_root: Path) -> None:
    """Write a registration and make it known."""
    from mpformer.data.coco_layout import write_atomically  # numpy, which those who only read do without

    path = path_of(registration.name, data_root)
    write_atomically(path, json.dumps(registration.plain(), indent=1).encode())
    datasets.know(registration.entry())


def load(name: str, data_root: Path) -> Registration:
    """Read a registration; raises UserError if it is missing or damaged."""
    path = path_of(name, data_root)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{name} is not registered under {data_root}; register it with: mpformer data add") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    return read(content, path)


def read(content: Any, path: Path) -> Registration:
    """A registration from JSON; raises UserError, naming the file, if it is not one."""
    try:
        values = {name: content[name] for name in Registration.__dataclass_fields__}
        lists = {name: tuple(values[name]) for name in ("things", "stuff", "notes")}
        parts = {"sources": Sources(**values["sources"]), "settings": Settings(**values["settings"])}
        return Registration(**{**values, **lists, **parts})
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"lacks or does not know {error}") from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); remove it and run `mpformer data add` again")


def know_all(data_root: Path) -> None:
    """Make known what is registered under a data root; raises UserError for a damaged registration."""
    for path in sorted(Path(data_root).glob(f"*/{FILE}")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        if isinstance(content, dict) and content.get("what") == _KIND:
            datasets.know(read(content, path).entry())


def know(content: Mapping[str, Any], where: Path) -> None:
    """Make known what a copy of a registration says, unless a set of its name is known; ``where`` is its file."""
    if content.get("name") not in datasets.DATASETS:
        datasets.know(read(content, where).entry())


def fingerprint(config: "DatasetConfig", data_root: Path) -> str:
    """The version that a configuration means: the tiles if it has a crop, else the whole images.

    Raises UserError if the set is not registered under the data root, or registered with other classes or tiles.
    """
    found = load(config.name, data_root)
    mine = dataset(config.name).classes()
    if (found.things, found.stuff) != (mine.things, mine.stuff):
        raise UserError(f"{config.name} under {data_root} has other classes than the configuration; plan it anew")
    if config.crop is None:
        return found.fingerprint
    if config.crop != found.settings.crop:
        raise UserError(
            f"{config.name} under {data_root} has tiles of {found.settings.crop} px, not {config.crop}; register it "
            f"again with: mpformer data add {config.name} … --crop {config.crop}"
        )
    return found.tiles
