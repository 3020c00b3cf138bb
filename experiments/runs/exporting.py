"""A run's final weights as other projects read them: the public Mask2Former, or transformers (Hugging Face).

Mask piloting exists in training alone, so that both forms are plain Mask2Former with the run's outputs.
"""

import pickle
from pathlib import Path
from typing import Any, Literal

from experiments.store.archive import WEIGHTS
from experiments.store.files import replacing
from experiments.store.run_dir import LIGHT_HINT, RunDir
from mpformer.config.schema import Config, TimmConfig
from mpformer.runtime.errors import UserError

Form = Literal["mask2former", "huggingface"]


def export(run: RunDir, form: Form, out: Path) -> None:
    """Write a run's weights: a ``.pth`` or ``.pkl`` for Mask2Former, a directory for ``from_pretrained``.

    Raises UserError if the run is not trained or is nothing that the form can say, and if ``out`` is there already or
    cannot be written.
    """
    config, trained = run.config(), run.trained()
    if trained is None:
        raise UserError(f"{run.run_id} is not trained to its end: it has no final weights; look with: mpformer status")
    if run.packed:
        how = LIGHT_HINT if run.was_archived_without(WEIGHTS) else "first `mpformer archive SUITE --unpack`"
        raise UserError(f"{run.run_id} is archived, and its weights are not there: {how}")
    _check(config, form, out)
    from mpformer.modeling.weights import read_weights, without_piloted_part

    state = without_piloted_part(read_weights(run.path / trained.weights))
    try:
        with replacing(out) as temporary:
            (_save_mask2former if form == "mask2former" else _save_huggingface)(config, state, temporary)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another place") from None


def _check(config: Config, form: Form, out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already; choose another name")
    if form == "mask2former" and out.suffix not in (".pth", ".pkl"):
        raise UserError(
            f"the form of {out} follows from its ending; valid: .pth (torch), .pkl (numpy arrays, detectron2's)"
        )
    if form == "mask2former" and isinstance(config.model.backbone, TimmConfig):
        raise UserError(f"the public Mask2Former has no backbone {config.model.backbone.name}; valid: ResNets and Swin")


def _save_mask2former(config: Config, state: dict[str, Any], path: Path) -> None:
    import torch

    if path.suffix == ".pth":
        torch.save({"model": state}, path)
        return
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "mpformer"}, protocol=4))


def _save_huggingface(config: Config, state: dict[str, Any], path: Path) -> None:
    from mpformer.config.classes import class_table
    from mpformer.modeling import huggingface

    names = class_table(config.dataset.name, config.dataset.task).names
    model = huggingface.build_huggingface(config.model, names)
    huggingface.load_ours(model, state)
    model.save_pretrained(path)
    huggingface.image_processor(config).save_pretrained(path)
