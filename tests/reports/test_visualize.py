"""``mpformer visualize``: which runs and images its page shows, what is computed for it, and what it says otherwise."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.runs import visualizing
from experiments.store.files import write_json
from experiments.store.run_dir import RunDir
from mpformer.runtime.errors import UserError

BASE, OTHER = "shapes-panoptic-m2f-s0", "shapes-panoptic-mp-every-n0.2-f0.2-s0"
Visualize = Callable[..., tuple[int, str, str]]


@pytest.fixture
def visualize(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Visualize:
    """Run the command on the fixture store: (exit code, stdout, stderr)."""

    def execute(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpformer", "visualize", *arguments, "--root", str(store)])
        with pytest.raises(SystemExit) as end:
            main.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return execute


def index(printed: str) -> dict[str, Any]:
    page = Path(printed.strip()).read_text()
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def evaluation(store: Path, run: str) -> Path:
    return next(store.glob(f"runs/{run}-*/evals/*"))


def test_one_page_of_one_run_or_two(visualize: Visualize, store: Path, tmp_path: Path) -> None:
    code, printed, _ = visualize(BASE)
    assert code == 0
    assert index(printed)["runs"] == ["mask2former, seed 0"]
    assert Path(printed.strip()).parent == store / "reports" / "explorer"
    _, printed, _ = visualize(BASE, OTHER, "--worst", "3", "--out", str(tmp_path / "page.html"))
    found = index(printed)
    assert found["runs"] == ["mask2former, seed 0", "mp-former, seed 0"]
    assert len(found["entries"]) == 3
    assert printed.strip() == str(tmp_path / "page.html")
    _, printed, _ = visualize(BASE, "--images", "2,4", "--query", "3")
    assert {entry["query"][0] for entry in index(printed)["entries"]} == {3}
    assert {image["id"] for image in index(printed)["images"]} <= {2, 4}


def test_the_same_row_twice_is_told_apart(visualize: Visualize) -> None:
    _, printed, _ = visualize(BASE, BASE)
    assert all(re.fullmatch(r"mask2former, seed 0 \[\w+\]", name) for name in index(printed)["runs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown run 'nothing'; runs: "),
        ([BASE, "--everywhere"], "give --worst N too"),
        ([BASE, "--images", "a"], "image ids are numbers such as 3,17 (got 'a')"),
        ([BASE, "--query", "77"], "unknown query that is matched to an object 77; valid: 0, "),
        ([BASE, "nuclei-instance-m2f-s0"], "runs of different data have no object in common: "),
        (["shapes-panoptic-mp-every-n0-f0-s0"], "has no layer masks yet: it has not finished training"),
        ([BASE, "--images", "99"], "has no weights, or damaged ones: masks of further images cannot be computed"),
    ],
)
def test_mistakes_are_one_line(visualize: Visualize, arguments: list[str], message: str) -> None:
    code, _, error = visualize(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_further_images_are_computed_once_and_stay_out_of_the_kept(
    visualize: Visualize, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[int]]] = []

    def computed(evaluated: Sequence[visualizing.Evaluated], images: Sequence[int], data_root: Path) -> int:
        """Stands for the model: image 3's masks again, as image 50's."""
        for one in evaluated:
            missing = [i for i in images if i not in one.images()]
            asked.append((one.run.run_id, missing))
            folder = one.folder / visualizing.FURTHER
            for image in missing:
                record = json.loads((one.folder / "layer_masks" / "3.json").read_text())
                write_json(folder / f"{image}.json", {**record, "image_id": image, "image": None})
                write_json(folder / "index.json", {"images": [{"image_id": image, "record": f"{image}.json"}]})
        return len(asked)

    monkeypatch.setattr(visualizing, "complete", computed)
    for _ in range(2):
        _, printed, _ = visualize(BASE, "--images", "50,2")
        assert [image["id"] for image in index(printed)["images"]] == [50, 2]
    assert [missing for _, missing in asked] == [[50], []]
    _, printed, _ = visualize(BASE)
    assert 50 not in {image["id"] for image in index(printed)["images"]}


def test_worst_of_all_evaluated_images(store: Path) -> None:
    run = RunDir(next(store.glob(f"runs/{BASE}-*")))
    found = visualizing.worst_images([visualizing.newest_evaluation(run)], 2)
    assert 1 <= len(found) <= 2
    (evaluation(store, BASE) / "layers.parquet").unlink()
    with pytest.raises(UserError, match="without layer analysis: leave out --everywhere"):
        visualizing.worst_images([visualizing.newest_evaluation(run)], 2)


def test_the_evaluations_own_settings_count(store: Path) -> None:
    run = RunDir(next(store.glob(f"runs/{BASE}-*")))
    found = visualizing.newest_evaluation(run)
    setting = run.config().evaluation.model_dump(mode="json") | {"val_images": 7}
    write_json(found.folder / "setting.json", setting)
    assert found.config().evaluation.val_images == 7
