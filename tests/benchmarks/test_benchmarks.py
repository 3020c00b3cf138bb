"""The benchmark command works end to end on a tiny model; its memory counts are right."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import __main__ as command
from benchmarks import growth, run, settings
from benchmarks.measure import BACKBONE, DECODING, PIXELS, Clock, grouped, interleaved, memory, ratios
from benchmarks.plots import draw_all
from mpformer.config.schema import ResNetConfig
from tests.support.paired_models import CLASSES, tiny_config

MODEL = {
    "backbone": ResNetConfig(stem_channels=8, res2_channels=16, width_per_group=4),
    "decoder_layers": 3,
    "heads": 4,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> settings.Setting:
    setting = settings.Setting("tiny", tiny_config(settings.MASK2FORMER, **MODEL), 64, 2, CLASSES, objects=2)
    monkeypatch.setattr("benchmarks.settings.settings", lambda: {"tiny": setting})
    monkeypatch.setattr(growth, "AXES", {"queries": (4, 8), "pixels": (64, 96)})
    monkeypatch.setattr(growth, "standard", lambda side: settings.Setting("tiny", setting.config, side, 2, CLASSES, 2))
    return setting


def test_everything_is_measured_and_drawn(tiny: settings.Setting, tmp_path: Path) -> None:
    options = Namespace(
        threads=1, repeats=1, overhead_repeats=2, growth_repeats=1, only=None, setting=None, out=tmp_path
    )
    results: dict[str, Any] = {}
    assert len(list(command.measure(options, results))) == 7
    plain = results["training"]["tiny, Mask2Former"]
    assert set(plain["seconds"]) == {"direct", "product", "product, own points", "transformers"}
    assert plain["bytes kept by decoder, matching, losses"]["product"] > 0
    assert plain["agreement"]["direct"]["gradient"] < 1e-3
    assert results["evaluation"]["tiny"]["identical with and without piloting"]
    assert {p.name for p in draw_all(results, tmp_path)} == {"stages.svg", "memory.svg", "growth.svg"}
    assert any("| whole step |" in table for table in command.tables(results))


def test_memory_counts_what_a_stage_keeps() -> None:
    kept: list[torch.Tensor] = []

    def work(clock: Clock) -> None:
        with clock.stage("outer"):
            with clock.stage("a"):
                kept.append(torch.ones(1000))
                torch.ones(5000)
            with clock.stage("b"):
                kept.clear()

    found = memory(work)
    assert found["a"] == {"peak": 24_000, "kept": 4_000, "added": 4_000}
    assert found["b"]["added"] == -4_000
    assert found["outer"]["peak"] == 24_000


def test_runs_alternate_and_ratios_pair_neighbours() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> Callable[[Clock], None]:
        def run_once(clock: Clock) -> None:
            order.append(name)
            clock.wall["whole step"] = seconds

        return run_once

    clocks = interleaved({"slow": work("slow", 3.0), "fast": work("fast", 1.5)}, 2)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert ratios(clocks["slow"], clocks["fast"]) == {"whole step": (2.0, 2.0, 2.0)}


def test_groups_add_forward_and_backward() -> None:
    seconds = {"pixel decoder": 1.0, "backward: pixel decoder": 2.0}
    assert grouped(seconds)["pixel decoder, forward and backward"] == 3.0
    assert "backbone, forward and backward" not in grouped(seconds)


def test_floor_adds_up() -> None:
    counts = dict.fromkeys((*BACKBONE, *PIXELS, *DECODING), 1.0)
    found = run.floor({"GFLOP of the product": counts}, 1e9)
    assert found["whole step"] == pytest.approx(8.0)
