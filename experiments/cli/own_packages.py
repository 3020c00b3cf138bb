"""Whether Python takes this project's packages from one folder: their names are ones that others use too."""

from importlib.util import find_spec
from pathlib import Path

from mpformer.runtime.code import PACKAGES, ROOT
from mpformer.runtime.errors import UserError


def check() -> None:
    """Raise UserError if one of the packages would be, or was, taken from elsewhere."""
    for name in PACKAGES:
        folder = _folder(name)
        if folder is not None and not folder.is_relative_to(ROOT):
            raise UserError(
                f"{folder} is another package of the name {name!r}, and Python finds it before {ROOT / name}: take "
                f"{folder.parent} out of PYTHONPATH, or start mpformer in another directory"
            )


def _folder(name: str) -> Path | None:
    spec = find_spec(name)
    folders = list(spec.submodule_search_locations or [spec.origin or ""]) if spec is not None else []
    return Path(folders[0]).resolve() if folders else None
