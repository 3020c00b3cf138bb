"""``mpformer logs -f`` shows training (issue 12, 5.4)."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner

from experiments.cli.main import cli
from experiments.execution.training_log import line_of
from experiments.launch import local
from experiments.launch.machine import Width
from experiments.store.launches import LaunchDir
from experiments.store.run_dir import Store
from experiments.suites.planning import Plan

TRAIN = {
    "kind": "train", "iteration": 120, "loss": 23.4567, "loss_ce": 3.21, "loss_mask_pilot": 0.456,
    "seconds": 0.1234, "lr": 0.001, "time": 1.0,
}  # fmt: skip


def test_a_line_of_training_has_iteration_losses_and_time_to_go() -> None:
    assert line_of(TRAIN, 1400, 155.0) == (
        "iteration 120/1400  loss 23.46 (ce 3.21, mask_pilot 0.456)  lr 0.001  0.123 s/it  ETA 2m35s"
    )
    assert "ETA" not in line_of(TRAIN, 1400, None)


def test_a_probe_and_the_end_have_their_scores() -> None:
    metrics = {"AP": 4.21, "mIoU-L": 61.0, "Util": None}
    probe = {"kind": "evaluation", "iteration": 350, "metrics": metrics}
    assert line_of(probe, 1400, 1.0) == "iteration 350/1400  probe on a few images: AP 4.2, mIoU-L 61.0"
    assert "scores of all images: AP 4.2" in line_of({**probe, "final": True}, 1400, None)


def test_what_follows_the_log_sees_training(plan: Plan, store: Store, counter: Callable[..., Any]) -> None:
    """A run of a worker process, followed while it trains."""
    launched = local.launch(plan, store, width=Width(1, 1), runner=counter(seconds=0.02))
    run_id = plan.unique[0].run_id
    while not store.run(run_id).attempts():
        time.sleep(0.02)
    shown = CliRunner().invoke(cli, ["logs", run_id, "-f", "--root", str(store.root)]).output
    found = [int(at) for at in re.findall(r"iteration (\d+)/12  loss ", shown)]
    assert found == list(range(1, 13))
    assert "ETA 1s" in shown
    assert "iteration 12/12  scores of all images: AP 12.5" in shown
    lines = (store.run(run_id).path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [*range(1, 13), 12], "the log changes no number"
    while launched.working():
        time.sleep(0.02)
    LaunchDir(launched.directory).close()
