"""Which prepared dataset and initial weights a configuration means, and whether they are in place."""

import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.store.files import replacing
from experiments.store.run_dir import RunDir, Store
from mpformer.config.classes import class_table, num_classes
from mpformer.config.datasets import DATASETS, dataset
from mpformer.config.schema import Config
from mpformer.modeling.weights_outline import class_count
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError


@dataclass(frozen=True)
class DataState:
    """A dataset under the data root. ``fingerprint`` is empty while it cannot be known; ``missing`` says what to do."""

    fingerprint: str
    missing: str = ""
    preparable: bool = False
    """Whether `launch` can prepare it by itself."""


def recall(store: Store) -> None:
    """Make known the sets of the user's own that suites were launched on into a store, from its records.

    So they can be asked for by name where their data root is not at hand.
    """
    from mpformer.data.own import registration

    for record in store.suite_records():
        if record.registration:
            registration.know(record.registration, store.root)


def resolve(config: Config, data_root: Path) -> tuple[Config, DataState]:
    """Return the configuration with its dataset's fingerprint filled in, and the dataset's state.

    Raises UserError if a given fingerprint contradicts the dataset's parameters.
    """
    from mpformer.data import prepared
    from mpformer.data.sources import Release, source_of

    name, source = config.dataset.name, source_of(config.dataset.name)
    try:
        resolved = prepared.resolve(config, data_root)
    except UserError as error:
        if isinstance(source, Release) or source.fingerprint is not None:
            raise
        return config, DataState("", str(error))
    where, fingerprint = prepared.folder(resolved.dataset, data_root), resolved.dataset.fingerprint
    if isinstance(source, Release):
        absent = f"{name} is not at {where}; see: mpformer data check {name}"
        return resolved, DataState(fingerprint, "" if where.is_dir() else absent)
    if (where / "manifest.json").exists():
        return resolved, DataState(fingerprint)
    absent = f"{name} {fingerprint[:12]} is not under {data_root}"
    if source.fingerprint is not None:
        return resolved, DataState(fingerprint, f"{absent}; `launch` prepares it, or: {source.command}", True)
    return resolved, DataState(fingerprint, f"{absent}; run: {source.command}")


def check_val_images(config: Config, data_root: Path) -> None:
    """Raise UserError if more validation images are to be scored than the set has, as far as that is known."""
    from mpformer.data import prepared
    from mpformer.data.sources import Release, source_of

    name, asked = config.dataset.name, config.evaluation.val_images
    manifest = prepared.folder(config.dataset, data_root) / "manifest.json"
    if asked is None:
        return
    if config.dataset.shapes is not None:
        size = config.dataset.shapes.val_images
    elif isinstance(source_of(name), Release):
        size = dataset(name).val_images
    elif config.dataset.fingerprint and manifest.is_file():
        size = prepared.read_manifest(manifest)["splits"]["val"]["images"]
    else:
        return
    if asked > size:
        raise UserError(f"evaluation.val_images is {asked}, but {name} has {size} validation images")


def folder(config: Config, data_root: Path) -> Path:
    """Return the directory under the data root that holds a configuration's dataset."""
    from mpformer.data import prepared

    return prepared.folder(config.dataset, data_root)


def resolve_weights(config: Config, data_root: Path) -> tuple[Config, str]:
    """Return the configuration with the checksum of its initial weights, and what to do if they are not there.

    Their class list is filled in too where the class head begins anew.

    They are looked for under their own path and as ``<data root>/weights/<file name>``, where a compute node without
    internet finds them too.
    """
    name = config.model.init_weights
    if not name:
        return config, ""
    files = [Path(data_root, "weights", _file_name(name))] + ([] if "://" in name else [Path(name)])
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        fetched = "`launch` fetches them, or " if "://" in name else ""
        return config, f"initial weights {name} are not there; {fetched}put the file at {files[0]}"
    checksum = _checksum(found.resolve(), found.stat().st_mtime_ns)
    given = config.model.init_checksum
    if given not in ("", checksum):
        both = f"{found} has checksum {checksum[:12]}, model.init_checksum says {given[:12]}"
        raise UserError(f"{both}; clear model.init_checksum or give the other file")
    changes = {"model.init_weights": str(found), "model.init_checksum": checksum}
    if config.model.reinit_class_head and not config.model.init_classes:
        changes["model.init_classes"] = _class_list(found.resolve(), found.stat().st_mtime_ns)
    return config.replace(changes), ""


def fetch_weights(names: Iterable[str], data_root: Path) -> list[Path]:
    """Download initial weights that have an address into ``<data root>/weights``, where offline jobs find them.

    What is there is left alone. Returns what was fetched; raises UserError, one line, if an address does not answer.
    """
    fetched = []
    for name in dict.fromkeys(names):
        target = Path(data_root, "weights", _file_name(name))
        if "://" in name and not target.is_file():
            _download(name, target)
            fetched.append(target)
    return fetched


def _file_name(name: str) -> str:
    """The file's name under the data root; ``timm://convnext_tiny.fb_in1k`` has none of its own."""
    return name.rsplit("/", 1)[-1] + (".safetensors" if name.startswith("timm://") else "")


def _address(name: str) -> str:
    if name.startswith("timm://"):
        return f"https://huggingface.co/timm/{name.removeprefix('timm://')}/resolve/main/model.safetensors"
    return name.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/", 1)


def _download(name: str, target: Path) -> None:
    import http.client
    import urllib.request

    address = _address(name)
    try:
        with replacing(target) as temporary:
            with urllib.request.urlopen(address, timeout=60) as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file)
                expected = source.headers.get("Content-Length")
            if expected is not None and temporary.stat().st_size != int(expected):
                raise OSError(f"{temporary.stat().st_size} of {expected} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {address}: {error}; put the file at {target}") from None


@functools.cache
def _class_list(path: Path, changed: int) -> str:
    """``DATASET/TASK`` of the run that a file lies in, else of the published class list with as many classes; or ""."""
    records = (RunDir(folder).sound_record() for folder in path.parents[:2])
    if record := next((record for record in records if record is not None), None):
        of = record.config["dataset"]
        return f"{of['name']}/{of['task']}"
    count = class_count(path)
    published = [(entry.name, task) for entry in DATASETS.values() if entry.catalog for task in entry.tasks]
    alike = [one for one in published if num_classes(*one) == count]
    return "/".join(alike[0]) if len({class_table(*one).names for one in alike}) == 1 else ""


@functools.cache
def _checksum(path: Path, changed: int) -> str:
    """The checksum of a file, once per change of it."""
    return sha256(path)
