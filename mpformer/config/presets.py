"""Named settings of the toggles; no torch here. Every report names which preset a row comes from."""

from types import MappingProxyType

from mpformer.config.schema import Toggles

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
        # the published run script: no mask noise, label noise 0.2, no query positions
        "mp-former/release": Toggles(
            mp_queries=True,
            guided_layers="every",
            point_noise=0.0,
            flip_noise=0.2,
            mp_groups=1,
            query_position=False,
        ),
    }
)
"""Preset name -> toggles. A comparison between two rows holds ``query_position`` and the schedule equal."""
