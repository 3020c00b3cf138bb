"""``LayerRecorder``: the layer metrics of a whole validation set, in one streaming pass.

A few dozen bytes are kept per image × layer × object, nothing else; recorders of several processes merge. The line
format is that of ``layers.parquet`` (:mod:`analysis.layer_table`), from which every number can be computed again
without the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import layer_table
from analysis.matching import Classifier, ImagePrediction, MatchWeights, ground_truth_cells, match_layers

_COMPACT = 256


class LayerRecorder:
    """Collects one line per image × layer × object matched at the last layer.

    ``things`` says for each class whether it is a thing (None: all are). ``weights`` are the matching cost's.
    ``classifier`` says what class outputs are: logits with "no object" last (``softmax``), logits of the classes alone
    (``sigmoid``), or probabilities with "no object" last (``scores``).

    >>> recorder = LayerRecorder()
    >>> gt_masks, gt_labels = torch.ones(1, 32, 32, dtype=torch.bool), torch.tensor([2])
    >>> recorder.add(7, torch.randn(3, 5, 8, 8), torch.randn(3, 5, 4), gt_masks, gt_labels)
    >>> len(recorder.rows()["layer"])
    3
    """

    def __init__(
        self,
        things: Sequence[bool] | None = None,
        weights: MatchWeights | None = None,
        classifier: Classifier = "softmax",
    ) -> None:
        self.things = None if things is None else np.asarray(things, dtype=bool)
        self.weights = weights or MatchWeights()
        self.classifier: Classifier = classifier
        self.first_layer = 0
        self.layers = 0
        self.queries = 0
        self.images: set[int] = set()
        self._parts: list[dict[str, np.ndarray]] = []
        self._empty_attention = np.zeros((0,))
        self._attention_masks = 0

    def add(
        self,
        image_id: int,
        mask_logits: Tensor,
        class_logits: Tensor,
        gt_masks: Tensor,
        gt_labels: Tensor,
        *,
        image_size: tuple[int, int] | None = None,
        stride: int = 4,
        empty_attention: Tensor | None = None,
        first_layer: int = 0,
    ) -> None:
        """Record one image from its mask logits.

        Shapes: mask_logits (A, Q, h, w), class_logits (A, Q, C + 1) with "no object" last, gt_masks (n, H, W) bool
        covering the image at any resolution, gt_labels (n,) int in 0 … C − 1, empty_attention (L, Q) bool
        (attention masks that were fully blocked). ``image_size`` is the input's (height, width) in pixels without
        padding, ``stride`` that of the mask features; None: no padding. ``first_layer`` is the number of the first of
        the A layers: 1 for a model that predicts nothing from its bare queries. Raises ValueError for a second image of
        the same id, other numbers of layers or queries than before, outputs that are not finite, or class outputs
        that are not what the classifier says.
        """
        model = (image_size, stride, self.classifier, first_layer)
        prediction = ImagePrediction.from_masks(mask_logits, class_logits, *model)
        self.add_prediction(image_id, prediction, gt_masks, gt_labels, empty_attention=empty_attention)

    def add_embeddings(
        self,
        image_id: int,
        mask_embed: Tensor,
        mask_features: Tensor,
        class_logits: Tensor,
        gt_masks: Tensor,
        gt_labels: Tensor,
        *,
        image_size: tuple[int, int] | None = None,
        stride: int = 4,
        empty_attention: Tensor | None = None,
        first_layer: int = 0,
    ) -> None:
        """:meth:`add` from mask embeddings (A, Q, D) and mask features (D, h, w); never holds all layers' logits of
        a large image.
        """
        model = (image_size, stride, self.classifier, first_layer)
        prediction = ImagePrediction.from_embeddings(mask_embed, mask_features, class_logits, *model)
        self.add_prediction(image_id, prediction, gt_masks, gt_labels, empty_attention=empty_attention)

    @torch.no_grad()
    def add_prediction(
        self,
        image_id: int,
        prediction: ImagePrediction,
        gt_masks: Tensor,
        gt_labels: Tensor,
        *,
        empty_attention: Tensor | None = None,
    ) -> None:
        """:meth:`add` from a prepared :class:`~analysis.matching.ImagePrediction`."""
        self._check(image_id, prediction)
        self._count_attention(empty_attention)
        if len(gt_labels) == 0:
            return
        gt_masks = gt_masks.to(prediction.class_logits.device).bool()
        cells = ground_truth_cells(gt_masks, prediction.grid)
        assignment = match_layers(prediction, cells, gt_labels, self.weights)
        labels = gt_labels.cpu().numpy()
        areas = gt_masks.flatten(1).sum(1).cpu().numpy()
        self._keep(image_rows(image_id, prediction, assignment, cells, labels, areas, self.things))

    def merge(self, other: "LayerRecorder") -> None:
        """Take over another recorder's images (of another process); the order of merging does not matter.

        Raises ValueError if an image was recorded by both, or the models differ in layers or queries.
        """
        if other.layers == 0:
            return
        if self.layers and self._model != other._model:
            raise ValueError("recorders of models with other numbers of layers or queries cannot merge")
        if twice := self.images & other.images:
            raise ValueError(f"image {min(twice)} was recorded by both recorders")
        self._model = other._model
        self.images |= other.images
        self._parts += other._parts
        self._add_attention(other._empty_attention, other._attention_masks)

    def state(self) -> dict[str, Any]:
        """Everything recorded as plain data and arrays, for :meth:`absorb` in another process."""
        self._compact()
        return {
            "layers": self.layers,
            "queries": self.queries,
            "first_layer": self.first_layer,
            "images": sorted(self.images),
            "parts": self._parts,
            "empty_attention": self._empty_attention,
            "attention_masks": self._attention_masks,
        }

    def absorb(self, state: Mapping[str, Any]) -> None:
        """:meth:`merge` from another recorder's :meth:`state`."""
        other = LayerRecorder(None, self.weights)
        other._model = (state["layers"], state["queries"], state.get("first_layer", 0))
        other.images = set(state["images"])
        other._parts, other._attention_masks = list(state["parts"]), state["attention_masks"]
        other._empty_attention = state["empty_attention"]
        self.merge(other)

    def rows(self) -> dict[str, np.ndarray]:
        """The columns of ``layers.parquet``, sorted by image, layer and object."""
        return dict(self.table().columns)

    def table(self) -> layer_table.LayerTable:
        """Everything recorded, as :func:`analysis.layer_table.read` would read it back."""
        self._compact()
        columns = self._parts[0] if self._parts else layer_table.empty_columns()
        order = np.lexsort((columns["object"], columns["layer"], columns["image_id"]))
        return layer_table.LayerTable(
            {name: column[order] for name, column in columns.items()}, self.layers, self.queries, self.first_layer
        )

    def write(self, path: Path) -> None:
        """Write ``layers.parquet``."""
        layer_table.write(self.table(), path)

    def summary(self) -> dict[str, Any]:
        """Numbers of ``result.json``: ``metrics``, ``layers``, ``used_query_share``, ``effective_queries`` (shares
        and IoUs in percent).
        """
        numbers = layer_table.summarise(self.table())
        if self._attention_masks:
            share = 100 * self._empty_attention / self._attention_masks
            numbers["layers"]["empty_attention_share"] = share.tolist()
        return numbers

    def _check(self, image_id: int, prediction: ImagePrediction) -> None:
        if image_id in self.images:
            raise ValueError(f"image {image_id} was recorded before")
        model = (prediction.first_layer + prediction.layers, prediction.queries, prediction.first_layer)
        if self.layers and model != self._model:
            raise ValueError(f"(layers, queries, first layer) changed from {self._model} to {model}")
        self._model = model
        self.images.add(image_id)

    @property
    def _model(self) -> tuple[int, int, int]:
        """What is the same for all images."""
        return self.layers, self.queries, self.first_layer

    @_model.setter
    def _model(self, value: tuple[int, int, int]) -> None:
        self.layers, self.queries, self.first_layer = value

    def _keep(self, rows: dict[str, np.ndarray]) -> None:
        self._parts.append(rows)
        if len(self._parts) >= _COMPACT:
            self._compact()

    def _compact(self) -> None:
        """Join the parts: many small arrays would cost more than what they hold."""
        if len(self._parts) > 1:
            names = self._parts[0]
            self._parts = [{name: np.concatenate([part[name] for part in self._parts]) for name in names}]

    def _count_attention(self, empty: Tensor | None) -> None:
        if empty is not None:
            self._add_attention(empty.sum(1).double().cpu().numpy(), empty.shape[1])

    def _add_attention(self, counts: np.ndarray, masks: int) -> None:
        if masks:
            self._empty_attention = self._empty_attention + counts if self._attention_masks else counts
            self._attention_masks += masks


def image_rows(
    image_id: int,
    prediction: ImagePrediction,
    assignment: np.ndarray,
    gt_cells: Tensor,
    labels: np.ndarray,
    areas: np.ndarray,
    things: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Lines of one image, layer-major then by object: columns of length (L + 1) · k, k = min(Q, n).

    Shapes: assignment (A, Q), gt_cells (n, h, w) bool, labels (n,), areas (n,) in pixels of the ground truth as
    given, things (C,) bool. The lines of a layer before the prediction's first have no query (−1), IoU or score (NaN).
    """
    queries, objects = _final_pairs(assignment[-1])
    missing, k = prediction.first_layer, len(queries)
    layers = missing + len(assignment)
    ious = _ious(_masks_of(prediction, queries), gt_cells[torch.from_numpy(objects)])
    score, predicted = (value.cpu().numpy() for value in prediction.scores[:, torch.from_numpy(queries)].max(-1))
    classes = labels[objects]
    thing = np.ones(k, dtype=bool) if things is None else things[classes]
    of_layers = {
        "query_here": (_queries_of(assignment, len(labels))[:, objects], -1),
        "score": (score, np.nan),
        "predicted_class": (predicted, -1),
        **{name: (values, np.nan if name.startswith("iou") else False) for name, values in ious.items()},
    }
    columns = {
        "image_id": np.full((layers, k), image_id),
        "layer": np.broadcast_to(np.arange(layers)[:, None], (layers, k)),
        "object": np.broadcast_to(objects, (layers, k)),
        "class": np.broadcast_to(classes, (layers, k)),
        "thing": np.broadcast_to(thing, (layers, k)),
        "area": np.broadcast_to(areas[objects], (layers, k)),
        "query_final": np.broadcast_to(queries, (layers, k)),
        **{name: np.pad(v, ((missing, 0), (0, 0)), constant_values=none) for name, (v, none) in of_layers.items()},
    }
    return {name: columns[name].astype(dtype).ravel() for name, dtype in layer_table.COLUMNS.items()}


def _final_pairs(final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(queries, objects) matched at the last layer, by object."""
    queries = np.flatnonzero(final >= 0)
    queries = queries[np.argsort(final[queries])]
    return queries, final[queries]


def _queries_of(assignment: np.ndarray, objects: int) -> np.ndarray:
    """V (A, Q) turned round: (A, n), the query matched to each object, −1 for none."""
    found = np.full((len(assignment), objects), -1)
    layer, query = np.nonzero(assignment >= 0)
    found[layer, assignment[layer, query]] = query
    return found


def _masks_of(prediction: ImagePrediction, queries: np.ndarray) -> Tensor:
    """Binary masks of some queries in all layers: (A, k, h · w) float32 of 0 and 1."""
    index = torch.from_numpy(queries)
    parts = [(prediction.logits(a, b, index) > 0).float().flatten(2) for a, b in prediction.chunks()]
    return torch.cat(parts[::-1])


def _ious(masks: Tensor, objects: Tensor) -> dict[str, np.ndarray]:
    """IoU columns of masks (A, k, cells) of 0/1 with the layer before, the last layer and objects (k, h, w)."""
    targets = objects.flatten(1).float()
    area = masks.sum(-1)
    previous, none_previous = _ratio((masks[1:] * masks[:-1]).sum(-1), area[1:], area[:-1])
    last, none_last = _ratio((masks * masks[-1]).sum(-1), area, area[-1])
    truth, _ = _ratio((masks * targets).sum(-1), area, targets.sum(-1))
    first = np.full((1, masks.shape[1]), np.nan)
    return {
        "iou_previous": np.concatenate([first, previous]),
        "iou_last": last,
        "iou_gt": truth,
        "both_empty_previous": np.concatenate([first == 0, none_previous]),
        "both_empty_last": none_last,
    }


def _ratio(intersection: Tensor, first: Tensor, second: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """IoU from an intersection and two areas (NaN where both are 0), and where that is."""
    union = first + second - intersection
    return (intersection / union).cpu().numpy(), (union == 0).cpu().numpy()
