"""Names and shapes in a weights file, read without torch: what is wrong with a file is then said at once.

Nothing of the file is executed: every class and function that its pickle asks for is replaced by a stand-in that keeps
shapes. :mod:`mpformer.modeling.weights` decides what may be loaded; this only finds early what it would refuse.
"""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from mpformer.config.classes import num_classes
from mpformer.config.schema import Config
from mpformer.runtime.errors import UserError

Shape = tuple[int, ...]

_PREDICTOR = "sem_seg_head.predictor."


def check(config: Config, path: Path) -> None:
    """Raise UserError if a file of initial weights cannot be read, or is another model's by what needs no torch.

    Compared are the number of classes, the width and the number of queries; whatever else differs is found when the
    weights are loaded (:func:`mpformer.modeling.weights.load_weights`).
    """
    shapes = outline(path)
    classes = shapes.get(f"{_PREDICTOR}class_embed.weight", ())
    ours = num_classes(config.dataset.name, config.dataset.task)
    if len(classes) == 2 and classes[0] - 1 != ours and not config.model.reinit_class_head:
        raise UserError(
            f"{path.name} has {classes[0] - 1} classes, {config.dataset.name} ({config.dataset.task}) has {ours}: give "
            "weights of the same class list, those of a backbone alone, or --reinit-class-head to fine-tune these"
        )
    wanted = (config.model.queries, config.model.hidden_dim)
    queries = shapes.get(f"{_PREDICTOR}query_feat.weight", wanted)
    if queries != wanted:
        raise UserError(
            f"{path.name} has {queries[0]} queries of width {queries[-1]}, the model {wanted[0]} of width {wanted[1]}; "
            "check model.queries and model.hidden_dim"
        )


def class_count(path: Path) -> int:
    """Return how many classes the class head in a file tells apart; 0 if it has none, or cannot be looked into."""
    head = outline(path).get(f"{_PREDICTOR}class_embed.weight", ())
    return head[0] - 1 if len(head) == 2 else 0


def outline(path: Path) -> dict[str, Shape]:
    """Return the shape of every array in a ``.pth``, ``.pkl`` or ``.safetensors``; {} for torch's format before 1.6.

    Raises UserError for a file that is none of these.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        content = _Outline(_pickle_of(path), encoding="latin1").load()
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError, LookupError,
            AttributeError) as error:  # fmt: skip
        line = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise UserError(f"cannot read {path.name}: damaged or not a weights file ({line})") from None
    for key in ("model", "state_dict", "model_state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, int):  # the magic number that an old torch file begins with
        return {}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path.name} holds no state dict (a mapping of names to tensors)")
    found = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value.shape for name, value in found.items() if isinstance(value, _Array) and value.shape is not None}


def _safetensors(path: Path) -> dict[str, Shape]:
    """The shapes in the file's header: eight bytes of its length, then JSON."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise UserError(f"cannot read {path.name}: damaged or not a safetensors file ({line})") from None


def _pickle_of(path: Path) -> io.BufferedIOBase:
    """The pickle in a file: a member of torch's archive, or the file itself."""
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if member is None:
            raise ValueError("an archive without data.pkl")
        return io.BytesIO(archive.read(member))


class _Array:
    """Stands for whatever a pickle makes; of an array it knows the shape."""

    shape: Shape | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Array":
        return _Array()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple):  # numpy's: version, shape, …
            self.shape = state[1]


def _tensor(storage: Any, offset: int, size: Shape, *_: Any) -> _Array:
    """``torch._utils._rebuild_tensor_v2``."""
    found = _Array()
    found.shape = tuple(size)
    return found


def _parameter(data: Any, *_: Any) -> Any:
    """``torch._utils._rebuild_parameter``."""
    return data


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,  # not dict: a module's state dict has an attribute
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Outline(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), _Array)

    def persistent_load(self, pid: Any) -> Any:
        return None
