"""Every row of every suite, at both scales and on each of its datasets: configuration, two iterations, scores, report.

The models are narrow and the images few: miniatures of the releases in their true layouts. The full widths are built
on the meta device, where they cost nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.execution.attempt import Options, run_attempt
from experiments.store.files import read_json
from experiments.store.identity import eval_id, run_id
from experiments.store.run_dir import Store
from experiments.suites import catalogue, datasets, planning
from experiments.suites.planning import Plan, PlannedRun, Request
from mpformer.config.classes import num_classes
from mpformer.config.paper_settings import setting
from mpformer.config.schema import Config

pytestmark = pytest.mark.slow

RELEASES = ("coco", "ade20k", "cityscapes")
MILLION = 1e6
_MODEL: dict[str, Any] = {
    "hidden_dim": 16, "conv_dim": 16, "mask_dim": 16, "heads": 2, "encoder_layers": 1, "encoder_ffn": 16,
    "decoder_layers": 5, "decoder_ffn": 16, "queries": 12, "train_points": 32, "init_weights": "",
}  # fmt: skip
_RESNET = {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8}
_SWIN = {"kind": "swin", "embed_dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "window": 4}
_RUN: dict[str, Any] = {
    "schedule.max_iter": 2, "schedule.batch_size": 2, "schedule.warmup_iters": 0, "schedule.amp": "off",
    "evaluation.val_images": 2, "evaluation.layer_mask_images": 1, "evaluation.min_size_test": 0,
    "evaluation.max_size_test": 0, "runtime.workers": 0, "runtime.eval_period": 0, "runtime.log_period": 1,
}  # fmt: skip


def cases() -> Iterator[Any]:
    for suite in catalogue.all_suites().values():
        for scale in ("mini", "paper"):
            for dataset in suite.datasets(scale):
                if not suite.why_not(dataset):
                    yield pytest.param(suite.name, scale, dataset, id=f"{suite.name}@{scale}+{dataset}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mpformer.data.convert import convert
    from mpformer.data.sets.nuclei_set import prepare_nuclei
    from tests.support.miniature import write_miniature

    root = tmp_path_factory.mktemp("data")
    for name in RELEASES:
        write_miniature(name, root, images=8, side=64)  # and 4 to validate: a dozen
        convert(name, root, workers=1)
    write_bowl(root / "bowl", images=12)
    prepare_nuclei(root / "bowl", root, crop=64)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all: a row in two suites is trained once."""
    return Store(tmp_path_factory.mktemp("store"))


def narrow(config: Config, data_root: Path) -> Config:
    """The row's configuration at a width and length that take a second; toggles, task and schedule kind stay."""
    chosen = config.model.backbone
    backbone = {**_RESNET, "norm": chosen.norm} if chosen.kind == "resnet" else _SWIN
    changes = {f"model.{key}": value for key, value in {**_MODEL, "backbone": backbone}.items()} | _RUN
    changes["schedule.steps"] = (1,) if config.schedule.lr_schedule == "step" else ()
    changes |= {"dataset.augmentation.lsj_size": 64} if config.dataset.augmentation.kind == "lsj" else {}
    if config.dataset.augmentation.kind == "crop":
        size = {"crop_size": (32, 64), "min_sizes": (48, 64), "max_size": 128}
        changes |= {f"dataset.augmentation.{key}": value for key, value in size.items()}
    if config.dataset.name == "nuclei":
        changes |= {"dataset.crop": 64, "dataset.fingerprint": ""}
    if config.dataset.name == "shapes":
        small = {"side": 64, "train_images": 4, "val_images": 2}
        changes |= {f"dataset.shapes.{key}": value for key, value in small.items()} | {"dataset.fingerprint": ""}
    narrowed = datasets.resolve(config.replace(changes), data_root)[0]
    return _with_file(narrowed, data_root) if config.schedule.evaluation_only else narrowed


def _with_file(config: Config, data_root: Path) -> Config:
    """A whole model's file in place of a released one."""
    import torch

    from mpformer.modeling.meta_arch import build_model

    kind = f"{config.dataset.task}-{config.model.backbone.kind}-{config.toggles.mp_queries}"
    file = data_root / "weights" / f"{config.dataset.name}-{kind}.pth"
    file.parent.mkdir(exist_ok=True)
    torch.save({"model": build_model(config).state_dict()}, file)
    return datasets.resolve_weights(config.replace({"model.init_weights": str(file)}), data_root)[0]


def write_bowl(root: Path, images: int) -> None:
    """Images in the public layout of the 2018 Data Science Bowl: bright discs on noise, a mask file each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for number in range(images):
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        folder = root / "stage1_train" / f"{number:02d}"
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for k, center in enumerate(((12, 14), (40, 20), (30, 48))):
            disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 < 80
            pixels[disc] = 200
            Image.fromarray(disc.astype(np.uint8) * 255).save(folder / "masks" / f"{k}.png")
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")


def narrowed(plan: Plan, data_root: Path) -> Plan:
    runs = []
    for run in plan.runs:
        config = narrow(run.config, data_root)
        runs.append(PlannedRun(run.row, run.seed, config, run_id(config), eval_id(config)))
    return replace(plan, runs=tuple(runs), missing=())


@pytest.mark.parametrize(("name", "scale", "dataset"), cases())
def test_every_row_trains_scores_and_reports(name: str, scale: str, dataset: str, data: Path, store: Store) -> None:
    from experiments.launch import begin
    from mpformer.data.prepare import prepare
    from reports.build import build

    overrides = (("dataset.crop", 64),) if dataset == "nuclei" else ()
    plan = narrowed(planning.make(Request(name, scale, dataset, seeds=(0,), overrides=overrides), data), data)
    if datasets.resolve(plan.base, data)[1].preparable:  # drawn: nobody has to name the set here
        prepare(plan.base.dataset, data, workers=1)
    begin.record(plan, store, "the sweep")
    for run in plan.unique:
        ending = run_attempt(store.root, run.run_id, "all", Options(data, capture=False), None, run.config)
        assert ending.outcome in ("done", "skipped"), f"{run.row.name}: {ending}"
        result = read_json(store.run(run.run_id).evaluation(run.eval_id) / "result.json")
        scored = run.config.evaluation
        wanted = {"AP": scored.instance, "PQ": scored.panoptic, "mIoU": scored.semantic}
        assert {key for key in wanted if key in result["metrics"]} == {key for key in wanted if wanted[key]}
        assert bool(result.get("costs")) is scored.costs
        for key in wanted.keys() & result["layers"].keys():  # the same scorers at every decoder layer
            assert len(result["layers"][key]) == run.config.model.decoder_layers + 1
        assert wanted.keys() & result["layers"].keys() == wanted.keys() & result["metrics"].keys()
    files = build([name], store.root, scale=scale, dataset=dataset, formats=("md", "json"))
    table = next(path for path in files if path.suffix == ".md").read_text()
    assert all(row.label in table for row in plan.rows)
    assert "planned" not in table.splitlines()[0]


def full_models() -> list[Config]:
    """Every different model of the suites at scale paper, with and without piloting."""
    found: dict[str, Config] = {}
    for suite in catalogue.all_suites().values():
        for dataset in suite.datasets("paper"):
            for row in suite.rows("paper", dataset):
                config = suite.base("paper", dataset).replace(dict(row.changes))
                key = f"{config.model.model_dump()}{config.dataset.name}{config.dataset.task}{config.toggles}"
                found.setdefault(key, config)
    return list(found.values())


def parameters(config: Config) -> int:
    """Counted on the meta device, where a full width costs nothing."""
    import torch

    from mpformer.modeling.meta_arch import build_model

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


def test_full_widths_have_the_published_numbers_of_parameters() -> None:
    """COCO instance: R50 44 M, Swin-L 216 M (Mask DINO, table 3).

    Every other model is one of these but for its classes, queries, what piloting adds and, on Cityscapes, a live batch
    normalisation's scales and offsets: to the last parameter.
    """
    norms = 2 * (64 + 3 * (2 * 64 + 256) + 4 * (2 * 128 + 512) + 6 * (2 * 256 + 1024) + 3 * (2 * 512 + 2048))
    norms += 2 * (256 + 512 + 1024 + 2048)  # of the shortcuts
    plain = {"resnet": setting("coco/instance/r50-50ep"), "swin": setting("coco/instance/swin-l-100ep")}
    published = {kind: parameters(config) for kind, config in plain.items()}
    assert {kind: round(count / MILLION) for kind, count in published.items()} == {"resnet": 44, "swin": 216}
    models = full_models()
    assert {config.model.backbone.kind for config in models} == set(published)
    for config in models:
        like, dim = plain[config.model.backbone.kind], config.model.hidden_dim
        classes = num_classes(config.dataset.name, config.dataset.task)
        expected = published[config.model.backbone.kind]
        expected += (classes - num_classes("coco", "instance")) * (dim + 1)  # the class head
        expected += (config.model.queries - like.model.queries) * 2 * dim  # content and position
        expected += norms if config.dataset.name == "cityscapes" and config.model.backbone.kind == "resnet" else 0
        toggles = config.toggles
        expected -= 0 if toggles.query_position else config.model.queries * dim
        if toggles.mp_queries:
            expected += dim * (classes if toggles.class_embedding == "label" else 1)
        assert parameters(config) == expected, (config.dataset, config.toggles)
