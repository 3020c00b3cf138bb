"""Run ids and evaluation ids: what can change trained weights, hashed; everything else left out.

A run id is a readable part and 12 hex digits of the sha256 of the canonical JSON of the full, resolved configuration —
never a difference to defaults. Evaluation settings have an id of their own. Left out of both: resources, paths,
worker counts, the executor (:class:`mpformer.config.schema.RuntimeConfig`) and the path of the initial weights, whose
checksum is in.

A field that is added later declares ``json_schema_extra={"legacy": value}`` and enters the hash only when it differs
from that value: a new toggle orphans no old run.
"""

import hashlib
import json
from typing import Any, Literal

from mpformer.config.schema import WITHOUT_PILOTING, Config, ModelConfig, Toggles, plain
from mpformer.runtime.errors import UserError

SCHEME = 1
"""Version of the rules in this file; part of every id."""


def run_id(config: Config) -> str:
    """Return the name of the run that ``config`` trains, such as ``shapes-panoptic-mp-every-n0.2-s0-0123456789ab``."""
    return f"{_readable(config)}-{_digest(run_identity(config))}"


def eval_id(config: Config) -> str:
    """Return the name of the evaluation setting of ``config``, such as ``instance-panoptic-0123456789ab``."""
    kinds = [name for name in ("instance", "panoptic", "semantic") if getattr(config.evaluation, name)]
    return f"{'-'.join(kinds) or 'none'}-{_digest({'scheme': SCHEME, 'evaluation': plain(config.evaluation)})}"


def run_identity(config: Config) -> dict[str, Any]:
    """Return everything about ``config`` that can change the trained weights, as plain data."""
    return {
        "scheme": SCHEME,
        "dataset": plain(config.dataset),
        "model": _model(config.model),
        "toggles": _toggles(config.toggles, config.model.decoder_layers),
        "schedule": plain(config.schedule),
        "seed": config.seed,
        "extra_cfg": dict(config.extra_cfg),
    }


def part_of(key: str) -> Literal["run", "piloted run", "evaluation", ""]:
    """Return which id a configuration key is part of: of every run's, of those with ``toggles.mp_queries``, of none."""
    section, _, name = key.partition(".")
    if section == "runtime" or key == "model.init_weights":
        return ""
    if section == "toggles" and name not in WITHOUT_PILOTING:
        return "piloted run"
    return "evaluation" if section == "evaluation" else "run"


def canonical(tree: Any) -> str:
    """Return the one JSON text of plain data: sorted keys, no spaces, no NaN; raises UserError for other types."""
    try:
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"a configuration value cannot be part of a run id: {error}; use plain JSON values") from None


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:12]


def _model(model: ModelConfig) -> dict[str, Any]:
    tree = plain(model)
    tree.pop("init_weights")
    return tree


def _toggles(toggles: Toggles, layers: int) -> dict[str, Any]:
    tree = plain(toggles)
    if not toggles.mp_queries:  # the other fields then change nothing
        return {name: value for name, value in tree.items() if name in WITHOUT_PILOTING}
    if "guided_layers" in tree:
        tree["guided_layers"] = _guided(toggles.guided_layers, layers)
    return tree


def _guided(value: str, layers: int) -> str:
    """``first-k`` with k of at least all layers is ``every``: one run, one id."""
    count = {"every": layers, "first": 1}.get(value) or int(value.removeprefix("first-"))
    return "every" if count >= layers else value


def _readable(config: Config) -> str:
    parts = [config.dataset.name, config.dataset.task, *_readable_toggles(config), f"s{config.seed}"]
    return "-".join(parts)


def _readable_toggles(config: Config) -> list[str]:
    toggles = config.toggles
    if not toggles.mp_queries:
        return ["m2f"]
    noise = "n" if toggles.mask_noise == "point" else f"{toggles.mask_noise}"
    guided = _guided(toggles.guided_layers, config.model.decoder_layers)
    return ["mp", guided, f"{noise}{toggles.point_noise:g}", f"f{toggles.flip_noise:g}"]
