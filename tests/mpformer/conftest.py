"""Small prepared datasets that several test files share."""

from pathlib import Path

import pytest

from mpformer.config.schema import Config, ShapesConfig, validate

SMALL = {"side": 64, "train_images": 12, "val_images": 6}


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 12 + 6 drawn images of 64 px."""
    from mpformer.data.sets.shapes_set import prepare_shapes

    root = tmp_path_factory.mktemp("datasets")
    prepare_shapes(ShapesConfig(**SMALL), root, workers=1)
    return root


@pytest.fixture(scope="session")
def shapes_config() -> Config:
    """The configuration that goes with `shapes_root`: panoptic, all three scores."""
    return validate(
        {
            "dataset": {"name": "shapes", "task": "panoptic", "shapes": SMALL},
            "schedule": {"batch_size": 4, "max_iter": 4},
            "evaluation": {"instance": True, "panoptic": True, "semantic": True, "size_areas": (64, 400)},
        }
    )
