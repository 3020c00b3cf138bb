"""Which version of a dataset a configuration means, and where it lies. No torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mpformer.config.datasets import dataset as entry_of
from mpformer.config.schema import Config, DatasetConfig
from mpformer.data.sources import Release, source_of
from mpformer.runtime.errors import UserError


def prepared_dir(name: str, fingerprint: str, data_root: Path) -> Path:
    """Where a prepared dataset of this identity lies."""
    return Path(data_root) / name / fingerprint[:12]


def resolve(config: Config, data_root: Path) -> Config:
    """Fill in the dataset's fingerprint.

    Raises UserError if a dataset that must be converted first is not there, if several versions of it are and the
    configuration does not say which, or if a given fingerprint is not the parameters' own.
    """
    return config.replace({"dataset.fingerprint": fingerprint(config.dataset, data_root)})


def fingerprint(dataset: DatasetConfig, data_root: Path) -> str:
    """The identity of the dataset that is meant; see :func:`resolve` for what it raises."""
    source = source_of(dataset.name)
    if isinstance(source, Release):
        own = hashlib.sha256(source.identity.encode()).hexdigest()
    elif source.current is not None:
        return dataset.fingerprint or source.current(dataset, Path(data_root))
    elif source.fingerprint is None:
        return _among_prepared(dataset, data_root)
    else:
        own = source.fingerprint(dataset)
    if dataset.fingerprint not in ("", own):
        raise UserError(
            f"the configuration names {dataset.name} {dataset.fingerprint[:12]}, but this version of mpformer makes "
            f"{own[:12]} from its parameters; use the version that made it, or clear dataset.fingerprint"
        )
    return own


def _among_prepared(dataset: DatasetConfig, data_root: Path) -> str:
    """The only version under the data root that has the configuration's crop."""
    source = source_of(dataset.name)
    assert not isinstance(source, Release)
    wanted = dataset.crop or source.crop
    found = {
        m["fingerprint"]: m["parameters"]["crop"]
        for m in (read_manifest(p) for p in sorted(Path(data_root, dataset.name).glob("*/manifest.json")))
    }
    if dataset.fingerprint:
        return dataset.fingerprint
    fitting = [key for key, crop in found.items() if crop == wanted]
    if not fitting:
        command = source.command if wanted == source.crop else f"{source.command} --crop {wanted}"
        raise UserError(f"{dataset.name} with {wanted}-px crops is not in {data_root}; run: {command}")
    if len(fitting) > 1:
        listed = ", ".join(key[:12] for key in fitting)
        raise UserError(f"{data_root} holds several {dataset.name}; set dataset.fingerprint to one of: {listed}")
    return fitting[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.json; raises UserError if it is not one."""
    try:
        content = json.loads(path.read_text())
        return {**content, "fingerprint": content["fingerprint"], "splits": content["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove {path.parent} and prepare the dataset again") from None


def dataset_dir(config: Config, data_root: Path) -> Path:
    """The directory of a prepared dataset (of an official release: the data root itself).

    Raises UserError, naming the command that makes it, if the dataset is not there.
    """
    dataset, source = config.dataset, source_of(config.dataset.name)
    if isinstance(source, Release):
        return Path(data_root)
    directory = prepared_dir(dataset.name, fingerprint(dataset, data_root), data_root)
    if not (directory / "manifest.json").exists():
        raise UserError(f"dataset {dataset.name} {directory.name} is not in {data_root}; run: {source.command}")
    return directory


def folder(dataset: DatasetConfig, data_root: Path) -> Path:
    """The directory that a dataset fills, there or not: the prepared version's, or the release's."""
    if isinstance(source_of(dataset.name), Release):
        return Path(data_root, entry_of(dataset.name).folder)
    return prepared_dir(dataset.name, dataset.fingerprint, data_root)
