"""The noise of the product path against the measured statistics of the public implementation."""

import numpy as np
import pytest
import torch

from mpformer.modeling.mask_piloting import flip_labels, flip_points
from tests.support.golden_rules import FOLDER

DRAWS = 400
CELLS = {32: 64, 16: 256, 8: 1024}
STATISTICS = dict(np.load(FOLDER / "case5_noise_stats.npz"))


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_point_noise_flips_as_often_as_measured(ratio: float, stride: int) -> None:
    """Masks with the measured share of open cells: everywhere, on and off the object."""
    cells, name = CELLS[stride], f"ns{ratio}/stride{stride}"
    open_cells = np.rint(STATISTICS[f"area_ratio_downsampled/stride{stride}"] * cells).astype(int)
    generator = torch.Generator().manual_seed(1)
    for i, count in enumerate(open_cells):
        clean = torch.arange(cells).view(1, -1, 1) >= count
        flipped = flip_points(clean.repeat(DRAWS, 1, 1), ratio, generator) ^ clean
        parts = {
            "flip_fraction": flipped,
            "flip_fraction_fg": flipped[:, :count],
            "flip_fraction_bg": flipped[:, count:],
        }
        for kind, part in parts.items():
            expected = float(STATISTICS[f"expected/{name}"][i])
            if part.numel():
                # Both sides are means of 400 draws.
                deviation = np.sqrt(2 * expected * (1 - expected) / part.numel())
                assert float(part.float().mean()) == pytest.approx(STATISTICS[f"{kind}/{name}"][i], abs=5 * deviation)


def test_point_noise_at_zero_is_the_identity() -> None:
    clean = torch.rand(3, 8, 8) < 0.5
    assert torch.equal(flip_points(clean, 0.0, None), clean)


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5])
def test_flip_noise_changes_labels_as_often_as_measured(probability: float) -> None:
    labels = torch.arange(5).repeat(20_000)
    flipped = flip_labels(labels, probability, 5, torch.Generator().manual_seed(2))
    changed = float((flipped != labels).float().mean())
    assert changed == pytest.approx(float(STATISTICS[f"label_changed_fraction/p{probability}"]), abs=0.012)
    transition = torch.zeros(5, 5).index_put((labels, flipped), torch.tensor(1.0), accumulate=True) / 20_000
    np.testing.assert_allclose(transition, STATISTICS[f"label_transition/p{probability}"], atol=0.02)
