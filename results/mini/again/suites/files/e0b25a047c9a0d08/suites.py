"""The suites of the study (protocol.md), launched with ``--suites results/mini/suites.py``.

The settings that scale mini fixes are those of the commit that every run records; what the study sets beside them is
written here. The same setting is the same run wherever it occurs: the baseline is trained once for all suites.
"""

from collections.abc import Iterator
from typing import Any

from experiments.suites.ablations import MASK2FORMER, MP_FORMER
from experiments.suites.rows import Row, suite

FULL = 1400
HALF: dict[str, Any] = {"schedule.max_iter": FULL // 2, "runtime.eval_period": FULL // 8}
SETTINGS: dict[str, Any] = {"schedule.max_iter": FULL, "runtime.eval_period": FULL // 4}
SECOND: dict[str, Any] = {
    "model.backbone.name": "timm/efficientnet_b0",
    "schedule.max_iter": 2000,
    "runtime.eval_period": 500,
}
"""The second backbone; it learns more slowly."""
COLUMNS = ("AP", "PQ", "mIoU", "mIoU-L", "jump-rate-late", "Util")
HEADLINE, OTHERS = {"mini": tuple(range(8))}, {"mini": tuple(range(5))}
_COMMON: dict[str, Any] = {"baseline": "mp-former", "columns": COLUMNS, "settings": SETTINGS}

OF_SET: dict[str, dict[str, Any]] = {
    "shapes": {"evaluation.val_images": 250},
    "nuclei": {"dataset.crop": 96, "model.train_points": 576},
    "facades": {"evaluation.val_images": 288},
}
"""What a set has beside scale mini's settings; those of facades come with its registration. Half of the validation
images of shapes and facades are scored: time, and tables that a repository can keep."""

_ONE_CLASS = {"nuclei": "nuclei has one class: a flipped label is the same label, a label embedding one learnt vector"}


def plain(dataset: str) -> dict[str, Any]:
    """Mask2Former."""
    return {**OF_SET.get(dataset, {}), **MASK2FORMER}


def piloted(dataset: str, **toggles: Any) -> dict[str, Any]:
    """The paper's mask piloting with some toggles changed; without flip noise where there is one class."""
    one_class = {"toggles.flip_noise": 0.0} if dataset == "nuclei" else {}
    changed = {f"toggles.{name}": value for name, value in toggles.items()}
    return {**OF_SET.get(dataset, {}), **MP_FORMER, **one_class, **changed}


def _both(dataset: str) -> Iterator[Row]:
    yield Row("mask2former", "Mask2Former", plain(dataset))
    yield Row("mp-former", "MP-Former", piloted(dataset))


def _beside_the_paper(dataset: str, rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """The paper's setting, and others by their toggles; each is compared with the paper's."""
    yield Row("mp-former", "MP-Former, as the paper has it", piloted(dataset))
    for name, toggles in rows.items():
        yield Row(name.replace(" ", "-"), name, piloted(dataset, **toggles))


@suite(title="Mask2Former against MP-Former", **{**_COMMON, "baseline": "mask2former"}, seeds=HEADLINE)
def study_headline(scale: str, dataset: str) -> Iterator[Row]:
    """Claims C1, C2, C3 and C8."""
    yield from _both(dataset)


@suite(
    title="The same with a backbone of timm",
    **{**_COMMON, "baseline": "mask2former", "settings": SECOND},
    seeds=HEADLINE,
    not_applicable=lambda dataset: "" if dataset == "shapes" else "the second backbone is tried on shapes alone",
)
def study_backbone(scale: str, dataset: str) -> Iterator[Row]:
    """Claims C1, C2 and C3 with another backbone, from random weights."""
    yield from _both(dataset)


@suite(title="Half the iterations", **{**_COMMON, "baseline": "mask2former"}, seeds=HEADLINE)
def study_convergence(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C4: half-length MP-Former, its schedule to the end, against full-length Mask2Former."""
    yield Row("mask2former", "Mask2Former", plain(dataset))
    yield Row("mp-former-half", "MP-Former, half the iterations", {**piloted(dataset), **HALF})


@suite(title="Components of mask piloting", **{**_COMMON, "baseline": "mask2former"}, seeds=OTHERS, ticks=True)
def study_components(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7: cumulative, each row is compared with the row above."""
    yield Row("mask2former", "Mask2Former", plain(dataset))
    first = piloted(dataset, guided_layers="first", point_noise=0.0, flip_noise=0.0)
    yield Row("mp-first", "+ MP queries, guided in the first layer", first, baseline="mask2former")
    every = piloted(dataset, point_noise=0.0, flip_noise=0.0)
    yield Row("mp-every", "+ guidance in every layer", every, baseline="mp-first")
    yield Row("mp-point", "+ point noise", piloted(dataset, flip_noise=0.0), baseline="mp-every")
    yield Row(
        "mp-flip", "+ flip noise", piloted(dataset), baseline="mp-point", not_applicable=_ONE_CLASS.get(dataset, "")
    )


@suite(title="Which decoder layers are guided", **_COMMON, seeds=OTHERS)
def study_guided_layers(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    rows = {f"guided {name}": {"guided_layers": name} for name in ("first", "first-4")}
    yield from _beside_the_paper(dataset, rows)


@suite(title="Amount of point noise", **_COMMON, seeds=OTHERS)
def study_point_noise(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    yield from _beside_the_paper(dataset, {f"point noise {r:g}": {"point_noise": r} for r in (0.0, 0.4, 0.8)})


@suite(title="Amount of flip noise", **_COMMON, seeds=OTHERS, not_applicable=_ONE_CLASS)
def study_flip_noise(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    yield from _beside_the_paper(dataset, {f"flip noise {p:g}": {"flip_noise": p} for p in (0.0, 0.4)})


@suite(title="Kind of mask noise", **_COMMON, seeds=OTHERS)
def study_noise_type(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    yield from _beside_the_paper(dataset, {f"{kind} noise": {"mask_noise": kind} for kind in ("shift", "scale")})


@suite(title="Number of groups of piloted queries", **_COMMON, seeds=OTHERS)
def study_groups(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    yield from _beside_the_paper(dataset, {f"{groups} groups": {"mp_groups": groups} for groups in (2,)})


@suite(title="Content of the piloted queries", **_COMMON, seeds=OTHERS, not_applicable=_ONE_CLASS)
def study_class_query(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7."""
    yield from _beside_the_paper(dataset, {"one learnt vector": {"class_embedding": "learnt"}})


@suite(title="Position embedding of the learnable queries", **{**_COMMON, "baseline": "mask2former"}, seeds=OTHERS)
def study_query_position(scale: str, dataset: str) -> Iterator[Row]:
    """Claim C7: how much of a gap to Mask2Former comes from the position embeddings alone."""
    yield from _both(dataset)
    off = {"toggles.query_position": False}
    yield Row("mask2former-off", "Mask2Former without positions", {**plain(dataset), **off}, baseline="mask2former")
    yield Row("mp-former-off", "MP-Former without positions", {**piloted(dataset), **off}, baseline="mp-former")
