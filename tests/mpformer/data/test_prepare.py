"""Prepared datasets: layout, manifest, resuming, and which version a configuration means."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mpformer.config.schema import Config, ShapesConfig, validate
from mpformer.data import chunks, prepare, prepared
from mpformer.data.check import check
from mpformer.data.coco_layout import rgb_to_id
from mpformer.data.contact_sheet import contact_sheet
from mpformer.data.scene import Scene
from mpformer.data.sets import shapes
from mpformer.data.sets.shapes_set import prepare_shapes
from mpformer.runtime.errors import UserError
from tests.support.present import present

TINY = ShapesConfig(side=32, train_images=5, val_images=3)


def directory(root: Path, config: Config) -> Path:
    return prepared.dataset_dir(config, root)


def test_layout_holds_the_scenes(shapes_root: Path, shapes_config: Config) -> None:
    root = directory(shapes_root, shapes_config)
    assert shapes_config.dataset.shapes is not None
    scene = shapes.generate(shapes_config.dataset.shapes, "val", 2)
    assert (np.asarray(Image.open(root / "val/000003.png")) == scene.image).all()
    assert (rgb_to_id(np.asarray(Image.open(root / "panoptic_val/000003.png"))) == scene.ids).all()
    semantic = np.asarray(Image.open(root / "semantic_val/000003.png"))
    panoptic = json.loads((root / "annotations/panoptic_val.json").read_text())
    info = next(a for a in panoptic["annotations"] if a["image_id"] == 3)["segments_info"]
    for segment in info:
        inside = scene.ids == segment["id"]
        assert inside.sum() == segment["area"]
        assert (semantic[inside] == segment["category_id"] - 1).all()
    assert (semantic[scene.ids == 0] == 255).all()
    assert [c["id"] for c in panoptic["categories"]] == list(range(1, 13))


def test_instances_are_coco(shapes_root: Path, shapes_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(directory(shapes_root, shapes_config) / "annotations/instances_train.json"))
    capsys.readouterr()
    assert len(coco.imgs) == 12
    assert len(coco.cats) == 8
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_manifest_tells_the_dataset(shapes_root: Path, shapes_config: Config) -> None:
    root = directory(shapes_root, shapes_config)
    manifest = prepared.read_manifest(root / "manifest.json")
    assert manifest["fingerprint"] == shapes.fingerprint(present(shapes_config.dataset.shapes))
    assert manifest["fingerprint"].startswith(root.name)
    assert {s: a["images"] for s, a in manifest["splits"].items()} == {"train": 12, "val": 6}
    assert set(manifest["attention"]["empty_percent"]["area"]) == {"4", "8", "16", "32"}
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} - {"manifest.json"}
    assert files == set(manifest["files"])


def test_workers_change_nothing(tmp_path: Path) -> None:
    config = ShapesConfig(side=32, train_images=51, val_images=2)
    one = prepare_shapes(config, tmp_path / "one", workers=1)
    two = prepare_shapes(config, tmp_path / "two", workers=2)
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 5)
    config = ShapesConfig(side=32, train_images=8, val_images=3)
    drawn: list[tuple[str, int]] = []
    original = shapes.generate

    def stop_late(config: ShapesConfig, split: str, index: int) -> Scene:
        drawn.append((split, index))
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return original(config, split, index)

    monkeypatch.setattr(shapes, "generate", stop_late)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(config, tmp_path, workers=1)
    target = prepared.prepared_dir("shapes", shapes.fingerprint(config), tmp_path)
    assert not target.exists()
    seen: list[tuple[int, int]] = []
    drawn.clear()

    def noted(config: ShapesConfig, split: str, index: int) -> Scene:
        drawn.append((split, index))
        return original(config, split, index)

    monkeypatch.setattr(shapes, "generate", noted)
    prepare_shapes(config, tmp_path, lambda done, total: seen.append((done, total)), workers=1)
    assert drawn[0] == ("train", 5)  # the first chunk of five was kept
    assert seen[-1] == (11, 11)
    whole = prepare_shapes(config, tmp_path / "again", workers=1)
    assert (target / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert not [p for p in target.parent.iterdir() if p != target]


def test_a_prepared_dataset_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_shapes(TINY, tmp_path, workers=1)
    monkeypatch.setattr(shapes, "generate", lambda *_: pytest.fail("drawn again"))
    assert prepare_shapes(TINY, tmp_path, workers=1) == first


def test_losing_a_race_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes the same dataset while this one is at work."""
    original = prepare._move_into_place

    def overtaken(beside: Path, target: Path) -> None:
        original(beside, target)
        beside.mkdir()
        original(beside, target)

    monkeypatch.setattr(prepare, "_move_into_place", overtaken)
    target = prepare_shapes(TINY, tmp_path, workers=1)
    assert (target / "manifest.json").exists()
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_data_root_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--data-root"):
        prepare_shapes(TINY, tmp_path / "below", workers=1)


def test_a_data_root_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-root"):
        prepare_shapes(TINY, tmp_path / "file", workers=1)


# --- resolving --------------------------------------------------------------------------------------------------


def config_of(**dataset: object) -> Config:
    return validate({"dataset": {"task": "instance", **dataset}})


def test_shapes_resolve_without_being_there(tmp_path: Path) -> None:
    config = prepared.resolve(config_of(name="shapes", shapes={"side": 32}), tmp_path)
    assert config.dataset.fingerprint == shapes.fingerprint(ShapesConfig(side=32))
    with pytest.raises(UserError, match="mpformer data prepare shapes"):
        prepared.dataset_dir(config, tmp_path)


def test_a_fingerprint_of_another_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use the version that made it"):
        prepared.resolve(config_of(name="shapes", shapes={}, fingerprint="0" * 64), tmp_path)


def test_releases_resolve_to_the_release(tmp_path: Path) -> None:
    names = ("coco", "ade20k", "cityscapes")
    found = {prepared.resolve(config_of(name=name), tmp_path).dataset.fingerprint for name in names}
    assert len(found) == 3
    assert all(len(f) == 64 for f in found)
    assert prepared.dataset_dir(config_of(name="coco"), tmp_path) == tmp_path


def test_nuclei_must_be_there_to_resolve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mpformer data prepare nuclei SRC"):
        prepared.resolve(config_of(name="nuclei"), tmp_path)


def test_several_nuclei_need_a_choice(tmp_path: Path) -> None:
    for key in ("a" * 64, "b" * 64):
        folder = tmp_path / "nuclei" / key[:12]
        folder.mkdir(parents=True)
        manifest = {"fingerprint": key, "splits": {}, "parameters": {"crop": 128}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"dataset\.fingerprint to one of: aaaaaaaaaaaa, bbbbbbbbbbbb"):
        prepared.resolve(config_of(name="nuclei"), tmp_path)
    chosen = prepared.resolve(config_of(name="nuclei", fingerprint="b" * 64), tmp_path)
    assert prepared.dataset_dir(chosen, tmp_path).name == "b" * 12


# --- check and contact sheet ------------------------------------------------------------------------------------


def test_check_of_a_whole_dataset(shapes_root: Path) -> None:
    (report,) = check("shapes", shapes_root, full=True)
    assert report.ok
    text = "\n".join(report.lines())
    assert "complete" in text
    assert "12 train, 6 val images" in text
    assert "val/000001.png, 64 x 64" in text


def test_check_of_a_half_extracted_dataset(tmp_path: Path) -> None:
    root = prepare_shapes(TINY, tmp_path, workers=1)
    (root / "train/000002.png").unlink()
    (root / "semantic_val/000001.png").write_bytes(b"damaged")
    (quick,) = check("shapes", tmp_path)
    assert not quick.ok
    assert "first missing: 000002.png" in "\n".join(quick.lines())
    assert "mpformer data prepare shapes" in "\n".join(quick.lines())
    (full,) = check("shapes", tmp_path, full=True)
    assert [item.path for item in full.items if not item.ok] == ["train", "checksums of all files"]
    (root / "manifest.json").write_text("{")
    (broken,) = check("shapes", tmp_path)
    assert not broken.ok


def test_check_of_nothing(tmp_path: Path) -> None:
    (report,) = check("nuclei", tmp_path)
    assert not report.ok
    assert "mpformer data prepare nuclei SRC" in "\n".join(report.lines())
    with pytest.raises(UserError, match="valid: shapes, nuclei, coco"):
        check("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["coco", "ade20k", "cityscapes"])
def test_check_of_a_release_says_what_is_missing_and_where_to_get_it(tmp_path: Path, name: str) -> None:
    (report,) = check(name, tmp_path)
    text = "\n".join(report.lines())
    assert "0 of" in text
    assert "http" in text
    assert not report.ok


def test_contact_sheet(shapes_root: Path, shapes_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "sheet.png"
    contact_sheet(directory(shapes_root, shapes_config), out, images=4, columns=2)
    sheet = np.asarray(Image.open(out))
    assert sheet.shape[1] > 2 * 2 * 2 * 64
    assert sheet.std() > 20
