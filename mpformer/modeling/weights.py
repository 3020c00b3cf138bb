"""Weights from elsewhere: released Mask2Former and MP-Former files, ImageNet backbones; read without trusting them.

Parameter names here equal Mask2Former's, so a released file needs no renaming but for what its older versions
called differently. Torch files are read with ``weights_only=True``; a ``.pkl`` is read by an unpickler
that admits arrays in plain containers and refuses everything else, so that no file runs code. (Mask2Former's Swin
converter pickles torch tensors; their bytes go through ``weights_only=True`` too.)
"""

import collections
import io
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError

__all__ = ["ClassNames", "detect_toggles", "load_weights", "local_path", "read_weights", "sha256"]

_log = logging.getLogger(__name__)
_HEAD = "sem_seg_head."
_PREDICTOR = "sem_seg_head.predictor."
_CLASS_HEAD = (f"{_PREDICTOR}class_embed.weight", f"{_PREDICTOR}class_embed.bias", f"{_PREDICTOR}label_enc.weight")
#: computed from the configuration, never taken from a file
_DERIVED = re.compile(r"criterion\.empty_weight|pixel_(mean|std)|.*\.(relative_position_index|attn_mask)")
#: in an ImageNet classifier, but not in a backbone
_CLASSIFIER = re.compile(r"(stem\.)?fc\.|head\.|norm\.(weight|bias)$")
#: in a backbone of ours, but not in an ImageNet classifier (Swin's norms of the outputs, a feature pyramid)
_FRESH = re.compile(r"backbone\.(norm\d\.(weight|bias)|simfp_\d\..*)")
_ARRAY_FUNCTIONS = {("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")}


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes that a file's class head and the model's tell apart, in the order of their rows."""

    of_file: tuple[str, ...]
    """Empty: not known."""
    of_model: tuple[str, ...]

    def rows(self) -> dict[int, int]:
        """Row of the model -> row of the file, for classes whose names agree but for case, dashes and underscores."""
        theirs = {_plain(name): row for row, name in enumerate(self.of_file)}
        found = {row: theirs.get(_plain(name)) for row, name in enumerate(self.of_model)}
        return {row: there for row, there in found.items() if there is not None}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def load_weights(
    model: nn.Module, path: Path, *, new_classes: ClassNames | None = None, allow_backbone: bool = False
) -> dict[str, list[str]]:
    """Load a file into `model`, with nothing missing and nothing left over.

    Args:
        model: an MPFormer; one on the meta device is left as it is, after all checks.
        path: a released or own ``.pth``/``.pkl``; with `allow_backbone` also an ImageNet backbone, for a timm
            backbone a file that timm or the model's authors publish (``.safetensors`` too).
        new_classes: keep the model's own class head and label embedding, but for the rows of classes that the file has
            too, and that of "no object".

    Returns:
        ``{"loaded": names, "kept": names}``: what came from the file and what the model kept.

    Raises:
        UserError: missing, unexpected or misshapen parameters, or a file that cannot be trusted.
    """
    state = read_weights(path)
    target = {name: value for name, value in model.state_dict().items() if not _DERIVED.fullmatch(name)}
    backbone = not any(name.startswith(_HEAD) for name in state)
    if backbone:
        state = _as_backbone(model, state, path, allow_backbone)
        target = {name: value for name, value in target.items() if name.startswith("backbone.")}
    state = {name: value for name, value in state.items() if not _ignorable(name, target)}
    kept = _class_head(state, target, path, new_classes)
    fresh = {name for name in target if (backbone and _FRESH.fullmatch(name)) or name.endswith(_COUNTER)}
    kept += [name for name in target if name in fresh and name not in state]
    _same_names(state, target, kept, path)
    _same_shapes(state, target, path)
    if not _is_trial(target):
        model.load_state_dict(state, strict=False)
        _log.info("%s: %d tensors loaded, %d kept", path.name, len(state), len(kept))
    return {"loaded": sorted(state), "kept": sorted(kept)}


def detect_toggles(path: Path) -> dict[str, Any]:
    """Toggles that a full model's file was trained with, as far as its parameters tell; dotted keys.

    ``toggles.query_position`` is on in Mask2Former's files and off in MP-Former's; ``toggles.mp_queries`` is
    on where there is a label embedding, ``toggles.class_embedding`` is ``learnt`` where that has one row.
    """
    state = read_weights(path)
    if not any(name.startswith(_PREDICTOR) for name in state):
        raise UserError(f"{path.name} holds a backbone, not a whole model: it does not show the toggles")
    content, classes = state.get(f"{_PREDICTOR}label_enc.weight"), state.get(f"{_PREDICTOR}class_embed.bias")
    found: dict[str, Any] = {
        "toggles.query_position": f"{_PREDICTOR}query_embed.weight" in state,
        "toggles.mp_queries": content is not None,
    }
    if content is not None and classes is not None and len(content) == 1 and len(classes) > 2:
        found["toggles.class_embedding"] = "learnt"
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a file's state dict under today's names; raises UserError if it cannot be read or trusted."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}: give the path of a .pth, .pkl or .safetensors file")
    content = _READERS.get(path.suffix, _read_torch)(path)
    for key in ("model", "state_dict", "model_state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path.name} holds no state dict (a mapping of names to tensors)")
    return _renamed({str(name): _tensor(value, str(name), path) for name, value in content.items()})


def without_piloted_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole model's weights as plain Mask2Former has them, with the same outputs.

    The label embedding goes, and what is computed from the configuration; a model without position embeddings of its
    queries gets them, all zero.
    """
    kept = {name: value for name, value in state.items() if not _DERIVED.fullmatch(name) or "relative_position" in name}
    kept.pop(_CLASS_HEAD[2], None)
    kept.setdefault(f"{_PREDICTOR}query_embed.weight", torch.zeros_like(state[f"{_PREDICTOR}query_feat.weight"]))
    return kept


def local_path(name: str) -> Path:
    """Return where `name` is on this machine; ``detectron2://`` and ``https://`` addresses are downloaded once."""
    if "://" not in name:
        return Path(name)
    from detectron2.utils.file_io import PathManager

    try:
        return Path(PathManager.get_local_path(name))
    except Exception as error:
        raise UserError(f"cannot fetch {name}: {error}; download it and give the file's path instead") from None


def _storage(data: bytes) -> Any:
    """A pickled tensor's numbers, read as an untrusted torch file."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_ARRAYS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits arrays, plain containers and numbers; refuses any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAYS:
            return _ARRAYS[module, name]
        package, _, tail = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (tail, name) in _ARRAY_FUNCTIONS:
            return super().find_class(f"numpy._core.{tail}" if hasattr(np, "_core") else module, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes; only for the one encoding that it uses."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError("it encodes text in an unexpected way")
    return text.encode("latin1")


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from None
    except (EOFError, ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot read {path.name}: damaged or not a pickle of arrays ({error})") from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _untrusted(path, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {path.name}: damaged or not a torch file ({_line(error)})") from None


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path.name}: damaged or not a safetensors file ({_line(error)})") from None


_READERS = {".pkl": _read_pickle, ".safetensors": _read_safetensors}


def _untrusted(path: Path, error: Exception) -> UserError:
    return UserError(
        f"refused {path.name}: it holds more than arrays ({_line(error)}); save its state dict alone with torch.save"
    )


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    if isinstance(value, Tensor):
        return value
    raise UserError(f"{path.name}: {name!r} is a {type(value).__name__}, not an array of numbers")


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's names: no wrapper's prefix; early Mask2Former's pixel decoder and query names brought up to date.

    Decided by the names themselves, not by version metadata, which a copied state dict has lost.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    old = not any(name.startswith(f"{_HEAD}pixel_decoder.") for name in state)
    renamed = {}
    for name, value in state.items():
        if old and name.startswith(_HEAD) and not name.startswith(_PREDICTOR):
            name = name.replace(_HEAD, f"{_HEAD}pixel_decoder.", 1)
        renamed[name.replace(f"{_PREDICTOR}static_query.", f"{_PREDICTOR}query_feat.")] = value
    return renamed


def _as_backbone(model: nn.Module, state: dict[str, Tensor], path: Path, allowed: bool) -> dict[str, Tensor]:
    """An ImageNet classifier's state dict under our backbone's names, without the classifier."""
    if not allowed:
        raise UserError(f"{path.name} holds a backbone only: give the weights of a whole model")
    converted = getattr(getattr(model, "backbone", None), "converted", None)
    if converted is not None:
        try:
            return {f"backbone.{name}": value for name, value in converted(state).items()}
        except UserError as error:
            raise UserError(f"{path.name} does not fit the model: {error}") from None
    names = {name: _torchvision(name.removeprefix("backbone.")) for name in state}
    return {f"backbone.{new}": state[old] for old, new in names.items() if not _CLASSIFIER.match(new)}


def _torchvision(name: str) -> str:
    """detectron2's ResNet names for torchvision's; any other name is returned as it is.

    ``layer1.0.bn2.weight`` → ``res2.0.conv2.norm.weight``; ``downsample.0`` → ``shortcut``; ``conv1`` → ``stem.conv1``.
    """
    layer = re.match(r"layer([1-4])\.", name)
    if layer:
        name = f"res{int(layer[1]) + 1}.{name[layer.end() :]}"
    elif re.match(r"(conv1|bn1)\.", name):
        name = f"stem.{name}"
    elif not name.startswith(("stem.", "res")):
        return name
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


_COUNTER = "num_batches_tracked"
"""Of a live batch normalisation; files of frozen ones have none, and nothing here reads it."""


def _ignorable(name: str, target: dict[str, Tensor]) -> bool:
    """Derived buffers, and batch counters that a frozen normalisation does not have."""
    return bool(_DERIVED.fullmatch(name)) or (name.endswith(_COUNTER) and name not in target)


def _class_head(
    state: dict[str, Tensor], target: dict[str, Tensor], path: Path, classes: ClassNames | None
) -> list[str]:
    """Check the file's class head, or put the model's own with the rows that it takes in its place.

    Returns the names of what the model keeps as a whole.
    """
    weight = _CLASS_HEAD[0]
    if weight not in state or weight not in target:
        return []
    theirs, ours = state[weight].shape[0] - 1, target[weight].shape[0] - 1
    if classes is None:
        if theirs != ours:
            raise UserError(
                f"{path.name} has {theirs} classes, the model {ours}: give weights of the same class list; to "
                "fine-tune these, `train` and `launch` have --reinit-class-head"
            )
        return []
    if classes.of_file and len(classes.of_file) != theirs:
        listed = f"model.init_classes lists {len(classes.of_file)}"
        raise UserError(f"{path.name} has {theirs} classes, {listed}: set it to the DATASET/TASK of the weights")
    rows = classes.rows()
    if not _is_trial(target):
        _say_rows(classes, rows, path)
    kept = [name for name in _CLASS_HEAD if name in target and name not in state]
    for name in _CLASS_HEAD:
        found = state.pop(name, None)
        if found is not None and name in target:
            state[name] = _with_rows(target[name], found, rows | {ours: theirs})
    return kept


def _is_trial(target: Mapping[str, Tensor]) -> bool:
    """Whether the model has no memory: it is only tried whether a file fits."""
    return any(value.is_meta for value in target.values())


def _with_rows(own: Tensor, found: Tensor, rows: Mapping[int, int]) -> Tensor:
    """The model's tensor with rows of the file's; a label embedding has none of "no object", a learnt one just one."""
    if own.shape[1:] != found.shape[1:] or len(own) == len(found) == 1:
        return found  # `_same_shapes` says what is wrong
    if own.is_meta:
        return own
    result = own.clone()
    for row, there in rows.items():
        if row < len(own) and there < len(found):
            result[row] = found[there]
    return result


def _say_rows(classes: ClassNames, rows: Mapping[int, int], path: Path) -> None:
    if not classes.of_file:
        _log.warning("%s: its class list is not known (model.init_classes): every class begins anew", path.name)
    taken = [name for row, name in enumerate(classes.of_model) if row in rows]
    begun = [name for row, name in enumerate(classes.of_model) if row not in rows]
    _log.info("class head: %d classes taken by name from %s: %s", len(taken), path.name, ", ".join(taken) or "none")
    _log.info("class head: %d classes begin anew: %s", len(begun), ", ".join(begun) or "none")


def _same_names(state: dict[str, Tensor], target: dict[str, Tensor], kept: list[str], path: Path) -> None:
    missing, unexpected = sorted(target.keys() - state.keys() - set(kept)), sorted(state.keys() - target.keys())
    if not missing and not unexpected:
        return
    parts = [f"{len(names)} {word} ({_few(names)})" for word, names in
             (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
    raise UserError(f"{path.name} does not fit the model: {', '.join(parts)}{_hint(missing + unexpected)}")


def _hint(names: list[str]) -> str:
    hints = {
        "query_embed": "toggles.query_position",
        "label_enc": "toggles.mp_queries",
        "backbone.": "model.backbone",
        "pixel_decoder.transformer.encoder": "model.encoder_layers",
        "transformer_ffn_layers": "model.decoder_layers",
    }
    keys = [key for part, key in hints.items() if any(part in name for name in names)]
    return f"; check {', '.join(keys)}" if keys else "; check the model section of the configuration"


def _same_shapes(state: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> None:
    wrong = [
        f"{name} {tuple(value.shape)} instead of {tuple(target[name].shape)}"
        for name, value in state.items()
        if value.shape != target[name].shape
    ]
    if wrong:
        raise UserError(f"{path.name} does not fit the model: {len(wrong)} shapes differ ({_few(wrong)})")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
