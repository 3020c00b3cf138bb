"""The suites, plain functions that yield rows; copy one to write your own (see :mod:`experiments.suites.rows`).

A comparison with Mask2Former holds ``query_position`` and the schedule equal, unless the suite is about them.
"""

from collections.abc import Iterator
from typing import Any

from experiments.suites.grid import grid
from experiments.suites.rows import Row, suite
from experiments.suites.scales import STRESS, base
from mpformer.config import presets
from mpformer.config.datasets import dataset as dataset_entry

MASK2FORMER = presets.changes("mask2former")
MP_FORMER = presets.changes("mp-former/paper")
"""The paper's setting as far as it is known."""
RELEASE = presets.changes("mp-former/release")
"""What the published run script trains with."""
_POINT: dict[str, Any] = {**MP_FORMER, "toggles.flip_noise": 0.0}
_GUIDED: dict[str, Any] = {**_POINT, "toggles.point_noise": 0.0}
GUIDED_FIRST: dict[str, Any] = {**_GUIDED, "toggles.guided_layers": "first"}

_BASELINE = Row("mask2former", "Mask2Former", MASK2FORMER)

_SAME_LABEL = "a flipped label is the same label"


def _one_class(dataset: str, why: str) -> str:
    """Return why a suite or row about classes does not apply on the dataset; empty: it does."""
    fact = dataset_entry(dataset).one_class
    return fact and f"{fact}: {why}"


@suite(title="Mask2Former against MP-Former", baseline="mask2former", seeds={"mini": (0,), "paper": (0, 1, 2)})
def headline(scale: str, dataset: str) -> Iterator[Row]:
    """Mask piloting as the paper has it, position embeddings and schedule equal; at scale mini with one seed."""
    yield _BASELINE
    yield Row("mp-former", "MP-Former", MP_FORMER)


@suite(title="Components of mask piloting", baseline="mask2former", ticks=True)
def components(scale: str, dataset: str) -> Iterator[Row]:
    """Cumulative: each row adds one component to the row above."""
    yield _BASELINE
    yield Row("mp-first", "+ MP queries, guided in the first layer", GUIDED_FIRST)
    yield Row("mp-every", "+ guidance in every layer", _GUIDED)
    yield Row("mp-point", "+ point noise", _POINT)
    flip = _one_class(dataset, _SAME_LABEL)
    yield Row("mp-flip", "+ flip noise", MP_FORMER, not_applicable=flip)


@suite(title="Which decoder layers are guided", baseline="mask2former")
def guided_layers(scale: str, dataset: str) -> Iterator[Row]:
    """From the first layer alone to every layer; first-4 is the public release's "not all"."""
    yield _BASELINE
    yield from grid({"guided_layers": ["first", "first-2", "first-4", "every"]}, common=MP_FORMER)


@suite(title="Kind of mask noise", baseline="mask2former")
def noise_type(scale: str, dataset: str) -> Iterator[Row]:
    """Point noise against shifted and scaled ground-truth masks (done right: the release inverts masks in these)."""
    yield _BASELINE
    yield Row("none", "no mask noise", {**MP_FORMER, "toggles.point_noise": 0.0})
    yield from grid({"mask_noise": ["point", "shift", "scale", "shift-scale"]}, common=MP_FORMER)


@suite(title="Amount of point noise", baseline="mask2former")
def point_noise(scale: str, dataset: str) -> Iterator[Row]:
    """The ratio r of flipped cells."""
    yield _BASELINE
    yield from grid({"point_noise": [0.0, 0.1, 0.2, 0.4, 0.6]}, common=MP_FORMER)


@suite(
    title="Amount of flip noise",
    baseline="mask2former",
    not_applicable=lambda dataset: _one_class(dataset, _SAME_LABEL),
)
def flip_noise(scale: str, dataset: str) -> Iterator[Row]:
    """The probability that a piloted query's label is replaced."""
    yield _BASELINE
    yield from grid({"flip_noise": [0.0, 0.1, 0.2, 0.4]}, common=MP_FORMER)


@suite(title="Number of groups of piloted queries", baseline="mask2former")
def mp_groups(scale: str, dataset: str) -> Iterator[Row]:
    """Fixed numbers of groups, and a budget of piloted queries."""
    yield _BASELINE
    yield from grid({"mp_groups": [1, 2, 5, "budget-100"]}, common=MP_FORMER)


@suite(
    title="Content of the piloted queries",
    baseline="mask2former",
    not_applicable=lambda dataset: _one_class(dataset, "a label embedding is one learnt vector"),
)
def class_embedding(scale: str, dataset: str) -> Iterator[Row]:
    """A label embedding or one learnt vector, fed to the first layer (the paper) or to every layer."""
    yield _BASELINE
    axes = {"class_embedding": ["label", "learnt"], "class_embedding_layers": ["first", "every"]}
    yield from grid(axes, common=MP_FORMER)


@suite(title="Position embedding of the learnable queries", baseline="mask2former,query_position=on")
def query_position(scale: str, dataset: str) -> Iterator[Row]:
    """On as in Mask2Former, off as in the public MP-Former release: how much of a gap comes from it alone."""
    yield from grid({"query_position": [True, False]}, common=MASK2FORMER, prefix="mask2former,", title="Mask2Former")
    yield from grid({"query_position": [True, False]}, common=MP_FORMER, prefix="mp-former,", title="MP-Former")


@suite(title="Poly against step schedule", baseline="mask2former,poly")
def schedule(scale: str, dataset: str) -> Iterator[Row]:
    """The public MP-Former configurations changed Mask2Former's schedule: how much of a gap comes from it alone."""
    usual = base(scale, dataset).schedule
    steps = usual.steps or (round(usual.max_iter * 0.85), round(usual.max_iter * 0.95))
    poly = {"schedule.lr_schedule": "poly", "schedule.steps": ()}
    step = {"schedule.lr_schedule": "step", "schedule.steps": steps}
    for name, label, changes in (("mask2former", "Mask2Former", MASK2FORMER), ("mp-former", "MP-Former", MP_FORMER)):
        yield Row(f"{name},poly", f"{label}, poly", {**changes, **poly})
        yield Row(f"{name},step", f"{label}, step", {**changes, **step})


@suite(
    title="Consistency between decoder layers",
    baseline="mask2former",
    primary="mIoU-L",
    columns=("mIoU-L", "Util", "AP"),
)
def consistency(scale: str, dataset: str) -> Iterator[Row]:
    """mIoU-L and Util per layer; the same runs as `headline`."""
    yield from headline(scale, dataset)


@suite(
    title="Drawn shapes with every kind of stress",
    baseline="mask2former",
    not_applicable=lambda dataset: "" if dataset == "shapes" else "only the drawn shapes have stress parameters",
    settings=STRESS,
)
def stress(scale: str, dataset: str) -> Iterator[Row]:
    """`headline` where objects are crowded, tiny, thin, split and camouflaged, images cluttered, noisy and blurred.

    `--set dataset.shapes.noise=0` and the like take one kind of stress away again.
    """
    yield from headline(scale, dataset)
