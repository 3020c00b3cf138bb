"""Every setting of the public release, resolved from pieces, equals the reference table cell by cell."""

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpformer.config.classes import num_classes
from mpformer.config.paper_settings import BACKBONES, _default_kind, setting, setting_names
from mpformer.config.schema import Config, RuntimeConfig
from mpformer.runtime.errors import UserError

with (Path(__file__).parents[2] / "golden" / "paper_settings.csv").open() as file:
    ROWS = list(csv.DictReader(file))

TRAIN = {
    ("ade20k", "instance"): ("ade20k_instance_train", "ade20k_instance_val"),
    ("ade20k", "panoptic"): ("ade20k_panoptic_train", "ade20k_panoptic_val"),
    ("ade20k", "semantic"): ("ade20k_sem_seg_train", "ade20k_sem_seg_val"),
    ("cityscapes", "instance"): ("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val"),
    ("cityscapes", "panoptic"): ("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val"),
    ("cityscapes", "semantic"): ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val"),
    ("coco", "instance"): ("coco_2017_train", "coco_2017_val"),
    ("coco", "panoptic"): ("coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg"),
}


def cells(config: Config) -> dict[str, Any]:
    """A configuration in the columns of the table; None: the cell is empty there."""
    dataset, model, schedule, test = config.dataset, config.model, config.schedule, config.evaluation
    augmentation, train = dataset.augmentation, TRAIN[dataset.name, dataset.task]
    lsj, step = augmentation.kind == "lsj", schedule.lr_schedule == "step"
    return {
        "train": (train[0],),
        "test": (train[1],),
        "max_iter": schedule.max_iter,
        "lr_schedule": "WarmupMultiStepLR" if step else "WarmupPolyLR",
        "steps": schedule.steps if step else None,
        "warmup_iters": schedule.warmup_iters,
        "batch_size": schedule.batch_size,
        "base_lr": schedule.base_lr,
        "weight_decay": schedule.weight_decay,
        "backbone_multiplier": schedule.backbone_multiplier,
        "amp": schedule.amp == "fp16",
        "queries": model.queries,
        "num_classes": num_classes(dataset.name, dataset.task),
        "dec_layers_plus_1": model.decoder_layers + 1,
        "lsj_image_size": augmentation.lsj_size if lsj else None,
        "lsj_min_scale": augmentation.lsj_min_scale if lsj else None,
        "lsj_max_scale": augmentation.lsj_max_scale if lsj else None,
        "crop_size": None if lsj else augmentation.crop_size,
        "min_size_train": None if lsj else list(augmentation.min_sizes),
        "max_size_train": None if lsj else augmentation.max_size,
        "min_size_test": test.min_size_test,
        "max_size_test": test.max_size_test,
        "no_object_weight": model.no_object_weight,
        "class_weight": model.class_weight,
        "mask_weight": model.mask_weight,
        "dice_weight": model.dice_weight,
        "train_points": model.train_points,
        "init_weights": model.init_weights,
    }


_RELEASE = re.compile(
    r"(?P<dataset>\w+)/(?P<task>\w+)-segmentation/(?:swin/)?maskformer2_(?P<backbone>R50|R101|swin_[a-z]+)\w*?"
    r"_bs16_(?P<length>\d+(?:ep|k))(?:_res640)?(?P<step>_steplr)?(?:_drop(?P<drop>\d*))?(?:_DN_query|_dbg)?\.yaml"
)


def from_release(path: str) -> str:
    """Return the setting that a configuration file of the public release stands for.

    ``coco/instance-segmentation/maskformer2_R50_bs16_12ep_DN_query.yaml`` → ``coco/instance/r50-12ep-step``.
    """
    match = _RELEASE.fullmatch(path)
    assert match, f"{path!r} is not a configuration file of the release"
    dataset, task = match["dataset"], match["task"]
    backbone = match["backbone"].lower()
    backbone = f"swin-{backbone[5]}" if backbone.startswith("swin") else backbone
    if match["drop"] is not None:
        # the release names the last iteration before the first drop, or nothing
        drop = round((int(match["drop"] or 144_999) + 1) / 1000)
        return f"{dataset}/{task}/{backbone}-{max(drop, 150) // 50 * 50 + 100}k-step-drop{drop}k"
    length = "160k" if dataset == "ade20k" else match["length"]  # one ADE20K file is misnamed 90k
    kind = "step" if match["step"] else _default_kind(dataset, task)
    return f"{dataset}/{task}/{backbone}-{length}-{kind}"


def parse(text: str) -> Any:
    text = text.removesuffix(" (d2 default)")
    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return text


@pytest.mark.parametrize("row", ROWS, ids=[row["config"] for row in ROWS])
def test_setting_equals_the_table_cell_by_cell(row: dict[str, str]) -> None:
    found = cells(setting(from_release(row["config"])))
    assert found == {column: parse(text) for column, text in row.items() if column != "config"}


def test_table_is_whole_and_every_listed_setting_is_in_it() -> None:
    assert len(ROWS) == 48
    assert {from_release(row["config"]) for row in ROWS} == set(setting_names())


def test_default_schedule_of_a_name_without_one() -> None:
    assert setting("coco/instance/r50-12ep") == setting("coco/instance/r50-12ep-step")
    assert setting("ade20k/semantic/r50-160k") == setting("ade20k/semantic/r50-160k-poly")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pieces_multiply(backbone: str) -> None:
    assert setting(f"coco/panoptic/{backbone}-50ep").model.backbone == BACKBONES[backbone].config


@pytest.mark.parametrize("name", setting_names())
def test_which_resnets_have_live_normalisation(name: str) -> None:
    """As Mask2Former's configurations have it; the table has no column for it (issue 12, 5.14)."""
    backbone = setting(name).model.backbone
    live = name.startswith(("cityscapes", "ade20k/semantic/r101")) and backbone.kind == "resnet"
    assert (getattr(backbone, "norm", "") == "SyncBN") is live


@pytest.mark.parametrize(
    ("backbone", "side", "weights"),
    [
        ("swin-b", 640, "swin_base_patch4_window12_384_22k.pkl"),
        ("swin-b-in1k", 640, "swin_base_patch4_window12_384.pkl"),
        ("swin-l", 640, "swin_large_patch4_window12_384_22k.pkl"),
        ("swin-s", 512, "swin_small_patch4_window7_224.pkl"),
    ],
)
def test_the_swins_of_ade20ks_semantic_segmentation(backbone: str, side: int, weights: str) -> None:
    """Issue 12, 5.14: as Mask2Former's published files have them; the MP-Former release has Swin-L alone."""
    config = setting(f"ade20k/semantic/{backbone}-160k")
    crop = config.dataset.augmentation
    assert (crop.crop_size, crop.min_sizes[0], crop.min_sizes[-1], crop.max_size) == (
        (side, side), side // 2, 2 * side, 4 * side,
    )  # fmt: skip
    assert (config.evaluation.min_size_test, config.evaluation.max_size_test) == (side, 4 * side)
    assert (config.model.init_weights, config.model.queries) == (weights, 100)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("coco/instance", "coco/instance/r50-12ep"),
        ("voc/instance/r50-12ep", "coco, ade20k, cityscapes"),
        ("coco/boxes/r50-12ep", "instance, panoptic, semantic"),
        ("coco/instance/swin-x-12ep", "r50, r101, swin-t"),
        ("coco/instance/r50-13ep", "12ep, 24ep, 36ep, 50ep, 100ep"),
    ],
)
def test_unknown_pieces_list_the_valid_ones(name: str, listed: str) -> None:
    with pytest.raises(UserError, match=listed):
        setting(name)


def test_settings_import_no_torch() -> None:
    code = """
import sys, mpformer.config.paper_settings as s
s.setting('coco/instance/r50-12ep')
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gpus_need_not_repeat_their_sums_in_the_papers_settings() -> None:
    """Deterministic kernels cost time there, and resuming is not bit-exact on a GPU in any case."""
    assert not any(setting(name).runtime.deterministic for name in setting_names())
    assert RuntimeConfig().deterministic
