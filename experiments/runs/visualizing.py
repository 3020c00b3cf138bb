"""Which masks the layer explorer shows: of which evaluation, of which images, and what must be computed first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.store.archive import WEIGHTS
from experiments.store.files import read_json
from experiments.store.run_dir import LIGHT_HINT, RunDir
from mpformer.config.schema import Config, validate
from mpformer.runtime.errors import UserError

KEPT, FURTHER = "layer_masks", "further_masks"
"""Directories of an evaluation: what it kept itself, by rule, and what was computed later, on request."""


@dataclass(frozen=True)
class Evaluated:
    """A run at its newest evaluation."""

    run: RunDir
    folder: Path

    @property
    def label(self) -> str:
        """The row and seed, for a page."""
        record = self.run.record()
        return f"{record.row or self.run.run_id}, seed {'?' if record.seed is None else record.seed}"

    def images(self) -> set[int]:
        """Ids of the images that have masks."""
        return set().union(*(_listed(self.folder / name) for name in (KEPT, FURTHER)))

    def config(self) -> Config:
        """The run's configuration with the settings of this evaluation."""
        tree = self.run.config().model_dump()
        setting = self.run.setting(self.folder)
        return validate({**tree, "evaluation": setting} if setting is not None else tree)

    def weights(self) -> Path:
        """The weights that were evaluated; raises UserError if they are not there any more, or are others."""
        if self.run.was_archived_without(WEIGHTS):
            raise UserError(f"{self.run.run_id} was archived without its weights: {LIGHT_HINT}")
        if self.run.original is not None:
            how = "`mpformer archive SUITE --unpack` before masks of further images are computed"
            raise UserError(f"{self.run.run_id} is archived: {how}")
        path = self.run.weights()
        if path is None:
            how = "masks of further images cannot be computed; launching its suite trains it again"
            raise UserError(f"{self.run.run_id} has no weights, or damaged ones: {how}")
        return path


def newest_evaluation(run: RunDir) -> Evaluated:
    """The newest complete evaluation of a run; raises UserError if there is none, or its files were not archived."""
    found = run.newest_evaluation()
    if found is None:
        hint = "it is trained but not evaluated" if run.trained() else "it has not finished training"
        raise UserError(f"{run.run_id} has no layer masks yet: {hint}; `mpformer launch` its suite, then look again")
    if any(map(run.was_archived_without, (KEPT, "per_image.parquet"))):
        raise UserError(f"{run.run_id} was archived without its stored masks and per-image tables: {LIGHT_HINT}")
    return Evaluated(run, found)


def check_comparable(evaluated: Sequence[Evaluated]) -> None:
    """Raise UserError for runs whose ground-truth objects are not the same: they cannot stand side by side."""
    data = [one.config().dataset for one in evaluated]
    kinds = {(of.name, of.task, of.fingerprint) for of in data}
    if len(kinds) > 1:
        described = " and ".join(f"{name} ({task}, {(fingerprint or '')[:12]})" for name, task, fingerprint in kinds)
        raise UserError(f"runs of different data have no object in common: {described}; look at each by itself")


def chosen_images(evaluated: Sequence[Evaluated], images: str, worst: int | None) -> list[int]:
    """The images asked for: ids such as ``3,17``, and with ``worst`` those of :func:`worst_images`; none: the kept.

    Raises UserError for ids that are no numbers.
    """
    try:
        given = [int(text) for text in images.split(",") if text.strip()]
    except ValueError:
        raise UserError(f"image ids are numbers such as 3,17 (got {images!r})") from None
    return list(dict.fromkeys([*given, *(worst_images(evaluated, worst) if worst else ())]))


def labels(evaluated: Sequence[Evaluated]) -> list[str]:
    """Names of the runs on the page, with the id where they would be equal."""
    names = [one.label for one in evaluated]
    if len(set(names)) == len(names):
        return names
    return [f"{name} [{one.run.run_id.rsplit('-', 1)[-1]}]" for name, one in zip(names, evaluated, strict=True)]


def default_page(root: Path, evaluated: Sequence[Evaluated]) -> Path:
    """Where a page goes that no path was given for."""
    return root / "reports" / "explorer" / ("-vs-".join(one.run.run_id for one in evaluated) + ".html")


def worst_images(evaluated: Sequence[Evaluated], objects: int) -> list[int]:
    """The images of each run's ``objects`` largest changes between layers over all evaluated images.

    The rule is the failure gallery's (:func:`analysis.layer_table.worst_changes`), without its limit of one case an
    image. Raises UserError where a run has no layer analysis.
    """
    from analysis import layer_table

    images: dict[int, None] = {}
    for one in evaluated:
        path = one.folder / "layers.parquet"
        if not path.exists():
            raise UserError(f"{one.run.run_id} was evaluated without layer analysis: leave out --everywhere")
        found = layer_table.worst_changes(layer_table.read(path), objects, per_image=objects)
        images |= dict.fromkeys(int(i) for i in found["image_id"])
    return list(images)


def complete(evaluated: Sequence[Evaluated], images: Sequence[int], data_root: Path) -> int:
    """Compute what is missing of these images' masks in every run; returns how many masks files were added."""
    added = 0
    for one in evaluated:
        missing = [i for i in images if i not in one.images()]
        if missing:
            from mpformer.evaluation.layer_masks import write_further_masks

            write_further_masks(one.config(), one.weights(), missing, one.folder / FURTHER, data_root)
            added += len(missing)
    return added


def _listed(folder: Path) -> set[int]:
    index = read_json(folder / "index.json")
    return {int(entry["image_id"]) for entry in index.get("images", [])} if isinstance(index, dict) else set()
