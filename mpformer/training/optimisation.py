"""AdamW as Mask2Former sets it up, and its two learning rate schedules.

Cheng et al. (CVPR 2022), section 4.1: weight decay 0.05, the backbone at a tenth of the learning rate, no
decay on normalisation and embedding parameters, the norm of the whole gradient clipped at 0.01.
"""

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler, ParamScheduler
from torch import nn

from mpformer.config.schema import ScheduleConfig

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.InstanceNorm2d)
_POSITIONS = (
    "relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token", "reg_token", "logit_scale",
)  # fmt: skip


def optimizer(model: nn.Module, schedule: ScheduleConfig) -> torch.optim.AdamW:
    """Return AdamW with one group per (learning rate, weight decay), in the order of the parameters.

    Its fused kernel is one pass over all of them, and leaves a step out where ``found_inf`` says so.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module, name, parameter in _trainable(model):
        rate = schedule.base_lr * (schedule.backbone_multiplier if _from_elsewhere(name) else 1.0)
        groups.setdefault((rate, _decay(module, name, schedule)), []).append(parameter)
    settings = [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
    return torch.optim.AdamW(settings, lr=schedule.base_lr, fused=True)


def scheduler(optimiser: torch.optim.Optimizer, schedule: ScheduleConfig) -> LRMultiplier:
    """Return the schedule as a torch scheduler; step it once an iteration."""
    return LRMultiplier(optimiser, _multiplier(schedule), schedule.max_iter)


def clip(optimiser: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Have the next step scale the whole gradient to a norm of at most `limit` (0: leave it); returns its norm now.

    The fused kernel divides the gradient by ``grad_scale``, meant for a loss scaler, in the pass that it makes anyway.
    """
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    divisor = ((norm + 1e-6) / limit).clamp(min=1) if limit > 0 else None
    optimiser.grad_scale = divisor  # type: ignore[attr-defined]
    return norm


class PolyWithWarmup(ParamScheduler):
    """``(1 - t / T) ** power`` times a linear warm-up; DeepLab's schedule, as Mask2Former uses it.

    A positive `constant_ending` replaces the decay once it falls below that value (after warm-up).
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        self._schedule = schedule

    def __call__(self, where: float) -> float:
        """Multiplier of the base learning rate at `where` = iteration / last iteration, in [0, 1]."""
        s = self._schedule
        warm = self._warmup(where * s.max_iter)
        decay = max(0.0, 1.0 - where) ** s.poly_power
        if warm == 1.0 and s.poly_constant_ending > 0 and decay < s.poly_constant_ending:
            return s.poly_constant_ending
        return warm * decay

    def _warmup(self, iteration: float) -> float:
        s = self._schedule
        if iteration >= s.warmup_iters:
            return 1.0
        done = iteration / s.warmup_iters
        return s.warmup_factor * (1 - done) + done


def _multiplier(schedule: ScheduleConfig) -> ParamScheduler:
    if schedule.lr_schedule == "poly":
        return PolyWithWarmup(schedule)
    steps = [step for step in schedule.steps if step <= schedule.max_iter]
    values = [schedule.gamma**k for k in range(len(steps) + 1)]
    step = MultiStepParamScheduler(values, milestones=steps, num_updates=schedule.max_iter)
    if not schedule.warmup_iters:
        return step
    length = min(schedule.warmup_iters / schedule.max_iter, 1.0)
    return WarmupParamScheduler(step, schedule.warmup_factor, length, "linear")


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each trainable parameter once, with the module that owns it and its full name."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{prefix}.{name}" if prefix else name, parameter


def _from_elsewhere(name: str) -> bool:
    """Whether files of a backbone's weights have the parameter: not those of a feature pyramid above a transformer."""
    return name.startswith("backbone.") and ".simfp_" not in name


def _decay(module: nn.Module, name: str, schedule: ScheduleConfig) -> float:
    if name.rsplit(".", 1)[-1] in _POSITIONS or ".cpb_mlp." in name:
        return 0.0
    if isinstance(module, nn.Embedding):
        return schedule.weight_decay_embed
    norm = isinstance(module, _NORMS) or "Norm" in type(module).__name__  # timm has normalisations of its own
    return schedule.weight_decay_norm if norm else schedule.weight_decay


def rates(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Largest learning rate of all groups (that of the head), for the log."""
    return {"lr": max(group["lr"] for group in optimiser.param_groups)}
