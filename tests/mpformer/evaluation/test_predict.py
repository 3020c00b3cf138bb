"""Overlays on images of one's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpformer.config.schema import Config
from mpformer.evaluation.predict import Seen, overlay, predict, regions
from mpformer.modeling.meta_arch import build_model
from mpformer.runtime.errors import UserError
from mpformer.training.checkpoints import write


@pytest.fixture
def config(shapes_config: Config) -> Config:
    backbone = {"kind": "resnet", "depth": 18, "stem_channels": 8, "res2_channels": 8, "norm": "GN"}
    small = {"hidden_dim": 16, "conv_dim": 16, "mask_dim": 16, "heads": 2, "encoder_layers": 1, "encoder_ffn": 16,
             "decoder_layers": 2, "decoder_ffn": 16, "queries": 20, "attention_strides": (16, 8)}  # fmt: skip
    return shapes_config.replace(
        {f"model.{name}": value for name, value in (small | {"backbone": backbone}).items()}
        | {"evaluation.object_mask_threshold": 0.0, "evaluation.overlap_threshold": 0.0}
    )


@pytest.fixture
def weights(config: Config, tmp_path: Path) -> Path:
    """Trained with piloting and without query positions: told from the file."""
    model = build_model(config.replace({"toggles.mp_queries": True, "toggles.query_position": False}))
    write(tmp_path / "w.pth", {"model": model.state_dict()})
    return tmp_path / "w.pth"


def test_overlays_have_the_images_size_and_differ_from_them(config: Config, weights: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 255, (50, 70, 3), dtype=np.uint8), rng.integers(0, 255, (40, 30), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.jpg")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    images = [tmp_path / "colour.jpg", tmp_path / "grey.png"]
    written = [seen.overlay for seen in predict(images, weights, config, tmp_path / "out")]
    assert [path.name for path in written] == ["colour.png", "grey.png"]
    first, second = (np.asarray(Image.open(path)) for path in written)
    assert first.shape == (50, 70, 3)
    assert second.shape == (40, 30, 3)


def test_each_kind_of_result_is_painted(config: Config) -> None:
    pixels = np.zeros((120, 120, 3), dtype=np.uint8)
    ids = torch.zeros(120, 120, dtype=torch.int32)
    ids[60:, 60:] = 1
    segments = {"panoptic_seg": (ids, [{"id": 1, "isthing": True, "category_id": 0}])}
    painted = overlay(pixels, regions(segments, config))
    assert painted[119, 119].any()
    assert not painted[:60].any()
    semantic = torch.zeros(12, 120, 120)
    semantic[3, :, 60:] = 1
    painted = overlay(pixels, regions({"sem_seg": semantic}, config))
    assert len({tuple(pixel) for pixel in painted[80]}) >= 2


@pytest.mark.parametrize("names", [["gone.png"], [], ["a.png", "b/a.jpg"]])
def test_mistakes_are_named_before_anything_is_written(
    names: list[str], config: Config, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"no such image|at least one image|predict them separately"):
        predict([tmp_path / name for name in names], weights, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_image_is_a_user_error(config: Config, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        list(predict([tmp_path / "broken.png"], weights, config, tmp_path / "out"))


def test_a_threshold_chooses_what_is_shown_and_masks_are_written(config: Config, weights: Path, tmp_path: Path) -> None:
    """Issue 12, 5.8: instances by their score; a mask of each in a folder of the image, none left of an earlier one."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    instances = config.replace({"evaluation.panoptic": False, "evaluation.instance": True})
    told: list[tuple[int, int]] = []

    def seen(threshold: float) -> Seen:
        folders = {"out": tmp_path / "out", "masks": tmp_path / "masks"}
        (found,) = predict([tmp_path / "a.jpg"], weights, instances, threshold=threshold, **folders, progress=_noted)
        return found

    def _noted(done: int, total: int) -> None:
        told.append((done, total))

    every = seen(0.0)
    assert told == [(0, 1), (1, 1)]
    assert every.regions
    scores = sorted(one.score or 0.0 for one in every.regions)
    assert every.masks == tuple(sorted((tmp_path / "masks" / "a").iterdir()))
    for region, path in zip(every.regions, every.masks, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)) == 255, region.mask)
    record = every.record()["regions"]
    assert [(one["class"], one["score"], one["mask"]) for one in record] == [
        (region.name, region.score, str(path)) for region, path in zip(every.regions, every.masks, strict=True)
    ]
    middle = scores[len(scores) // 2]
    assert len(seen(middle).regions) == sum(score >= middle for score in scores)
    assert seen(1.0).regions == ()
    assert list((tmp_path / "masks" / "a").iterdir()) == []


def test_a_threshold_is_the_panoptic_ones_and_none_of_a_semantic_map(
    config: Config, weights: Path, tmp_path: Path
) -> None:
    """Issue 12, 5.8."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    panoptic = config.replace({"evaluation.panoptic": True})
    (every,), (none,) = (predict([tmp_path / "a.png"], weights, panoptic, tmp_path / "o", threshold=t) for t in (0, 1))
    assert every.regions
    assert none.regions == ()
    semantic = config.replace(dict.fromkeys(("evaluation.panoptic", "evaluation.instance"), False))
    with pytest.raises(UserError, match="--threshold does not apply: a semantic map"):
        predict([tmp_path / "a.png"], weights, semantic, tmp_path / "o", threshold=0.3)


def test_no_file_is_taken_for_a_folder_or_overwritten(config: Config, weights: Path, tmp_path: Path) -> None:
    """Issue 12, 5.8."""
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    before = image.read_bytes()
    for message, out, masks in (
        ("--out .*a.png is a file; give a directory", image, None),
        ("--masks .*a.png is a file; give a directory", tmp_path / "o", image),
        ("would overwrite .*a.png", tmp_path, None),
    ):
        with pytest.raises(UserError, match=message):
            predict([image], weights, config, out, masks=masks)
    assert image.read_bytes() == before
    assert not (tmp_path / "o").exists()
