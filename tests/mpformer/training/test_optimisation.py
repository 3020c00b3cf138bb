"""Parameter groups, schedules and clipping equal Mask2Former's; accumulation shares add up."""

import math

import pytest
import torch
from torch import nn

from mpformer.config.schema import Config, DatasetConfig, ModelConfig, ScheduleConfig
from mpformer.training import accumulation, optimisation


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(2)
        self.query = nn.Embedding(3, 2)
        self.shared = self.query
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_follow_multiplier_and_exclusions() -> None:
    model = Tiny()
    schedule = ScheduleConfig(base_lr=1e-3, weight_decay=0.05, backbone_multiplier=0.1)
    setting = {
        parameter: (round(group["lr"], 8), group["weight_decay"])
        for group in optimisation.optimizer(model, schedule).param_groups
        for parameter in group["params"]
    }
    assert len(setting) == 10  # each trainable parameter once; nothing frozen
    assert setting[model.backbone[0].weight] == (1e-4, 0.05)
    assert setting[model.backbone[0].bias] == (1e-4, 0.05)
    assert setting[model.backbone[1].weight] == (1e-4, 0.0)
    assert setting[model.backbone.relative_position_bias_table] == (1e-4, 0.0)
    assert setting[model.head.weight] == (1e-3, 0.05)
    assert setting[model.norm.bias] == (1e-3, 0.0)
    assert setting[model.query.weight] == (1e-3, 0.0)


def rates(schedule: ScheduleConfig) -> list[float]:
    """Learning rate used in each iteration."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.base_lr)
    scheduler = optimisation.scheduler(optimiser, schedule)
    used = []
    for _ in range(schedule.max_iter):
        used.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return used


def test_step_schedule_with_warmup() -> None:
    used = rates(ScheduleConfig(max_iter=20, base_lr=1.0, steps=(10, 15), warmup_iters=4, warmup_factor=0.5))
    expected = [0.5, 0.625, 0.75, 0.875] + [1.0] * 6 + [0.1] * 5 + [0.01] * 5
    assert used == pytest.approx(expected)


def test_step_schedule_ignores_steps_past_the_end() -> None:
    assert rates(ScheduleConfig(max_iter=4, base_lr=1.0, steps=(2, 90))) == pytest.approx([1, 1, 0.1, 0.1])


def test_poly_schedule_with_warmup_and_constant_ending() -> None:
    used = rates(
        ScheduleConfig(
            max_iter=10, base_lr=2.0, lr_schedule="poly", warmup_iters=2, warmup_factor=0.1, poly_constant_ending=0.3
        )
    )
    expected = []
    for t in range(10):
        decay = (1 - t / 10) ** 0.9
        warm = 0.1 * (1 - t / 2) + t / 2 if t < 2 else 1.0
        expected.append(2.0 * (0.3 if warm == 1.0 and decay < 0.3 else warm * decay))
    assert used == pytest.approx(expected)
    assert used[-1] == pytest.approx(0.6)


def test_clip_scales_the_whole_gradient() -> None:
    model = Tiny()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = math.sqrt(sum(p.numel() for p in trained))
    for limit, after in ((0.01, 0.01), (0.0, before), (2 * before, before)):  # 0: measures, leaves
        optimiser = optimisation.optimizer(model, ScheduleConfig())
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        assert float(optimisation.clip(optimiser, limit)) == pytest.approx(before)
        optimiser.step()
        moments = torch.cat([state["exp_avg"].flatten() for state in optimiser.state.values()])
        assert float(moments.norm()) == pytest.approx(0.1 * after, rel=1e-3)


def config(queries: int) -> Config:
    return Config(
        dataset=DatasetConfig(name="nuclei", task="instance"), model=ModelConfig(queries=queries, no_object_weight=0.1)
    )


def items(*counts: int) -> list[dict]:
    return [{"instances": range(n)} for n in counts]


def test_split_covers_the_batch_in_order() -> None:
    batch = items(*range(7))
    parts = accumulation.split(batch, 3)
    assert [len(p) for p in parts] == [3, 3, 1]
    assert [item for part in parts for item in part] == batch


def test_shares_are_the_ratio_of_normalisers() -> None:
    found = accumulation.shares([items(3, 1), items(0, 0), items(6, 0)], config(queries=5))
    assert [s.objects for s in found] == pytest.approx([0.4, 0.1, 0.6])  # an empty one's losses are 0 anyway
    weights = [4 + 0.1 * 6, 0.1 * 10, 5 + 0.1 * 5]  # five queries: the sixth object finds none
    assert [s.matched_class for s in found] == pytest.approx([w / sum(weights) for w in weights])
    assert found[0].of("loss_mask_3") == found[0].of("loss_dice_pilot") == pytest.approx(0.4)
    assert found[0].of("loss_ce_pilot_2") == pytest.approx(0.4)
    assert found[0].of("loss_ce_0") == found[0].matched_class


def test_micro_batches_in_which_nothing_weighs_anything_have_finite_shares() -> None:
    """Issue 12, 5.14."""
    weightless = config(queries=5).replace({"model.no_object_weight": 0.0})
    assert [s.matched_class for s in accumulation.shares([items(0), items(0)], weightless)] == [0.0, 0.0]
    assert [s.matched_class for s in accumulation.shares([items(2), items(0)], weightless)] == [1.0, 0.0]


def test_one_micro_batch_is_left_alone() -> None:
    assert accumulation.shares([items(3)], config(queries=5)) == [accumulation.Shares()]


def test_losses_are_summed_over_layers() -> None:
    losses = dict.fromkeys(("loss_ce", "loss_ce_0", "loss_mask_8", "loss_ce_pilot", "loss_ce_pilot_3"), 1.0)
    assert accumulation.summed(losses) == {"loss_ce": 2, "loss_mask": 1, "loss_ce_pilot": 2}
