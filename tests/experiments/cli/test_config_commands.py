"""``mpformer config``: what a key means and changes, and what presets differ in."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.cli.main import cli
from mpformer.config.schema import valid_keys
from mpformer.runtime.errors import UserError


def called(*words: str) -> str:
    done = CliRunner().invoke(cli, ["config", *words])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_every_key_with_type_default_meaning_and_id() -> None:
    """Issue 12, 3."""
    lines = called().splitlines()
    assert [line.split(" = ")[0] for line in lines[::2]] == valid_keys()
    at = lines.index("toggles.point_noise = 0.0   (number >= 0; changes the run id where mp_queries is on)")
    assert lines[at + 1].startswith("    r; a cell flips with probability")
    assert "evaluation.val_images = null   (integer >= 1 | null; changes the evaluation id)" in lines
    assert "runtime.threads = 1   (integer >= 1; outside the ids)" in lines
    assert "dataset.name = (has to be set)   (text; changes the run id)" in lines


def test_a_part_of_the_keys_and_json() -> None:
    assert all(line.startswith(("schedule.", "seed ", "    ")) for line in called("schedule", "seed").splitlines())
    (seed,) = json.loads(called("seed", "--json"))
    assert (seed["name"], seed["default"], seed["id"]) == ("seed", 0, "run")
    with pytest.raises(UserError, match="unknown section 'scedule'; valid: dataset, model, toggles, schedule"):
        called("scedule")


def test_a_base_gives_values(tmp_path: Path) -> None:
    assert "schedule.max_iter = 88500 " in called("--base", "coco/instance/r50-12ep")
    assert 'toggles.pilot_padding = "reference" ' in called("--base", "mp-former/release")
    assert "evaluation.object_mask_threshold = 0.2 " in called("evaluation", "--base", "shapes")


def test_what_two_presets_differ_in() -> None:
    """Issue 12, 5.13: what the release trains with, beside the paper."""
    assert called("--diff", "mp-former/paper", "mp-former/release").splitlines() == [
        "toggles.point_noise: 0.2 -> 0.0",
        "toggles.query_position: true -> false",
        'toggles.pilot_padding: "masked" -> "reference"',
        'schedule.class_mean: "global" -> "per-rank"',
    ]
    assert called("--diff", "mask2former", "mask2former") == "no difference\n"
    found = json.loads(called("--diff", "coco/instance/r50-12ep", "coco/instance/r50-24ep", "--json"))
    assert found["schedule.max_iter"] == [88500, 177000]


@pytest.mark.parametrize(("name", "listed"), [("mp", "mp-former/release, shapes"), ("coco/instance/r50", "r50-12ep")])
def test_an_unknown_name_lists_those_there_are(name: str, listed: str) -> None:
    with pytest.raises(UserError, match=listed):
        called("--diff", name, "mask2former")
