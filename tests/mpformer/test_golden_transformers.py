"""transformers' Mask2Former with renamed weights gives the golden values: values and renaming are right."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))

import golden_io
from direct.model import DirectMPFormer
from golden_rules import GoldenCase, problems
from transformers_peer import build_peer, load_ours, renamed

CASE = GoldenCase.named("case7_mask2former")


def test_peer_gives_golden_outputs_and_seeded_losses() -> None:
    peer = build_peer(golden_io.model_config(CASE), CASE.meta["config"]["num_classes"])
    with torch.no_grad():
        load_ours(peer, golden_io.state(CASE))
        plain = DirectMPFormer(golden_io.model_config(CASE), golden_io.toggles(CASE), 5)
        images = golden_io.images(CASE)
        targets = plain.targets(images, golden_io.labels(CASE), golden_io.masks(CASE))
        torch.manual_seed(CASE.meta["criterion_seed"])
        out = peer(
            pixel_values=plain.batch(images),
            mask_labels=[t.masks.float() for t in targets],
            class_labels=[t.labels for t in targets],
        )
    auxiliary = out.auxiliary_logits
    found = {
        "out/pred_logits": torch.stack([a["class_queries_logits"] for a in auxiliary] + [out.class_queries_logits]),
        "out/pred_masks": torch.stack([a["masks_queries_logits"] for a in auxiliary] + [out.masks_queries_logits]),
    }
    wrong, _ = problems({k: v.numpy() for k, v in found.items()}, CASE, only="^out/pred")
    assert not wrong
    weights = CASE.meta["weights_of_losses"]
    seeded = {k.removeprefix("out/seeded_loss/"): float(v) for k, v in CASE.golden.items() if "seeded_loss" in k}
    total = sum(value * weights[name] for name, value in seeded.items())
    assert float(out.loss) == pytest.approx(total, rel=1e-4)


def test_renaming_is_one_to_one() -> None:
    peer = build_peer(golden_io.model_config(CASE), 5)
    assert renamed(peer.state_dict()).keys() == golden_io.state(CASE).keys()
