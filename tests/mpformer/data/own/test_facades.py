"""Real photographs of building fronts come in through `data add` alone, with what is reckoned from them."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpformer.config import datasets
from mpformer.data.check import check
from mpformer.data.own.adding import Asked, add

ROOT = Path(__file__).parents[4]
ARCHIVE = ROOT.parent / "shared" / "data" / "facades_320.tar.xz"
STUFF = ("facade", "street", "vegetation", "fence", "non-building-infrastructure")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    datasets.DATASETS.pop("facades", None)


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE.name} is not beside the repository, in shared/data")
def test_from_the_archive_to_tiles(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    train, val = (tmp_path / "facades" / split for split in ("train", "val"))
    name = "_annotations.coco.json"
    asked = Asked("facades", train / name, val / name, train, val, stuff=STUFF, panoptic="largest-first")
    made = add(asked, tmp_path / "root")
    assert (made.registration.images, made.tiles) == ({"train": 376, "val": 144}, {"train": 1504, "val": 576})
    settings = made.registration.settings
    assert (settings.crop, settings.resize, settings.queries, settings.train_points) == (128, 256, 40, 1024)
    assert len(made.registration.things) == len(made.registration.stuff) == 5
    assert [finding.wrong for finding in made.findings] == [False]
    assert "2229 in 142152d9d6cb.jpg" in made.findings[0].text, "an outline without area"
    assert all(report.ok for report in check("facades", tmp_path / "root", full=True))


def test_nothing_in_the_code_knows_the_set() -> None:
    for folder in ("mpformer", "experiments", "analysis", "reports"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix != ".pyc" and path.is_file():
                assert b"facades" not in path.read_bytes().lower(), path
