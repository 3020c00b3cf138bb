"""Real images: the Data Science Bowl's layout, made up in small and, where it is there, the real archive."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpformer.config.schema import validate
from mpformer.data import prepared
from mpformer.data.loader import train_batches
from mpformer.data.sets import nuclei
from mpformer.data.sets.nuclei_set import prepare_nuclei
from mpformer.data.validation import validation_items
from mpformer.runtime.errors import UserError

ARCHIVE = Path(__file__).parents[5] / "shared" / "data" / "dsb2018_256.tar.xz"
real = pytest.mark.skipif(not ARCHIVE.exists(), reason="the Data Science Bowl images are not beside the repository")


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def made_up(count: int = 12) -> dict[str, bytes]:
    """Files of the public layout: 80 x 70 px images with three nuclei each, one of them over a tile's border."""
    files = {}
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 60, (80, 70, 4), dtype=np.uint8)
        for k, (y, x) in enumerate(((5, 5), (28, 10), (40, 40))):
            mask = np.zeros((80, 70), dtype=np.uint8)
            mask[y : y + 10, x : x + 8] = 255
            image[mask > 0] = 200
            files[f"stage1_train/{i:02d}/masks/{k}.png"] = png(mask)
        files[f"stage1_train/{i:02d}/images/{i:02d}.png"] = png(image)
    return files


def written(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", made_up())


def test_directory_zip_and_tar_are_the_same_dataset(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for path in source.rglob("*.png"):
            archive.write(path, path.relative_to(source))
    with tarfile.open(tmp_path / "s.tar.xz", "w:xz") as tar:
        tar.add(source / "stage1_train", "stage1_train")
    places = (source, source / "stage1_train", tmp_path / "s.zip", tmp_path / "s.tar.xz")
    assert len({nuclei.fingerprint(nuclei.read_source(p), 32) for p in places}) == 1


def test_fingerprint_knows_content_and_crop(source: Path) -> None:
    images = nuclei.read_source(source)
    before = nuclei.fingerprint(images, 32)
    assert nuclei.fingerprint(images, 64) != before
    images[0].masks["0.png"] += b"x"
    assert nuclei.fingerprint(images, 32) != before


def test_tiles_cut_label_and_void(source: Path) -> None:
    tiles = nuclei.tiles(nuclei.read_source(source)[0], 32)
    # rows 64 ... 79 and columns 64 ... 69 are a remainder; tile (32, 0) has no nucleus
    assert [t.corner for t in tiles] == [(0, 0), (0, 32), (32, 32)]
    first, second, _ = (t.scene for t in tiles)
    assert first.image.shape == (32, 32, 3)
    assert sorted(np.bincount(first.ids.ravel())[1:]) == [32, 80]  # the second nucleus is cut at row 32
    assert np.bincount(second.ids.ravel())[1:].tolist() == [48]
    assert not first.hidden


def test_slivers_become_void() -> None:
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    mask[10:20, 31:50] = 255  # one column, 10 pixels, lies in the left tile
    mask[10, 31] = 0
    scenes = {t.corner: t.scene for t in nuclei.tiles(nuclei.SourceImage("a", png(image), {"m": png(mask)}), 32)}
    assert set(scenes) == {(32, 0)}
    other = mask.copy()
    other[:] = 0
    other[25:31, 5:25] = 255
    scenes = {
        t.corner: t.scene
        for t in nuclei.tiles(nuclei.SourceImage("a", png(image), {"m": png(mask), "n": png(other)}), 32)
    }
    assert len(scenes[0, 0].hidden) == 1
    assert scenes[0, 0].hidden[0][1].sum() == 9
    assert len(scenes[0, 0].segments) == 1


def test_all_tiles_of_an_image_are_on_one_side(source: Path, tmp_path: Path) -> None:
    root = prepare_nuclei(source, tmp_path / "data", crop=32)
    sources = {}
    for split in ("train", "val"):
        content = prepared.read_manifest(root / "manifest.json")
        assert content["splits"][split]["images"] > 0
        import json

        images = json.loads((root / f"annotations/instances_{split}.json").read_text())["images"]
        sources[split] = {i["source"] for i in images}
    assert not sources["train"] & sources["val"]
    assert len(sources["train"] | sources["val"]) == 12


def test_nuclei_train_and_validate(source: Path, tmp_path: Path) -> None:
    prepare_nuclei(source, tmp_path / "data", crop=32)
    config = validate({"dataset": {"name": "nuclei", "task": "instance", "crop": 32}, "schedule": {"batch_size": 2}})
    config = prepared.resolve(config, tmp_path / "data")
    batch = next(train_batches(config, tmp_path / "data"))
    assert batch[0]["image"].shape == (3, 32, 32)
    assert set(batch[0]["instances"].gt_classes.tolist()) == {0}
    item = next(iter(validation_items(config, tmp_path / "data")))
    assert item.truth.annotations
    assert item.truth.ids is None


def test_nuclei_has_no_other_task(source: Path) -> None:
    from mpformer.config.classes import num_classes

    with pytest.raises(UserError, match="has no task 'panoptic'; valid: instance"):
        num_classes("nuclei", "panoptic")


def test_bad_sources_are_one_clear_line(tmp_path: Path, source: Path) -> None:
    def fails(path: Path, match: str, crop: int = 32) -> None:
        with pytest.raises(UserError, match=match) as caught:
            prepare_nuclei(path, tmp_path / "data", crop=crop)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no <id>/images")
    (tmp_path / "broken.tar.xz").write_bytes(b"not an archive")
    fails(tmp_path / "broken.tar.xz", "cannot read")
    with tarfile.open(tmp_path / "whole.tar.xz", "w:xz") as tar:
        tar.add(source, "stage1_train")
    (tmp_path / "half.tar.xz").write_bytes((tmp_path / "whole.tar.xz").read_bytes()[:600])
    fails(tmp_path / "half.tar.xz", "cannot read")
    fails(source, "both splits need some", crop=256)
    (source / "stage1_train/03/images/03.png").unlink()
    fails(source, "03 has no image")


def test_damaged_files_are_one_clear_line(tmp_path: Path) -> None:
    files = made_up(3)
    files["stage1_train/01/masks/0.png"] = files["stage1_train/01/masks/0.png"][:40]
    with pytest.raises(UserError, match=r"01/masks/0\.png is not a readable PNG"):
        prepare_nuclei(written(tmp_path / "a", files), tmp_path, crop=32)
    files = made_up(3)
    files["stage1_train/02/masks/0.png"] = png(np.zeros((5, 5), np.uint8))
    with pytest.raises(UserError, match=r"02/masks/0\.png is \(5, 5\)"):
        prepare_nuclei(written(tmp_path / "b", files), tmp_path, crop=32)


@real
def test_the_real_archive(tmp_path: Path) -> None:
    images = nuclei.read_source(ARCHIVE)
    assert len(images) == 270
    tiles = nuclei.tiles(images[0], 128)
    assert all(t.scene.image.shape == (128, 128, 3) for t in tiles)
    share = np.mean([i.split == "val" for i in images])
    assert 0.14 < share < 0.27
    whole = nuclei.tiles(images[5], 256)
    assert len(whole[0].scene.segments) + len(whole[0].scene.hidden) == len(images[5].masks)
