"""Named settings of the toggles; no torch here. Every report names which preset a row comes from."""

from types import MappingProxyType
from typing import Any

from mpformer.config.schema import Toggles
from mpformer.runtime.errors import choices

PRESETS: MappingProxyType[str, Toggles] = MappingProxyType(
    {
        # Cheng et al., CVPR 2022: no piloted part, learnable query positions
        "mask2former": Toggles(mp_queries=False, query_position=True),
        # the fair baseline of MP-Former's release, which lost the query positions
        "mask2former/no-position": Toggles(mp_queries=False, query_position=False),
        # Zhang et al., CVPR 2023, section 3, as far as the text says it
        "mp-former/paper": Toggles(
            mp_queries=True,
            guided_layers="every",
            point_noise=0.2,
            flip_noise=0.2,
            mp_groups=1,
            query_position=True,
        ),
        # the published run script, as its code trains: no mask noise, label noise 0.2, no query positions; padding
        # slots are seen by the piloted queries of their group and counted by the class loss
        "mp-former/release": Toggles(
            mp_queries=True,
            guided_layers="every",
            point_noise=0.0,
            flip_noise=0.2,
            mp_groups=1,
            query_position=False,
            pilot_padding="reference",
        ),
    }
)
"""Preset name -> toggles. A comparison between two rows holds ``query_position`` and the schedule equal."""

BESIDES: MappingProxyType[str, MappingProxyType[str, Any]] = MappingProxyType(
    {"mp-former/release": MappingProxyType({"schedule.class_mean": "per-rank"})}
)
"""Preset name -> what it sets that is no toggle: the release averages the class loss in each process by itself."""


def changes(name: str) -> dict[str, Any]:
    """Return the configuration keys that a preset sets; raises UserError that lists the presets."""
    if name not in PRESETS:
        raise choices("preset", name, PRESETS)
    toggles = PRESETS[name].model_dump(exclude_unset=True)
    return {**{f"toggles.{toggle}": value for toggle, value in toggles.items()}, **BESIDES.get(name, {})}
