"""The statistics: exact against scipy, honest at small n, and calibrated on simulated null data."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis import scores, statistics
from analysis.statistics import claim_verdict, detectable, holm, paired_bootstrap, paired_t, summarise, verdict
from tests.support.present import present


def test_summary_prints_n_and_hides_small_spreads() -> None:
    found = summarise([1.0, 2.0, 4.0])
    assert (found.mean, found.n) == (pytest.approx(7 / 3), 3)
    assert found.std == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert summarise([1.0, 2.0]).std is None
    assert str(summarise([43.21, 43.5, 42.9])) == "43.2 ± 0.3 (n = 3)"
    assert summarise([43.21]).text(2) == "43.21 (n = 1)"
    for bad in ([], [float("nan"), 1.0]):
        with pytest.raises(ValueError):
            summarise(bad)


def test_paired_t_is_scipys() -> None:
    first = {0: 40.1, 1: 41.0, 2: 39.5, 3: 40.2}
    second = {1: 41.8, 2: 40.9, 3: 40.4, 0: 41.2, 9: 99.0}
    got = paired_t(first, second)
    a, b = [first[s] for s in range(4)], [second[s] for s in range(4)]
    wanted = stats.ttest_rel(b, a)
    interval = wanted.confidence_interval(0.95)
    assert got.n == 4
    assert got.p == pytest.approx(wanted.pvalue)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high))
    assert got.effect == pytest.approx(np.mean(np.subtract(b, a)))
    assert got.standardised == pytest.approx(got.effect / np.std(np.subtract(b, a), ddof=1))


def test_paired_t_below_three_seeds_says_why() -> None:
    got = paired_t({0: 1.0, 1: 2.0}, {0: 2.0, 1: 2.5})
    assert (got.effect, got.n, got.p, got.low) == (0.75, 2, None, None)
    assert "n = 2, no significance" in got.reason
    with pytest.raises(ValueError, match="share no seed"):
        paired_t({0: 1.0}, {1: 1.0})


def test_paired_t_without_variance() -> None:
    row = {0: 1.0, 1: 2.0, 2: 3.0}
    assert paired_t(row, row).p == 1
    assert paired_t(row, {s: v + 1 for s, v in row.items()}).p == 0


def _seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_claim_is_seen_or_opposite_by_sign_and_not_seen_only_inside_the_smallest_effect() -> None:
    still = _seeds(0.0, 0.0, 0.0, 0.0)
    clear = paired_t(still, _seeds(2.0, 2.1, 1.9, 2.2))
    tiny = paired_t(still, _seeds(0.1, -0.1, 0.05, -0.06))
    wide = paired_t(still, _seeds(4.0, -3.0, 5.0, -1.0))
    assert claim_verdict(clear, clear.p, 1.0) == "seen"
    assert claim_verdict(paired_t(_seeds(2.0, 2.1, 1.9, 2.2), still), clear.p, 1.0) == "opposite"
    assert claim_verdict(clear, 0.2, 1.0) == "underpowered"  # the corrected p decides, not the test's own
    assert claim_verdict(tiny, tiny.p, 1.0) == "not seen"
    assert claim_verdict(tiny, tiny.p, 0.1) == "underpowered"
    assert claim_verdict(wide, wide.p, 1.0) == "underpowered"
    assert claim_verdict(paired_t(_seeds(0.0, 0.0), _seeds(9.0, 9.0)), None, 1.0) == "underpowered"
    with pytest.raises(ValueError, match="positive"):
        claim_verdict(clear, clear.p, 0.0)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_what_is_detectable_is_found_in_four_of_five_simulated_studies(n: int) -> None:
    effect, rng = detectable(2.0, n), np.random.default_rng(n)
    draws = rng.normal(effect, 2.0, (20_000, n))
    found = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.012)
    assert detectable(4.0, n) == pytest.approx(2 * effect)


def test_one_seed_detects_nothing() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        detectable(1.0, 1)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": None,
    }
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_p_and_keeps_the_order(values: list[float]) -> None:
    adjusted = {name: present(p) for name, p in holm({str(i): p for i, p in enumerate(values)}).items()}
    for i, p in enumerate(values):
        assert p <= adjusted[str(i)] <= 1
        assert all(adjusted[str(i)] <= adjusted[str(j)] for j, q in enumerate(values) if p < q)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([43.0, 43.1, 42.9], "within"),
        ([40.0, 40.1, 39.9], "outside"),
        ([43.0, 45.0, 41.0], "underpowered"),
        ([43.0, 43.0], "underpowered"),
    ],
)
def test_verdicts(values: list[float], kind: str) -> None:
    got = verdict(values, published=43.0, tolerance=0.5)
    assert got.kind == kind
    assert got.reason


def test_verdict_is_refused_where_settings_differ() -> None:
    got = verdict([43.0] * 5, 43.0, 0.5, not_comparable="scale mini")
    assert (got.kind, got.reason) == ("not comparable", "scale mini")
    assert verdict([43.0] * 5, None, 0.5).kind == "not comparable"
    assert verdict([43.0] * 5, 43.0, None).kind == "not comparable"


def ratio_of(values: np.ndarray):
    """A metric that is linear in the image weights: a weighted mean."""
    return lambda weights: {"m": float(np.average(values, weights=weights))}


def test_bootstrap_resamples_the_same_images_for_both() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(50, 20, 200)
    got = paired_bootstrap(ratio_of(values), ratio_of(values + 1), 200, "m", resamples=200)
    assert got.effect == pytest.approx(1)
    assert (got.low, got.high) == pytest.approx((1, 1))
    assert got.p == pytest.approx(2 / 201)
    assert "not two methods" in got.about
    again = paired_bootstrap(ratio_of(values), ratio_of(values + 1), 200, "m", resamples=200)
    assert again == got


def test_bootstrap_weights_draw_every_image_as_often() -> None:
    rows = list(statistics.bootstrap_weights(50, 400, seed=3))
    assert all(row.sum() == 50 for row in rows)
    assert np.mean(rows) == 1
    assert np.var(rows) == pytest.approx(1, abs=0.05)


def test_bootstrap_of_a_metric_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        paired_bootstrap(lambda w: {"m": float("nan")}, lambda w: {"m": 1.0}, 5, "m", resamples=3)


# ------------------------------------------------------------ calibration: 5 % ± 1.5 % rejections of a true null


@pytest.mark.parametrize("seeds", [3, 5])
def test_paired_t_is_calibrated(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    rejected = 0
    for _ in range(3000):
        shared = rng.normal(0, 3, seeds)  # what a seed does to both rows
        first, second = shared + rng.normal(40, 0.5, seeds), shared + rng.normal(40, 0.5, seeds)
        rejected += (paired_t(dict(enumerate(first)), dict(enumerate(second))).p or 0) < 0.05
    assert rejected / 3000 == pytest.approx(0.05, abs=0.015)


def test_paired_bootstrap_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    rejected = 0
    for trial in range(2000):
        first, second = rng.normal(50, 20, (2, 80)) + rng.normal(0, 20, 80)
        # One linear metric, so that all resamples are one matrix product: the very p of paired_bootstrap, quicker.
        weights = np.stack(list(statistics.bootstrap_weights(80, 199, seed=trial)))
        p = statistics._sign_p(weights @ (second - first) / 80)
        rejected += p < 0.05
        if trial == 0:
            assert paired_bootstrap(ratio_of(first), ratio_of(second), 80, "m", resamples=199, seed=0).p == p
    assert rejected / 2000 == pytest.approx(0.05, abs=0.015)


def null_checkpoint(rng: np.random.Generator, hard: np.ndarray) -> scores.Detections:
    """Detections of one checkpoint: two objects an image, each found more or less exactly, and as many false ones."""
    image = np.repeat(np.arange(len(hard)), 4)
    found = np.clip(rng.normal(0.75 - 0.3 * hard[image], 0.15), 0, 1)
    quality = np.where(np.arange(len(image)) % 4 < 2, found, 0)
    match = quality >= scores.IOU_THRESHOLDS[:, None]
    return scores.build_detections(
        images=len(hard),
        truth_image=np.repeat(np.arange(len(hard)), 2),
        truth_category=np.zeros(2 * len(hard), dtype=int),
        image=image,
        category=np.zeros(len(image), dtype=int),
        score=0.5 * quality + 0.5 * rng.random(len(image)),
        match=match,
        ignore=np.zeros_like(match),
    )


@pytest.mark.slow
def test_paired_bootstrap_of_ap_is_calibrated() -> None:
    """AP is no mean over images; its bootstrap rejects a true null as often as it says all the same."""
    rng = np.random.default_rng(1)
    rejected = 0
    for trial in range(2000):
        hard = rng.random(80)  # what an image does to both checkpoints
        first, second = null_checkpoint(rng, hard), null_checkpoint(rng, hard)
        test = paired_bootstrap(first.scores, second.scores, 80, "AP", resamples=199, seed=trial)
        rejected += test.p < 0.05
    assert rejected / 2000 == pytest.approx(0.05, abs=0.015)


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(2)
    p = rng.random((2000, 6))
    wrong = sum(min(map(present, holm({str(i): v for i, v in enumerate(row)}).values())) < 0.05 for row in p)
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)


def test_no_torch() -> None:
    import subprocess

    code = "import sys, analysis.statistics, analysis.figures, analysis.scores, analysis.layer_table; "
    code += "sys.exit('torch' in sys.modules or 'pandas' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.floats(0, 100), min_size=3, max_size=8))
def test_an_interval_of_shares_stays_in_its_range(values: list[float]) -> None:
    low, high = present(statistics.bounded_interval(values))
    assert 0 <= low <= high <= 100
    cosines = [value / 50 - 1 for value in values]
    assert statistics.bounded_interval(cosines, -1, 1) == pytest.approx((low / 50 - 1, high / 50 - 1))


def test_an_interval_of_shares_by_hand() -> None:
    # far from the ends, where the transform is nearly straight, it is the t interval
    near = [50.0, 50.5, 51.0]
    assert statistics.bounded_interval(near) == pytest.approx(statistics.mean_interval(near), abs=0.01)
    assert statistics.bounded_interval([0, 0, 0]) == (0, 0)
    assert statistics.bounded_interval([1.0, 2.0]) is None
    with pytest.raises(ValueError, match="outside 0 … 100"):
        statistics.bounded_interval([1, 2, 101])
