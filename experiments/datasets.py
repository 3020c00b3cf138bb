"""Which prepared dataset a configuration means, and whether it is in place; never opens an image."""

from dataclasses import dataclass
from pathlib import Path

from mpformer.config import Config
from mpformer.errors import UserError


@dataclass(frozen=True)
class DataState:
    """A dataset under the data root. ``fingerprint`` is empty while it cannot be known; ``missing`` says what to do."""

    fingerprint: str
    missing: str = ""
    preparable: bool = False
    """Whether `launch` can prepare it by itself."""


def resolve(config: Config, data_root: Path) -> tuple[Config, DataState]:
    """Return the configuration with its dataset's fingerprint filled in, and the dataset's state.

    Raises UserError if a given fingerprint contradicts the dataset's parameters.
    """
    from mpformer.data import prepare

    try:
        resolved = prepare.resolve(config, data_root)
    except UserError as error:
        if config.dataset.name != "nuclei":
            raise
        return config, DataState("", str(error))
    fingerprint = resolved.dataset.fingerprint
    if config.dataset.name not in prepare.PREPARED:
        return resolved, DataState(fingerprint)
    if (prepare.prepared_dir(config.dataset.name, fingerprint, data_root) / "manifest.json").exists():
        return resolved, DataState(fingerprint)
    return resolved, _missing(config.dataset.name, fingerprint, data_root)


def _missing(name: str, fingerprint: str, data_root: Path) -> DataState:
    where = f"{name} {fingerprint[:12]} is not under {data_root}"
    if name == "shapes":
        return DataState(fingerprint, f"{where}; `launch` prepares it, or: mpformer data prepare shapes", True)
    return DataState(fingerprint, f"{where}; run: mpformer data prepare {name} SRC")
