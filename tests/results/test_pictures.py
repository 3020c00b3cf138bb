"""The page's pictures: of sets whose images are not kept they show masks and outlines alone."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
from answers import Answer, Kept
from claims import AP, Comparison

from analysis import failure_cases
from analysis.statistics import PairedTest
from tests.reports.conftest import FIXTURES


@pytest.mark.parametrize("images", [True, False])
def test_no_photograph_is_drawn_unless_it_may_be(images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES, tmp_path / "store")
    report = Kept(tmp_path / "store").report("headline", "shapes")
    assert report is not None
    shown: list[Any] = []

    def seen(path: Path | None) -> Any:
        shown.append(failure_cases.pixels(path))
        return shown[-1]

    monkeypatch.setattr("analysis.film_strip.pixels", seen)
    assert pictures.jumps(report, images=images) is not None
    assert shown
    assert all((picture is not None) == images for picture in shown)


def test_toggles_stand_in_a_figure_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(claim: str, suite: str, row: str, n: int = 5) -> Answer:
        of = Comparison(suite, row, "mp-first", AP, 1.5)
        return Answer(claim, "shapes", of, 5, "seen", test=PairedTest(3.0, n, 1.5, 4.5, 0.01) if n else None)

    found = [
        *(answer("C3", "study-headline", "mp-former"), answer("C4", "study-convergence", "mp-former-half")),
        *(answer("C7", "study-components", "mp-every"), answer("C7", "study-groups", "2-groups", n=0)),
        answer("C3", "study-backbone", "mp-former"),
    ]
    kept, drawn = Kept(tmp_path), {}
    rows = [
        SimpleNamespace(name="mp-first", label="+ MP queries"),
        SimpleNamespace(name="mp-every", label="+ guidance"),
    ]
    components = SimpleNamespace(rows=rows)
    monkeypatch.setattr(kept, "report", lambda suite, _: components if suite == "study-components" else None)
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.update({path.name: figure}))
    pictures.draw(kept, found, tmp_path / "figures")
    names = {name: [label.get_text() for label in drawn[name].axes[0].get_yticklabels()] for name in drawn}
    assert names == {"effects.png": ["C3 AP", "C4 AP"], "toggles.png": ["+ guidance"]}
    middle, interval = drawn["toggles.png"].axes[0].lines[1::-1]
    assert list(middle.get_xdata()) == [2.0], "in multiples of the smallest effect that matters"
    assert list(interval.get_xdata()) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("row", "against", "said"),
    [
        ("paper", "plain", "MP-Former less Mask2Former"),
        ("first", "plain", "+ MP queries, guided in the first layer"),
        ("paper", "off", "MP-Former less one without positions"),
    ],
)
def test_a_toggle_is_called_by_its_rows_labels(row: str, against: str, said: str) -> None:
    labels = {"plain": "Mask2Former", "paper": "MP-Former, as the paper has it", "off": "MP-Former without positions"}
    labels["first"] = "+ MP queries, guided in the first layer"
    report = SimpleNamespace(rows=[SimpleNamespace(name=name, label=label) for name, label in labels.items()])
    of = Comparison("a suite", row, against, AP, 1.0)
    kept: Any = SimpleNamespace(report=lambda suite, _: report if suite == of.suite else None)
    assert pictures.toggle(kept, Answer("C7", "shapes", of, 5)) == said
