"""The drawn images: the same on every machine, and as difficult as their parameters say."""

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mpformer.config.datasets import SHAPES_THINGS
from mpformer.config.schema import ShapesConfig
from mpformer.data.coco_layout import empty_at_stride, semantic_map
from mpformer.data.scene import Scene
from mpformer.data.sets.shapes import MIN_VISIBLE_PIXELS, fingerprint, generate

DEFAULT = ShapesConfig()
STRESSES = ("crowding", "large", "tiny", "thin", "split", "camouflage", "clutter", "noise", "blur")
#: of the raw arrays of the first three training images; another value here means that GENERATOR_VERSION must rise
GOLDEN = "db936b51e5eecc2b0ba1d61c0042c45c8b76e2e7e36376be73de921415beb9f3"


def digest(scenes: list[Scene]) -> str:
    content = b"".join(s.image.tobytes() + s.ids.astype("<i4").tobytes() for s in scenes)
    return hashlib.sha256(content).hexdigest()


def scenes(count: int, **changes: Any) -> list[Scene]:
    config = ShapesConfig(**{"side": 96, **changes})
    return [generate(config, "train", i) for i in range(count)]


def test_the_images_are_the_published_ones() -> None:
    assert digest([generate(DEFAULT, "train", i) for i in range(3)]) == GOLDEN


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    one = generate(DEFAULT, "train", 7)
    fewer = generate(ShapesConfig(train_images=8, val_images=1), "train", 7)
    assert digest([one]) == digest([fewer])
    others = [generate(DEFAULT, "val", 7), generate(DEFAULT, "train", 8), generate(ShapesConfig(seed=1), "train", 7)]
    assert len({digest([s]) for s in [one, *others]}) == 4


def test_the_fingerprint_needs_no_torch_and_no_image() -> None:
    code = (
        "import sys; from mpformer.config.schema import ShapesConfig;"
        "from mpformer.data.sets.shapes import fingerprint;"
        "print(fingerprint(ShapesConfig())); assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == fingerprint(DEFAULT)
    assert len({fingerprint(DEFAULT), fingerprint(ShapesConfig(side=64)), fingerprint(ShapesConfig(seed=1))}) == 3


def test_later_parameters_leave_the_fingerprint_of_earlier_datasets() -> None:
    assert fingerprint(DEFAULT) == "0477aa5eaf71f70df0409ef9a44c7b91c02fe779d2329c43d74120d556b028e7"
    assert fingerprint(ShapesConfig(tiny=0.5)) != fingerprint(DEFAULT)
    assert fingerprint(ShapesConfig(solids=("ring", "disc"))) != fingerprint(DEFAULT)


def test_labels_fit_the_pixels() -> None:
    for scene in scenes(20):
        assert scene.image.dtype == np.uint8
        assert scene.image.shape == (96, 96, 3)
        assert {s.id for s in scene.segments} == set(np.unique(scene.ids)) - {0}
        areas = np.bincount(scene.ids.ravel())
        for segment in scene.segments:
            assert segment.thing == (segment.category < len(SHAPES_THINGS))
            assert areas[segment.id] >= MIN_VISIBLE_PIXELS
        for _, mask in scene.hidden:
            assert mask.any()
            assert not scene.ids[mask].any()
        classes = semantic_map(scene)
        assert ((classes == 255) == (scene.ids == 0)).all()
        stuff = [s.category for s in scene.segments if not s.thing]
        assert 1 <= len(stuff) <= 4
        assert len(set(stuff)) == len(stuff)


def test_every_class_occurs() -> None:
    found = {s.category for scene in scenes(60) for s in scene.segments}
    assert found == set(range(12))


def test_colour_carries_no_class() -> None:
    """Over many images the mean colour of each shape is about the same."""
    means: dict[int, list[np.ndarray]] = {k: [] for k in range(len(SHAPES_THINGS))}
    for scene in scenes(150, camouflage=0.0):
        for segment in scene.segments:
            if segment.thing:
                means[segment.category].append(scene.image[scene.ids == segment.id].mean(0))
    averages = np.array([np.mean(values, axis=0) for values in means.values()])
    assert np.ptp(averages, axis=0).max() < 45


@pytest.mark.parametrize(
    "name", ["crowding", "large", "tiny", "thin", "split", "camouflage", "clutter", "noise", "blur"]
)
def test_each_stress_can_be_switched_off(name: str) -> None:
    calm, default = scenes(12, **{name: 0.0}), scenes(12)
    assert digest(calm) != digest(default)
    assert all(s.segments for s in calm)


def test_stresses_do_what_they_say() -> None:
    def things(found: list[Scene]) -> list[int]:
        return [s.category for scene in found for s in scene.segments if s.thing]

    bar, worm = SHAPES_THINGS.index("bar"), SHAPES_THINGS.index("worm")
    two = {SHAPES_THINGS.index("ring"), SHAPES_THINGS.index("disc")}
    assert set(things(scenes(30, thin=0.0, split=0.0, solids=("ring", "disc")))) == two
    assert len(things(scenes(30, crowding=1.0))) > 2 * len(things(scenes(30, crowding=0.0)))
    calm = things(scenes(30, thin=0.0, split=0.0))
    assert bar not in calm
    assert worm not in calm
    assert set(things(scenes(30, thin=1.0, large=0.0))) == {bar, worm}
    assert bar in things(scenes(30, thin=0.0, split=1.0, crowding=0.0, large=1.0))
    smooth = [np.abs(np.diff(s.image.astype(int), axis=1)).mean() for s in scenes(10, noise=0.0)]
    rough = [np.abs(np.diff(s.image.astype(int), axis=1)).mean() for s in scenes(10, noise=1.0)]
    assert np.mean(smooth) < np.mean(rough)


def test_without_tiny_objects_whole_discs_have_a_tenth_of_the_side_as_radius() -> None:
    def areas(tiny: float) -> list[int]:
        calm = {"crowding": 0.0, "large": 0.0, "thin": 0.0, "split": 0.0, "clutter": 0.0}
        found = scenes(60, tiny=tiny, solids=("disc", "star"), **calm)
        return [int((scene.ids == s.id).sum()) for scene in found for s in scene.segments if s.category == 0]

    smallest = np.pi * 9.6**2
    assert np.mean([area < 0.9 * smallest for area in areas(0.0)]) < 0.25, "what is left are objects in part hidden"
    assert np.mean([area < 0.9 * smallest for area in areas(1.0)]) > 0.4


def test_a_splitting_bar_disconnects_masks() -> None:
    from scipy import ndimage

    parts = [
        ndimage.label(scene.ids == s.id)[1]
        for scene in scenes(30, split=1.0, crowding=0.0, large=1.0, thin=0.0, clutter=0.0)
        for s in scene.segments
        if s.thing
    ]
    assert np.mean([p > 1 for p in parts]) > 0.15


def test_the_share_of_empty_masks_is_the_documented_magnitude() -> None:
    """At 128 px attention at stride 32 loses most objects, at 8 few: why the mini model attends at (16, 8, 4)."""
    shares = {}
    masks = [
        scene.ids == np.array([s.id for s in scene.segments])[:, None, None]
        for scene in (generate(DEFAULT, "val", i) for i in range(60))
    ]
    for stride in (8, 16, 32):
        shares[stride] = np.mean(np.concatenate([empty_at_stride(m, stride) for m in masks]))
    assert 0.02 < shares[8] < 0.09
    assert 0.22 < shares[16] < 0.40
    assert 0.52 < shares[32] < 0.75


def test_empty_means_what_the_manifest_says() -> None:
    masks = np.zeros((3, 10, 10), dtype=bool)
    masks[0, :4, :2] = True  # half of one cell of stride 4
    masks[1, :4, :2] = True
    masks[1, 0, 0] = False  # a pixel less
    masks[2, 8:, 8:] = True  # a quarter of a cell that hangs over the border
    assert empty_at_stride(masks, 4).tolist() == [False, True, True]
    assert empty_at_stride(masks, 4, "bilinear").tolist() == [False, False, True]
