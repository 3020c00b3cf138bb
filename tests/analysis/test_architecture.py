"""The drawing of the architecture: highlighted is what the toggles switch on; who reads whom is the model's."""

from xml.etree import ElementTree

import pytest
import torch

from analysis.architecture import architecture, reads
from mpformer.config.presets import PRESETS
from mpformer.modeling.mask_piloting import self_attention_mask

NAMES = ("guided masks", "point noise", "piloted queries", "flip noise", "query position", "piloted loss:")


def states(toggles: dict) -> dict[str, str]:
    """Part → ``on`` or ``off``."""
    root = ElementTree.fromstring(architecture(toggles, 9))
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    texts = [
        (group.get("class", ""), {text.text for text in group.iter("{http://www.w3.org/2000/svg}text")})
        for group in groups
    ]
    return {name: next(state for state, found in texts if name in found) for name in NAMES}


def test_what_a_row_switches_on_is_highlighted() -> None:
    paper = PRESETS["mp-former/paper"].model_dump(mode="json")
    assert states(paper) == dict.fromkeys(NAMES, "on")
    assert states({**paper, "flip_noise": 0}) == {**dict.fromkeys(NAMES, "on"), "flip noise": "off"}
    assert states({**paper, "point_noise": 0.0})["point noise"] == "off"
    plain = states({**paper, "mp_queries": False})
    assert plain == {**dict.fromkeys(NAMES, "off"), "query position": "on"}
    assert states({**paper, "query_position": False})["query position"] == "off"
    assert "layers: first-4" in architecture({**paper, "guided_layers": "first-4"}, 9)
    assert "5 groups" in architecture({**paper, "mp_groups": 5}, 9)
    assert "budget-100" in architecture({**paper, "mp_groups": "budget-100"}, 9)
    assert "decoder, 6 layers" in architecture(paper, 6)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_who_reads_whom_is_what_the_model_does(groups: int) -> None:
    blocked = self_attention_mask(torch.ones(1, groups, dtype=torch.bool), groups, 1, True)[0]
    assert reads(groups) == (~blocked).tolist()


def test_text_is_text() -> None:
    hostile = architecture({"mp_queries": True, "guided_layers": "</text><script>"}, 9)
    assert "<script>" not in hostile
    ElementTree.fromstring(hostile)
