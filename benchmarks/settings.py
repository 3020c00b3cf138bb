"""What is measured: model sizes, image sizes, and one fixed batch for each."""

from dataclasses import dataclass
from typing import Any

import torch

from experiments.suites.scales import base
from mpformer.config.presets import PRESETS
from mpformer.config.schema import Config, DatasetConfig, Toggles
from tests.support.paired_models import make_batch


@dataclass(frozen=True)
class Setting:
    """One model at one image size."""

    name: str
    config: Config
    side: int
    batch: int
    classes: int
    objects: int = 6

    def with_toggles(self, toggles: Toggles) -> Config:
        return self.config.replace({"toggles": toggles.model_dump()})

    def make_batch(self) -> list[dict[str, Any]]:
        """The batch; always the same."""
        sizes = [(self.side, self.side)] * self.batch
        return make_batch(sizes, [self.objects] * self.batch, self.classes, seed=0)


MASK2FORMER: Toggles = PRESETS["mask2former"]
PILOTED: Toggles = PRESETS["mp-former/paper"]
"""One group, every layer guided, point and flip noise 0.2, query position as in Mask2Former."""


def standard(side: int) -> Setting:
    """The R50 model of the papers: hidden 256, 9 layers, 100 queries, 12,544 points, batch 2."""
    config = Config(dataset=DatasetConfig(name="coco", task="instance"))
    return Setting(f"R50 {side}²", config, side, 2, 80)


def mini() -> Setting:
    """The model of the mini scale at its batch size."""
    config = base("mini")
    assert config.dataset.shapes is not None
    return Setting("mini", config, config.dataset.shapes.side, config.schedule.batch_size, 8)


def settings() -> dict[str, Setting]:
    return {s.name: s for s in (standard(256), standard(512), mini())}


def settle(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make random weights numerically tame: residual branches of the frozen backbone add little each.

    Without trained normalisation statistics every residual block would double the variance.
    """
    return {
        k: v * 0.2 if k.startswith("backbone.res") and k.endswith("conv3.norm.weight") else v for k, v in state.items()
    }
