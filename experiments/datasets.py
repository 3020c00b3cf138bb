"""Which prepared dataset a configuration means, and whether it is in place; never opens an image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.store import read_json
from mpformer.config import Config
from mpformer.errors import UserError


@dataclass(frozen=True)
class DataState:
    """A dataset under the data root. ``fingerprint`` is empty while it cannot be known; ``missing`` says what to do."""

    fingerprint: str
    missing: str = ""
    preparable: bool = False
    """Whether `launch` can prepare it by itself."""


def state(config: Config, data_root: Path) -> DataState:
    """Return the dataset's fingerprint and what is missing of it; raises UserError if two prepared sets would fit."""
    name = config.dataset.name
    if name == "shapes":
        return _shapes(config, data_root)
    if name == "nuclei":
        return _nuclei(config, data_root)
    return DataState("", f"dataset {name!r} cannot be found by this version; valid: shapes, nuclei")


def resolve(config: Config, data_root: Path) -> tuple[Config, DataState]:
    """Return the configuration with its dataset's fingerprint filled in, and the dataset's state."""
    found = state(config, data_root)
    if config.dataset.fingerprint and found.fingerprint != config.dataset.fingerprint:
        wanted = config.dataset.fingerprint[:12]
        return config, DataState(config.dataset.fingerprint, f"{config.dataset.name} {wanted} is not under {data_root}")
    return config.replace({"dataset.fingerprint": found.fingerprint}), found


def _shapes(config: Config, data_root: Path) -> DataState:
    from mpformer.data.shapes import fingerprint

    assert config.dataset.shapes is not None
    print_ = fingerprint(config.dataset.shapes)
    if (data_root / "shapes" / print_[:12] / "manifest.json").exists():
        return DataState(print_)
    missing = f"shapes {print_[:12]} is not under {data_root}: `mpformer data prepare shapes` (launch does it by itself)"
    return DataState(print_, missing, preparable=True)


def _nuclei(config: Config, data_root: Path) -> DataState:
    manifests = [read_json(path) for path in sorted((data_root / "nuclei").glob("*/manifest.json"))]
    found = [m for m in manifests if isinstance(m, dict) and _fits(m, config)]
    if not found:
        return DataState("", f"nuclei is not under {data_root}: run `mpformer data prepare nuclei SRC`")
    if len(found) > 1:
        prints = ", ".join(str(m["fingerprint"])[:12] for m in found)
        raise UserError(f"several prepared nuclei sets fit ({prints}); choose with --set dataset.fingerprint=…")
    return DataState(str(found[0]["fingerprint"]))


def _fits(manifest: dict[str, Any], config: Config) -> bool:
    wanted = config.dataset.fingerprint
    if wanted:
        return manifest.get("fingerprint") == wanted
    crop = (manifest.get("parameters") or {}).get("crop")
    return bool(manifest.get("fingerprint")) and crop in (None, config.dataset.crop)
