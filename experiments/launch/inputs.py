"""What runs read, made or fetched where the launch is: jobs may run where there is no internet."""

from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.store.identity import canonical
from experiments.suites import datasets, planning
from experiments.suites.planning import Plan
from mpformer.config.schema import Config, TimmConfig
from mpformer.modeling import weights_outline


def prepare_data(plan: Plan, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Prepare what can be prepared without the user's help (drawn images), and return the plan with it in place."""
    if not plan.data.preparable:
        return plan
    from mpformer.data.prepare import prepare

    prepare(plan.base.dataset, plan.data_root, progress=progress)
    return planning.make(plan.request, plan.data_root)


def fetch_weights(plan: Plan) -> Plan:
    """Download initial weights that have an address and are not there, and return the plan with them in place.

    Raises UserError if an address does not answer.
    """
    names = [run.config.model.init_weights for run in plan.runs]
    return planning.make(plan.request, plan.data_root) if datasets.fetch_weights(names, plan.data_root) else plan


def check_models(configs: Iterable[Config]) -> None:
    """Raise UserError for a backbone that cannot be built and for initial weights that are another model's.

    Each model once. Weights are read as far as that needs no torch; of the backbones only timm's can fail.
    """
    for config in {canonical(_model_of(config)): config for config in configs}.values():
        if config.model.init_weights:
            weights_outline.check(config, Path(config.model.init_weights))
        if isinstance(config.model.backbone, TimmConfig):
            from mpformer.modeling.backbones import check_backbone

            check_backbone(config.model)


def _model_of(config: Config) -> dict[str, object]:
    return {"model": config.model.model_dump(), "of": [config.dataset.name, config.dataset.task]}
