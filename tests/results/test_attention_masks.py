"""The first hypothesis: numbers of three decoder passes, and their table."""

from pathlib import Path

import attention_masks
import pytest
import torch

from experiments.launch import begin
from experiments.store import records
from experiments.store.run_dir import Store, Trained
from mpformer.evaluation.gradient_accuracy import Under
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError
from tests.support import counting_jobs


def test_cosines_and_losses_are_means_over_layers_and_queries_without_the_first_layer() -> None:
    losses = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]])
    gradients = torch.zeros(3, 2, 2)
    gradients[..., 0] = 1
    turned = gradients.flip(-1)
    turned[1] = gradients[1]
    found = attention_masks.numbers(
        {
            "predicted masks": Under(gradients, losses),
            "true masks": Under(turned, losses / 2),
            "no masks": Under(-gradients, losses * 2),
        }
    )
    assert found == {
        "cosine, predicted masks and true masks": pytest.approx(50),
        "cosine, predicted masks and no masks": pytest.approx(-100),
        "cosine, true masks and no masks": pytest.approx(-50),
        "loss, predicted masks": pytest.approx(2.5),
        "loss, true masks": pytest.approx(1.25),
        "loss, no masks": pytest.approx(5),
        "loss, predicted masks less true masks": pytest.approx(1.25),
        "loss, no masks less true masks": pytest.approx(3.75),
    }


def test_the_table_pairs_seeds() -> None:
    rows = {"mask2former": {"0": 1.0, "1": 2.0, "2": 3.5}, "mp-former": {"2": 3.0, "1": 1.0, "0": 0.5}}
    found = {row: {seed: {"loss, no masks": x} for seed, x in of.items()} for row, of in rows.items()}
    line = attention_masks.table({"shapes": found}).splitlines()[2]
    assert line.startswith(
        "| shapes | loss, no masks | 2.17 ± 1.26 (n = 3) | 1.50 ± 1.32 (n = 3) | −0.67 (−1.38 … +0.05)"
    )
    assert line.endswith("| 3 |")


def test_a_store_without_runs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run of study-headline on nuclei is in .*; make study trains them"):
        attention_masks.main(["--root", str(tmp_path), "--data-root", str(tmp_path), "--dataset", "nuclei"])


def test_pairs_are_those_of_which_both_have_weights_here(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    plan = counting_jobs.plan(counting_jobs.data_root(tmp_path), (0, 1, 2))
    begin.record(plan, store, "")
    for run in plan.unique:
        directory = store.run(run.run_id)
        weights = directory.path / "checkpoints" / "final.pth"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
        records.save(directory.trained_file, Trained(sha256(weights), "checkpoints/final.pth", 12, 1.0))
        if run.seed == 2 and run.row.name == "mp-former":  # archived light, as on another machine
            weights.unlink()
        elif run.seed == 1:
            directory.pack()
    (record,) = store.suite_records()
    found = attention_masks.pairs(record, store)
    assert list(found) == [0, 1]
    assert all(rows.keys() == {"mask2former", "mp-former"} for rows in found.values())
