"""`mpformer compare`: two checkpoints by a paired bootstrap, from per_image.parquet alone."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from analysis import scores
from experiments.cli.run_commands import compare
from mpformer.runtime.errors import UserError


def per_image(path: Path, hits: list[bool], first_id: int = 0) -> None:
    """One object and one surely scored detection an image, and two classes of four cells."""
    n = len(hits)
    flags = [[hit] * 10 for hit in hits]
    table = pa.table({
        "image_id": range(first_id, first_id + n),
        "gt_category": [[0]] * n,
        "gt_ignore": [[False]] * n,
        "det_category": [[0]] * n,
        "det_score": [[0.9]] * n,
        "det_match": flags,
        "det_ignore": [[False] * 10] * n,
        "sem_category": [[0, 1]] * n,
        "sem_intersection": [[2, 2 * hit] for hit in hits],
        "sem_union": [[4, 4]] * n,
    })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs whose evaluations hold nothing but per_image.parquet."""
    from experiments.runs import visualizing
    from experiments.store.run_dir import RunDir, Store

    monkeypatch.setattr(Store, "find", lambda self, name: RunDir(self.root / "runs" / name))
    monkeypatch.setattr(visualizing, "newest_evaluation", lambda run: visualizing.Evaluated(run, run.path))
    monkeypatch.setattr(visualizing, "check_comparable", lambda found: None)
    monkeypatch.setattr(visualizing, "labels", lambda found: [one.run.run_id for one in found])
    per_image(tmp_path / "runs" / "a" / "per_image.parquet", [True] * 10 + [False] * 20)
    per_image(tmp_path / "runs" / "b" / "per_image.parquet", [True] * 25 + [False] * 5)
    per_image(tmp_path / "runs" / "other" / "per_image.parquet", [True] * 30, first_id=7)
    return tmp_path


def run(store: Path, *arguments: str):
    found = CliRunner().invoke(compare, [*arguments, "--root", str(store), "--resamples", "100"])
    if found.exception is not None:
        raise found.exception
    return found.output


def test_effect_interval_and_what_it_is_about(store: Path) -> None:
    told = run(store, "a", "b", "--metric", "mIoU")
    # b's second class: 25 of 60 more hits than a's 10, over a union of four an image, halved by the mean over classes
    assert "mIoU: b - a = +12.50, 95 % interval +" in told
    assert "30 images, 100 resamples: two checkpoints, not two methods" in told
    found = json.loads(run(store, "a", "b", "--json"))
    one, two = (scores.read(store / "runs" / name / "per_image.parquet").scores()["AP"] for name in "ab")
    assert found["effect"] == pytest.approx(two - one)
    assert found["low"] <= found["effect"] <= found["high"]
    assert json.loads(run(store, "a", "a", "--json"))["p"] == 1


def test_mistakes(store: Path) -> None:
    with pytest.raises(UserError, match="unknown metric 'PQ'; valid: AP, AP50, AP75, mIoU"):
        run(store, "a", "b", "--metric", "PQ")
    with pytest.raises(UserError, match="different images"):
        run(store, "a", "other")
    (store / "runs" / "b" / "per_image.parquet").unlink()
    with pytest.raises(UserError, match=r"has no per_image\.parquet"):
        run(store, "a", "b")
