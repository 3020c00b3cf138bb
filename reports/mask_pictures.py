"""The failure gallery on a page: ``layer_masks/`` read from the store, each layer as a picture of its own.

The rule by which cases are chosen is :mod:`analysis.failure_cases`'s.
"""

import base64
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from analysis.failure_cases import Aligned, Case, Mask, Step, aligned
from experiments.store.files import read_json

__all__ = ["RULE", "Case", "LayerMasks", "Step", "align", "deflate", "picture_definition", "picture_uri", "tile"]

RULE = (
    "Chosen by rule: among queries matched at the last layer with a high final score (at least 0.5, or the highest "
    "tenth of a run in which fewer reach that), the largest drop of IoU between adjacent decoder layers, one case an "
    "image; "
    "the worst of each run, then the same ground-truth object in the other run. "
    "Outline: ground truth, to which the image is cropped; filled: the mask of the query that ends on this object; "
    "right: the final prediction; red: the mask shares less than half with that of the layer before."
)


@dataclass(frozen=True)
class LayerMasks:
    """The ``layer_masks/`` directory of one evaluation."""

    folder: Path

    @property
    def images(self) -> dict[int, str]:
        """Ids of the images that have masks, with the names of their files."""
        index = read_json(self.folder / "index.json")
        listed = index.get("images", []) if isinstance(index, dict) else []
        return {int(entry["image_id"]): str(entry["record"]) for entry in listed}

    def read(self, image_id: int) -> Mapping[str, Any] | None:
        """One image's masks, or None if the file is absent or damaged."""
        content = read_json(self.folder / self.images[image_id])
        return content if isinstance(content, dict) and content.get("layers") else None


def align(runs: Sequence[LayerMasks]) -> Aligned:
    """The runs' masks by object; damaged images are left out."""
    read = [{i: run.read(i) for i in run.images} for run in runs]
    records = [{i: record for i, record in by_image.items() if record} for by_image in read]
    pictures = {
        i: run.folder / str(record["image"])
        for run, by_image in zip(reversed(runs), reversed(records), strict=True)
        for i, record in by_image.items()
        if record.get("image")
    }
    return aligned(records, pictures)


def picture_uri(path: Path | None, longest: int = 384) -> str:
    """The image as a data URI, at most ``longest`` pixels a side; a grey pixel if it cannot be read.

    A small PNG file, as evaluations write them, is embedded as it is.
    """
    from PIL import Image

    as_it_is = False
    try:
        with Image.open(path or "") as image:
            rgb = image.convert("RGB")
            as_it_is = image.format == "PNG" and max(image.size) <= min(_SMALL, longest)
    except (OSError, ValueError):
        rgb = Image.new("RGB", (1, 1), (128, 128, 128))
    if path and as_it_is:
        return _data_uri("png", path.read_bytes())
    kind = "png" if max(rgb.size) <= _SMALL else "jpeg"
    rgb.thumbnail((longest, longest))
    buffer = io.BytesIO()
    rgb.save(buffer, kind, quality=85)
    return _data_uri(kind, buffer.getvalue())


_SMALL = 160
"""Pixels a side up to which an image is embedded without loss."""


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def fill_path(mask: Mask) -> str:
    """SVG path of the mask's cells, one rectangle a horizontal run, in cell units."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    lengths = ends[:, 1] - starts[:, 1]
    return "".join(f"M{x} {y}h{n}v1h-{n}z" for (y, x), n in zip(starts.tolist(), lengths.tolist(), strict=True))


def outline_path(mask: Mask) -> str:
    """SVG path of the mask's boundary: the cell edges between inside and outside."""
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]).tolist()  # horizontal edges: (y, x) is their left end
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]).tolist()
    return "".join(f"M{x} {y}h1" for y, x in across) + "".join(f"M{x} {y}v1" for y, x in down)


def tile(step: Step, case: Case, picture: str, which: int) -> Markup:
    """One layer's picture: the image, the query's mask filled, the ground truth outlined, cropped to the object.

    ``picture`` is an SVG id.
    """
    return Markup(
        '<svg class="tile q{which}" viewBox="{box}" role="img" aria-label="layer {layer}">'
        '<use href="#{picture}"/><path class="mask" d="{mask}"/>'
        '<path class="truth under" d="{truth}"/><path class="truth" d="{truth}"/></svg>'
    ).format(
        which=which,
        box=view_box(case),
        layer=step.layer,
        picture=picture,
        mask=fill_path(step.mask),
        truth=outline_path(case.truth),
    )


def view_box(case: Case) -> str:
    """What an SVG shows of the case's image: x, y, width, height in cells."""
    left, top, right, bottom = case.box
    return f"{left} {top} {right - left} {bottom - top}"


def picture_definition(case: Case, identifier: str) -> Markup:
    """The case's image as an SVG definition, embedded once and used by each tile."""
    height, width = case.truth.shape
    return Markup('<image id="{id}" href="{uri}" width="{w}" height="{h}" preserveAspectRatio="none"/>').format(
        id=identifier, uri=picture_uri(case.picture), w=width, h=height
    )


def deflate(data: Any) -> str:
    """Plain data as JSON, deflated (raw), in base64."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(packer.compress(text) + packer.flush()).decode()
