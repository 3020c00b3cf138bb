"""Every row of every suite, at both scales: its configuration, two iterations, an evaluation and a report.

The models are narrow and the images few: miniatures of the releases in their true layouts. The full widths are built
on the meta device, where they cost nothing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import planning, registry, scales
from experiments.attempt import Options, run_attempt
from experiments.identity import eval_id, run_id
from experiments.planning import Plan, PlannedRun, Request
from experiments.store import Store, read_json
from mpformer.config import Config

pytestmark = pytest.mark.slow

RELEASES = ("coco", "ade20k", "cityscapes")
MILLION = 1e6
_MODEL: dict[str, Any] = {
    "hidden_dim": 16, "conv_dim": 16, "mask_dim": 16, "heads": 2, "encoder_layers": 1, "encoder_ffn": 16,
    "decoder_layers": 5, "decoder_ffn": 16, "queries": 12, "train_points": 32, "init_weights": "",
}  # fmt: skip
_RESNET = {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"}
_SWIN = {"kind": "swin", "embed_dim": 8, "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "window": 4}
_RUN: dict[str, Any] = {
    "schedule.max_iter": 2, "schedule.batch_size": 2, "schedule.warmup_iters": 0, "schedule.amp": "off",
    "evaluation.val_images": 2, "evaluation.layer_mask_images": 1, "evaluation.min_size_test": 0,
    "evaluation.max_size_test": 0, "runtime.workers": 0, "runtime.eval_period": 0, "runtime.log_period": 1,
}  # fmt: skip


def cases() -> Iterator[Any]:
    for suite in registry.all_suites().values():
        for scale in ("mini", "paper"):
            for dataset in suite.datasets(scale) if scale == "paper" else ("shapes",):
                if dataset not in suite.not_applicable:
                    yield pytest.param(suite.name, scale, dataset, id=f"{suite.name}@{scale}+{dataset}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mpformer.data import prepare
    from mpformer.data.convert import convert
    from mpformer.data.miniature import write_miniature

    root = tmp_path_factory.mktemp("data")
    for name in RELEASES:
        write_miniature(name, root, images=4, side=64)
        convert(name, root, workers=1)
    shapes = narrow(scales.base("mini", "shapes"), root).dataset.shapes
    assert shapes is not None
    prepare.prepare_shapes(shapes, root, workers=1)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all: a row in two suites is trained once."""
    return Store(tmp_path_factory.mktemp("store"))


def narrow(config: Config, data_root: Path) -> Config:
    """The row's configuration at a width and length that take a second; toggles, task and schedule kind stay."""
    backbone = _RESNET if config.model.backbone.kind == "resnet" else _SWIN
    changes = {f"model.{key}": value for key, value in {**_MODEL, "backbone": backbone}.items()} | _RUN
    changes["schedule.steps"] = (1,) if config.schedule.lr_schedule == "step" else ()
    changes |= {"dataset.augmentation.lsj_size": 64} if config.dataset.augmentation.kind == "lsj" else {}
    if config.dataset.augmentation.kind == "crop":
        size = {"crop_size": (32, 64), "min_sizes": (48, 64), "max_size": 128}
        changes |= {f"dataset.augmentation.{key}": value for key, value in size.items()}
    if config.dataset.name == "shapes":
        small = {"side": 64, "train_images": 4, "val_images": 2}
        changes |= {f"dataset.shapes.{key}": value for key, value in small.items()} | {"dataset.fingerprint": ""}
    narrowed = planning.datasets.resolve(config.replace(changes), data_root)[0]
    return _with_file(narrowed, data_root) if config.schedule.evaluation_only else narrowed


def _with_file(config: Config, data_root: Path) -> Config:
    """A whole model's file in place of a released one."""
    import torch

    from mpformer.modeling.meta_arch import build_model

    file = data_root / "weights" / f"{config.dataset.name}-{config.dataset.task}-{config.toggles.mp_queries}.pth"
    file.parent.mkdir(exist_ok=True)
    torch.save({"model": build_model(config).state_dict()}, file)
    return planning.datasets.resolve_weights(config.replace({"model.init_weights": str(file)}), data_root)[0]


def narrowed(plan: Plan, data_root: Path) -> Plan:
    runs = []
    for run in plan.runs:
        config = narrow(run.config, data_root)
        runs.append(PlannedRun(run.row, run.seed, config, run_id(config), eval_id(config)))
    return replace(plan, runs=tuple(runs), missing=())


@pytest.mark.parametrize(("name", "scale", "dataset"), cases())
def test_every_row_trains_scores_and_reports(name: str, scale: str, dataset: str, data: Path, store: Store) -> None:
    from experiments import launching
    from reports.build import build

    plan = narrowed(planning.make(Request(name, scale, dataset, seeds=(0,)), data), data)
    launching.record(plan, store, "the sweep")
    for run in plan.unique:
        outcome = run_attempt(store.root, run.run_id, "all", Options(data, capture=False), None, run.config)
        assert outcome.name in ("done", "skipped"), f"{run.row.name}: {outcome}"
        result = read_json(store.run(run.run_id).evaluation(run.eval_id) / "result.json")
        scored = run.config.evaluation
        wanted = {"AP": scored.instance, "PQ": scored.panoptic, "mIoU": scored.semantic}
        assert {key for key in wanted if key in result["metrics"]} == {key for key in wanted if wanted[key]}
        assert bool(result.get("costs")) is scored.costs
    files = build([name], store.root, scale=scale, dataset=dataset, formats=("md", "json"))
    table = next(path for path in files if path.suffix == ".md").read_text()
    assert all(row.label in table for row in plan.rows)
    assert "planned" not in table.splitlines()[0]


def full_models() -> dict[str, Config]:
    """Every different model of the suites at scale paper, with and without piloting."""
    found: dict[str, Config] = {}
    for suite in registry.all_suites().values():
        for dataset in suite.datasets("paper"):
            for row in suite.rows("paper", dataset):
                config = suite.base("paper", dataset).replace(dict(row.changes))
                key = f"{config.model.model_dump()}{config.dataset.name}{config.dataset.task}{config.toggles}"
                found.setdefault(key, config)
    return found


def test_full_widths_have_the_published_numbers_of_parameters() -> None:
    """Mask2Former R50: 44 M, Swin-L: 216 M (Mask DINO, table 3); piloting adds a label embedding alone."""
    import torch

    from mpformer.modeling.meta_arch import build_model

    published = {"resnet": 44, "swin": 216}
    configs = full_models().values()
    assert {config.model.backbone.kind for config in configs} == set(published)
    for config in configs:
        with torch.device("meta"):
            model = build_model(config)
        count = sum(parameter.numel() for parameter in model.parameters()) / MILLION
        assert round(count) == published[config.model.backbone.kind], (config.dataset, count)
