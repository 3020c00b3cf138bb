"""transformers' Mask2Former with renamed weights gives the golden values: values and renaming are right."""

import pytest
import torch

pytest.importorskip("transformers")

from mpformer.config.schema import ResNetConfig, Toggles
from mpformer.modeling.meta_arch import build_model
from tests.direct.model import DirectMPFormer
from tests.support import golden_io
from tests.support.golden_rules import GoldenCase, problems
from tests.support.paired_models import CLASSES, tiny_config
from tests.support.transformers_peer import build_peer, load_ours, renamed

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


def test_product_with_random_weights_gives_the_peers_evaluation_outputs() -> None:
    """An implementation that nobody here wrote, weights that nobody trained: every head's outputs are the same."""
    narrow = ResNetConfig(depth=50, stem_channels=8, res2_channels=16, width_per_group=4)
    config = tiny_config(Toggles(), backbone=narrow)
    product = build_model(config, CLASSES, range(CLASSES)).eval()
    peer = build_peer(config.model, CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in product.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        load_ours(peer, product.state_dict())
        images = torch.randn(2, 3, 96, 128, generator=generator)
        ours = product.sem_seg_head.predictor(product.pixel_features(images))
        theirs = peer(pixel_values=images)
    heads = [*theirs.auxiliary_logits, theirs]
    assert len(heads) == len(ours.logits)
    for layer, head in enumerate(heads):
        logits, masks = (head[k] for k in ("class_queries_logits", "masks_queries_logits"))
        torch.testing.assert_close(ours.logits[layer], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.masks(layer), masks, atol=1e-3, rtol=1e-4)


def test_renaming_is_one_to_one() -> None:
    peer = build_peer(golden_io.model_config(CASE), 5)
    assert renamed(peer.state_dict()).keys() == golden_io.state(CASE).keys()
