"""The metrics a report may print: label, header group, unit, direction and the definition that is always stated."""

from mpformer.config.datasets import DATASETS
from mpformer.runtime.errors import choices
from reports.model import Column

_CONSISTENCY = "Consistency of the decoder layers"
_COST = "Cost"

_LAYERS = (
    "Layers are 0 … L, 0 being the learnable queries before any decoder layer. V(n, i) is the object matched to "
    "query n at "
    "layer i (Hungarian matching with the training cost's weights on all cells at mask resolution), or −1."
)


def _score(key: str, label: str, group: str, definition: str) -> Column:
    return Column(key, label, group, definition)


_COLUMNS = (
    _score("AP", "AP", "Instance", "AP: COCO mask AP, mean over IoU 0.50:0.05:0.95, up to 100 detections an image."),
    _score("AP50", "AP50", "Instance", "AP50: COCO mask AP at IoU 0.50."),
    _score("AP75", "AP75", "Instance", "AP75: COCO mask AP at IoU 0.75."),
    _score("APs", "APs", "Instance", "APs: COCO mask AP of small objects (the area limits are in the configuration)."),
    _score("APm", "APm", "Instance", "APm: COCO mask AP of medium objects."),
    _score("APl", "APl", "Instance", "APl: COCO mask AP of large objects."),
    _score("PQ", "PQ", "Panoptic", "PQ: panoptic quality over things and stuff (Kirillov et al., CVPR 2019)."),
    _score("SQ", "SQ", "Panoptic", "SQ: segmentation quality, the mean IoU of true positives."),
    _score("RQ", "RQ", "Panoptic", "RQ: recognition quality, the F1 of segments."),
    _score("PQ_th", "PQ things", "Panoptic", "PQ things: PQ over thing classes."),
    _score("PQ_st", "PQ stuff", "Panoptic", "PQ stuff: PQ over stuff classes."),
    _score("mIoU", "mIoU", "Semantic", "mIoU: mean over classes of the IoU accumulated over the validation set."),
    _score(
        "mIoU-L",
        "mIoU-L",
        _CONSISTENCY,
        "mIoU-L (this project's formula; the paper names the metric and publishes no code): mean over layers i = "
        "1 … L, and "
        "over queries matched at the last layer, of IoU(mask(n, i−1), mask(n, i)), masks binarised at probability 0.5; "
        "pairs of two empty masks are left out.",
    ),
    _score(
        "mIoU-L-last",
        "mIoU-L last",
        _CONSISTENCY,
        "mIoU-L last: as mIoU-L, but against the mask of the last layer, IoU(mask(n, i), mask(n, L)).",
    ),
    _score(
        "Util",
        "Util",
        _CONSISTENCY,
        "Util (this project's formula): mean over layers i = 0 … L−1 of the share of queries matched at the last "
        "layer with "
        "V(n, i) = V(n, L).",
    ),
    _score(
        "Util-consecutive",
        "Util cons.",
        _CONSISTENCY,
        "Util cons.: as Util, but V(n, i) = V(n, i+1).",
    ),
    Column(
        "jump-rate",
        "jump rate",
        _CONSISTENCY,
        "jump rate (this project's formula): share of the objects matched at the last layer, to query q, with "
        "IoU(mask(q, i−1), mask(q, i)) < 0.5 at any step i = 1 … L; a pair of two empty masks is no jump.",
        direction=-1,
    ),
    Column(
        "jump-rate-late",
        "jump rate after layer 1",
        _CONSISTENCY,
        "jump rate after layer 1: as jump rate, but at any step i = 2 … L.",
        direction=-1,
    ),
    Column("hours", "train time", _COST, "train time: wall time of training, in hours.", "h", 2, 0),
    Column("memory", "peak mem.", _COST, "peak mem.: peak memory of training, in GiB.", "GiB", 2, 0),
    Column(
        "iteration", "s / iteration", _COST, "s / iteration: wall time of one optimiser step, in seconds.", "s", 3, 0
    ),
    Column(
        "train_gflops",
        "train GFLOPs",
        _COST,
        "train GFLOPs: multiply-adds × 2 of matrix products and convolutions in forward and backward of one validation "
        "image, in billions.",
        "GFLOPs",
        1,
        0,
    ),
    Column(
        "inference_gflops",
        "inference GFLOPs",
        _COST,
        "inference GFLOPs: the same count, forward alone, piloted part absent.",
        "GFLOPs",
        1,
        0,
    ),
    Column(
        "inference",
        "inference",
        _COST,
        "inference: seconds of one forward pass of one image, median of 5, with whatever else ran on the machine.",
        "s",
        3,
        0,
    ),
)
COSTS = ("train_gflops", "inference_gflops", "inference")
COLUMNS = {column.key: column for column in _COLUMNS}
JUMPS = ("jump-rate", "jump-rate-late")


_OF_CITYSCAPES = {
    "AP": "AP: Cityscapes' own AP of instance masks, by its scripts: mean over IoU 0.50:0.05:0.95, objects under 100 "
    "pixels ignored.",
    "AP50": "AP50: Cityscapes' own AP of instance masks at IoU 0.50, by its scripts.",
    "PQ": "PQ: panoptic quality over things and stuff, by Cityscapes' scripts.",
    "mIoU": "mIoU: Cityscapes' own IoU, by its scripts: mean over its 19 classes, accumulated over the validation set.",
}
"""That benchmark's numbers, where they are not COCO's."""


def columns(keys: list[str] | tuple[str, ...], decimals: int | None = None, dataset: str = "") -> tuple[Column, ...]:
    """The columns of these metrics as scored on a dataset, in this order; raises UserError for an unknown one."""
    from dataclasses import replace

    unknown = [key for key in keys if key not in COLUMNS]
    if unknown:
        raise choices("column", unknown[0], COLUMNS)
    chosen = [COLUMNS[key] for key in keys]
    if dataset in DATASETS and DATASETS[dataset].evaluator == "cityscapes":
        chosen = [replace(column, definition=_OF_CITYSCAPES.get(column.key, column.definition)) for column in chosen]
    return tuple(chosen if decimals is None else [replace(column, decimals=decimals) for column in chosen])


def definitions(chosen: tuple[Column, ...]) -> list[str]:
    """One sentence per column, and what a layer and a match are where a layer metric is among them."""
    stated = [column.definition for column in chosen]
    return stated + ([_LAYERS] if any(column.group == _CONSISTENCY for column in chosen) else [])
