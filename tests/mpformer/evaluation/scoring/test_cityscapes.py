"""Cityscapes is scored by its own scripts: ours against the scripts run on whole directories, as the benchmark does."""

import contextlib
import io
import json
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer.config.classes import category_ids, class_table
from mpformer.config.schema import Config, validate
from mpformer.data.coco_layout import id_to_rgb
from mpformer.data.convert import convert
from mpformer.data.validation import ValidationItem, validation_items
from mpformer.evaluation.scoring.cityscapes import ground_truth_file, label_ids, scripts
from mpformer.evaluation.scoring.from_counts import CountScorer
from mpformer.evaluation.scoring.scorer import SegmentationScorer
from mpformer.runtime.errors import RunFailure, UserError
from tests.support.miniature import write_miniature
from tests.support.plain_counts import counted

pytest.importorskip("cityscapesscripts")
Prediction = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cityscapes")
    write_miniature("cityscapes", root, images=12, side=160)
    for file in (root / "cityscapes/gtFine/val").rglob("*_gtFine_instanceIds.png"):
        add_what_is_ignored(file)
    convert("cityscapes", root, workers=1)
    return root


def add_what_is_ignored(file: Path) -> None:
    """Void at the top, and an object under 100 pixels where there was a large one; groups are there already."""
    labels = file.with_name(file.name.replace("instanceIds", "labelIds"))
    ids, classes = (np.array(Image.open(path)) for path in (file, labels))
    ids[:8], classes[:8] = 0, 0
    numbers, counts = np.unique(ids[ids >= 1000], return_counts=True)
    if len(numbers):
        lost = np.flatnonzero(ids.ravel() == numbers[counts.argmax()])[70:]
        ids.flat[lost], classes.flat[lost] = 7, 7  # road
    for path, content in ((file, ids), (labels, classes)):
        Image.fromarray(content).save(path)


def config_of(task: str) -> Config:
    tasks = {"instance": task != "semantic", "panoptic": task == "panoptic", "semantic": task != "instance"}
    return validate({"dataset": {"name": "cityscapes", "task": task}, "evaluation": tasks})


def guess(item: ValidationItem, rng: np.random.Generator, task: str) -> Prediction:
    """The targets, shifted and relabelled here and there, some twice, with nonsense, an empty mask and equal scores."""
    found, table = item.inputs["instances"], class_table("cityscapes", task)
    shift = tuple(int(n) for n in rng.integers(-2, 3, 2))
    masks = found.gt_masks.roll(shift, (1, 2))
    classes = [c if rng.random() < 0.8 else int(rng.integers(len(table))) for c in found.gt_classes.tolist()]
    h, w = item.truth.height, item.truth.width
    nonsense = torch.from_numpy(rng.random((3, h, w)) < 0.1)
    things = [n for n, c in enumerate(found.gt_classes.tolist()) if table.is_thing[c]]
    proposals = torch.cat([masks[things], masks[things[:3]], nonsense, torch.zeros(1, h, w, dtype=torch.bool)])
    labels = [int(rng.choice(table.thing_indices)) if rng.random() < 0.2 else int(found.gt_classes[n]) for n in things]
    labels += labels[:3] + [int(c) for c in rng.choice(table.thing_indices, 4)]
    ids, semantic = torch.zeros(h, w, dtype=torch.int64), torch.zeros(h, w, dtype=torch.int64)
    for number, (mask, category) in enumerate(zip(masks, classes, strict=True), start=1):
        ids[mask], semantic[mask] = number, category
    ids[nonsense[0]] = 0
    return {
        "instances": SimpleNamespace(
            pred_masks=proposals,
            scores=torch.from_numpy(rng.choice([0.3, 0.5, 0.71, 0.9], len(proposals)).astype(np.float32)),
            pred_classes=torch.tensor(labels),
        ),
        "panoptic_seg": (ids, [{"id": n, "category_id": c} for n, c in enumerate(classes, start=1)]),
        "sem_seg": semantic,
    }


def scored(root: Path, task: str) -> tuple[list[tuple[ValidationItem, Prediction]], dict[str, float], dict[str, float]]:
    """The predictions, what the recorded scorer gives for them, and what their counts give."""
    config, rng = config_of(task), np.random.default_rng(3)
    pairs = [(item, guess(item, rng, task)) for item in validation_items(config, root)]
    scorer = SegmentationScorer(config)
    counts = CountScorer(config.replace({"evaluation.panoptic": False}), 1)
    for item, prediction in pairs:
        scorer.add(prediction, item.truth)
        maps = counts.maps(item.truth)
        counts.add(item.truth, maps, [counted(prediction, maps, counts.classes)])
    return pairs, scorer.result(), counts.results()[0]


def test_the_miniature_has_what_the_benchmark_ignores(root: Path) -> None:
    """Groups, objects under 100 pixels, and void; without them agreement would say less."""
    groups = small = void = 0
    for item in validation_items(config_of("instance"), root):
        with Image.open(ground_truth_file(item.truth, "instanceIds")) as image:
            ids, counts = np.unique(np.array(image), return_counts=True)
        groups += int(np.isin(ids, (24, 25, 26, 27, 28, 31, 32, 33)).sum())
        small += int(((ids >= 1000) & (counts < 100)).sum())
        void += int((ids == 0).sum())
    assert min(groups, small, void) > 0, (groups, small, void)


def quietly(function: Any, *arguments: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_ap_is_the_benchmarks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

    pairs, recorded, counts = scored(root, task)
    lists: tuple[list[str], list[str]] = ([], [])
    for item, prediction in pairs:
        lines, found = [], prediction["instances"]
        for n, (mask, score) in enumerate(zip(found.pred_masks, found.scores.tolist(), strict=True)):
            Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(tmp_path / f"{item.truth.image_id}_{n}.png")
            label = label_ids(task)[int(found.pred_classes[n])]
            lines.append(f"{item.truth.image_id}_{n}.png {label} {score}\n")
        (tmp_path / f"{item.truth.image_id}.txt").write_text("".join(lines))
        lists[0].append(str(tmp_path / f"{item.truth.image_id}.txt"))
        lists[1].append(str(ground_truth_file(item.truth, "instanceIds")))
    monkeypatch.chdir(tmp_path)  # the script leaves matches.json where it runs
    arguments = copy(script.args)
    arguments.quiet, arguments.JSONOutput = True, False
    arguments.predictionPath, arguments.gtInstancesFile = str(tmp_path), str(tmp_path / "gt.json")
    averages = quietly(script.evaluateImgLists, *lists, arguments)["averages"]
    for ours in (recorded, counts):
        assert ours["AP"] == pytest.approx(100 * averages["allAp"], abs=1e-6)
        assert ours["AP50"] == pytest.approx(100 * averages["allAp50%"], abs=1e-6)
    assert 1 < recorded["AP"] < 95
    assert recorded["COCO AP"] != pytest.approx(recorded["AP"], abs=1e-3)  # another benchmark, another number


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_iou_is_the_benchmarks(root: Path, tmp_path: Path, task: str) -> None:
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script

    pairs, recorded, counts = scored(root, task)
    ids = np.array(label_ids("semantic"), dtype=np.uint8)
    lists: tuple[list[str], list[str]] = ([], [])
    for item, prediction in pairs:
        Image.fromarray(ids[prediction["sem_seg"].numpy()]).save(tmp_path / f"{item.truth.image_id}.png")
        lists[0].append(str(tmp_path / f"{item.truth.image_id}.png"))
        lists[1].append(str(ground_truth_file(item.truth, "labelIds")))
    arguments = copy(script.args)
    arguments.quiet, arguments.JSONOutput = True, False
    expected = quietly(script.evaluateImgLists, *lists, arguments)["averageScoreClasses"]
    assert recorded["mIoU"] == pytest.approx(100 * expected, abs=1e-6)
    assert counts["mIoU"] == pytest.approx(100 * expected, abs=1e-6)
    assert 5 < recorded["mIoU"] < 95


def test_pq_is_the_benchmarks(root: Path, tmp_path: Path) -> None:
    from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as script

    pairs, recorded, _ = scored(root, "panoptic")
    fine, official = root / "cityscapes" / "gtFine", category_ids("cityscapes", "panoptic")
    (tmp_path / "found").mkdir()
    rows = []
    for item, prediction in pairs:
        ids, segments = prediction["panoptic_seg"]
        name = ground_truth_file(item.truth, "panoptic").name
        listed = [s for s in segments if (ids == s["id"]).any()]
        Image.fromarray(id_to_rgb(ids.numpy().astype(np.int32))).save(tmp_path / "found" / name)
        rows.append(
            {
                "image_id": name.removesuffix("_gtFine_panoptic.png"),
                "file_name": name,
                "segments_info": [{"id": s["id"], "category_id": official[s["category_id"]]} for s in listed],
            }
        )
    (tmp_path / "found.json").write_text(json.dumps({"annotations": rows}))
    truth = fine / "cityscapes_panoptic_val.json", fine / "cityscapes_panoptic_val"
    found = tmp_path / "found.json", tmp_path / "found"
    results = quietly(script.evaluatePanoptic, *map(str, (*truth, *found, tmp_path / "out.json")))
    for key, part in (("PQ", "All"), ("PQ_th", "Things"), ("PQ_st", "Stuff")):
        assert recorded[key] == pytest.approx(100 * results[part]["pq"], abs=1e-6)
    assert 5 < recorded["PQ"] < 95


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_nothing_found_and_everything_found(root: Path, task: str) -> None:
    config = config_of(task)
    scorer, counts = SegmentationScorer(config), CountScorer(config.replace({"evaluation.panoptic": False}), 1)
    for item in validation_items(config, root):
        h, w = item.truth.height, item.truth.width
        nothing = SimpleNamespace(
            pred_masks=torch.zeros(0, h, w), scores=torch.zeros(0), pred_classes=torch.zeros(0, dtype=torch.int64)
        )
        empty = torch.zeros(h, w, dtype=torch.int64)
        prediction = {"instances": nothing, "panoptic_seg": (empty, []), "sem_seg": empty}
        scorer.add(prediction, item.truth)
        maps = counts.maps(item.truth)
        counts.add(item.truth, maps, [counted(prediction, maps, counts.classes)])
    result, (counted_result,) = scorer.result(), counts.results()
    if task != "semantic":
        assert result["AP"] == result["AP50"] == counted_result["AP"] == counted_result["AP50"] == 0.0
    if task == "panoptic":
        assert result["PQ"] == 0.0
    assert SegmentationScorer(config).result().keys() <= {"COCO AP"}


@pytest.mark.parametrize(("kind", "task"), [("instanceIds", "instance"), ("labelIds", "semantic")])
def test_a_label_id_outside_the_list_is_one_clear_line(tmp_path: Path, kind: str, task: str) -> None:
    write_miniature("cityscapes", tmp_path, images=2, side=64)
    convert("cityscapes", tmp_path, workers=1)
    config = config_of(task)
    (item,) = validation_items(config, tmp_path)
    file = ground_truth_file(item.truth, kind)
    with Image.open(file) as image:
        changed = np.array(image)
    changed[:10] = 77
    Image.fromarray(changed).save(file)
    with pytest.raises(RunFailure, match=r"Cityscapes' scripts refuse.*77.*data check cityscapes") as caught:
        SegmentationScorer(config).add(guess(item, np.random.default_rng(0), task), item.truth)
    assert caught.value.failure_class == "data"


def test_without_its_scripts_cityscapes_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation.instances2dict", None)
    with pytest.raises(UserError, match="pip install cityscapesscripts"):
        scripts("evaluation.instances2dict")
