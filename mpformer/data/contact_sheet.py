"""A picture of a prepared dataset: images beside their ground truth. No torch."""

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mpformer.config.classes import class_table, tasks_of
from mpformer.config.datasets import ClassTable, dataset
from mpformer.data.coco_layout import Layout, read_json, rgb_to_id
from mpformer.data.prepared import read_manifest
from mpformer.runtime.errors import UserError

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]
_GAP, _MARGIN, _TEXT = 6, 18, 15
_INK, _PAPER = (35, 35, 35), (255, 255, 255)
# muted, for stuff classes; things get saturated colours, one an object
_STUFF = ((143, 170, 196), (196, 176, 140), (158, 186, 150), (184, 160, 190), (190, 190, 190))
_ADVICE = "prepare the dataset again"


@dataclass(frozen=True)
class _Labelled:
    """An image (H, W, 3), its segment ids (H, W; 0 is void) and the class of each id."""

    image: Pixels
    ids: NDArray[np.int32]
    classes: dict[int, int]


def contact_sheet(
    data_dir: Path, out_png: Path, split: str = "train", images: int = 12, columns: int = 3, zoom: int = 2
) -> None:
    """Draw the first images of a split (of a user's own set: evenly spread ones), each beside its ground truth, with
    a legend. Every object has a colour of its own; in a user's own set it is a shade of its class's.

    Raises UserError if the dataset is not there or is damaged, or the picture cannot be written.
    """
    manifest = read_manifest(Path(data_dir) / "manifest.json")
    table = class_table(manifest["name"], tasks_of(manifest["name"])[-1])
    own = dataset(manifest["name"]).added
    labelled = _read(Layout(Path(data_dir), split), images, bool(table.stuff), spread=own)
    colors = _by_class(table) if own else None
    cells = [np.concatenate([_zoomed(x.image, zoom), _overlay(x, table, zoom, colors)], axis=1) for x in labelled]
    grid = _grid(cells, columns)
    sheet = _with_legend(grid, table) if colors is None else _with_class_legend(grid, table, colors)
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(out_png, optimize=True)
    except OSError as error:
        raise UserError(f"cannot write {out_png}: {error.strerror}") from None


def _read(layout: Layout, count: int, stuff: bool, spread: bool) -> list[_Labelled]:
    content = read_json(layout.panoptic_json if stuff else layout.instances_json, _ADVICE)
    result = []
    step = max(1, len(content["images"]) // count) if spread else 1
    for image in content["images"][::step][:count]:
        pixels = np.asarray(Image.open(layout.images / image["file_name"]).convert("RGB"))
        rows = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        if stuff:
            ids = rgb_to_id(np.asarray(Image.open(layout.panoptic / image["file_name"])))
            result.append(_Labelled(pixels, ids, {s["id"]: s["category_id"] - 1 for s in rows[0]["segments_info"]}))
        else:
            result.append(_from_masks(pixels, [r for r in rows if not r["iscrowd"]]))
    return result


def _from_masks(pixels: Pixels, rows: list[dict]) -> _Labelled:
    from pycocotools import mask as coco

    ids = np.full(pixels.shape[:2], -1, dtype=np.int32)  # background, unlike void
    for number, row in enumerate(rows, start=1):
        ids[coco.decode(row["segmentation"]).astype(bool)] = number
    return _Labelled(pixels, ids, {n: r["category_id"] - 1 for n, r in enumerate(rows, start=1)})


def _zoomed(array: NDArray, zoom: int) -> NDArray:
    return array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _overlay(x: _Labelled, table: ClassTable, zoom: int, by_class: list[Color] | None) -> Pixels:
    """Segments in flat colours over the grey image, thin light outlines, void hatched."""
    ids = _zoomed(x.ids, zoom)
    grey = _zoomed(x.image, zoom).mean(axis=2, keepdims=True)
    colors = np.repeat(grey, 3, axis=2)
    shade = 0.8 + 0.2 * (grey / 255)
    things = 0
    for segment, category in x.classes.items():
        thing = table.is_thing[category]
        if by_class is not None:
            color = _shade(by_class[category], things if thing else 0)
        else:
            color = _thing_color(things) if thing else _STUFF[(category - len(table.things)) % len(_STUFF)]
        things += thing
        inside = ids == segment
        colors[inside] = (np.array(color) * shade)[inside]
    colors[(ids == 0) & _hatch(ids.shape)] = 0
    colors[_outlines(ids)] = 250
    return np.clip(colors, 0, 255).astype(np.uint8)


def _thing_color(number: int) -> Color:
    """Hues a golden angle apart, so that neighbours differ."""
    value = 0.95 if number % 2 else 0.75
    r, g, b = colorsys.hsv_to_rgb((0.02 + 0.618034 * number) % 1, 0.85, value)
    return int(255 * r), int(255 * g), int(255 * b)


def _by_class(table: ClassTable) -> list[Color]:
    """A colour a class: saturated for things, muted for stuff."""
    colors = []
    for number, thing in enumerate(table.is_thing):
        hue = (0.02 + 0.618034 * number) % 1
        r, g, b = colorsys.hsv_to_rgb(hue, 0.85 if thing else 0.3, 0.9 if thing else 0.75)
        colors.append((int(255 * r), int(255 * g), int(255 * b)))
    return colors


def _shade(color: Color, number: int) -> Color:
    """The colour, a little darker for every other object, so that neighbours differ."""
    factor = (1.0, 0.8, 0.62)[number % 3]
    return int(color[0] * factor), int(color[1] * factor), int(color[2] * factor)


def _hatch(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    rows, columns = np.indices(shape)
    return (rows + columns) % 6 < 3


def _outlines(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    edges = np.zeros(ids.shape, dtype=bool)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    return edges


def _grid(cells: list[Pixels], columns: int) -> Pixels:
    h, w = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    step_y, step_x = h + 2 * _GAP, w + 3 * _GAP
    sheet = np.full((rows * step_y, columns * step_x, 3), 255, dtype=np.uint8)
    for i, cell in enumerate(cells):
        y, x = i // columns * step_y, i % columns * step_x
        sheet[y : y + h, x : x + w] = cell
    return np.pad(sheet[: -2 * _GAP, : -3 * _GAP], ((_MARGIN, 0), (_MARGIN, _MARGIN), (0, 0)), constant_values=255)


def _with_legend(sheet: Pixels, table: ClassTable) -> Pixels:
    height = 3 * _TEXT + 2 * _MARGIN if table.stuff else 2 * _TEXT + 2 * _MARGIN
    canvas = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + height), _PAPER)
    canvas.paste(Image.fromarray(sheet))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
    y = sheet.shape[0] + _MARGIN - 4
    things = f"Things ({len(table.things)}; the shape is the class, each object has a colour): " + ", ".join(
        table.things
    )
    pen.text((_MARGIN, y), things if table.stuff else f"Things: {', '.join(table.things)}", _INK, font)
    if table.stuff:
        _stuff_legend(pen, font, y + 2 * _TEXT, table)
    return np.asarray(canvas)


def _with_class_legend(sheet: Pixels, table: ClassTable, colors: list[Color]) -> Pixels:
    """The sheet over one line a kind of class, or several where the names do not fit."""
    font = ImageFont.load_default(_TEXT)
    things = [(name, color) for name, color, thing in zip(table.names, colors, table.is_thing, strict=True) if thing]
    stuff = [(name, color) for name, color, thing in zip(table.names, colors, table.is_thing, strict=True) if not thing]
    canvas = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + _MARGIN + 2 * _TEXT * (4 + len(colors) // 3)), _PAPER)
    canvas.paste(Image.fromarray(sheet))
    pen, y = ImageDraw.Draw(canvas), sheet.shape[0] + _GAP
    for head, classes in (("Things, shades tell objects apart:", things), ("Stuff; hatched is void:", stuff)):
        y = _swatches(pen, font, y, canvas.width, head, classes) if classes else y
    return np.asarray(canvas.crop((0, 0, canvas.width, y + _MARGIN)))


def _swatches(
    pen: ImageDraw.ImageDraw, font: Any, y: int, width: int, head: str, classes: list[tuple[str, Color]]
) -> int:
    """Draw names beside their colours; returns where the next line begins."""
    pen.text((_MARGIN, y), head, _INK, font)
    x = _MARGIN + pen.textlength(head, font) + 12
    for name, color in classes:
        needed = 2 * _TEXT + pen.textlength(name, font)
        if x + needed > width:
            x, y = float(_MARGIN), y + 2 * _TEXT
        pen.rectangle((x, y + 2, x + _TEXT, y + 2 + _TEXT), fill=color, outline=_INK)
        pen.text((x + _TEXT + 6, y), name, _INK, font)
        x += needed + 14
    return y + 2 * _TEXT


def _stuff_legend(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, y: int, table: ClassTable
) -> None:
    x = float(_MARGIN)
    head = f"Stuff ({len(table.stuff)}; the texture is the class):"
    pen.text((x, y), head, _INK, font)
    x += pen.textlength(head, font) + 12
    for number, name in enumerate(table.stuff):
        pen.rectangle((x, y + 2, x + _TEXT, y + 2 + _TEXT), fill=_STUFF[number % len(_STUFF)], outline=_INK)
        pen.text((x + _TEXT + 6, y), name, _INK, font)
        x += _TEXT + 6 + pen.textlength(name, font) + 20
    pen.text((x, y), "Hatched: void (less than a fifth of the object can be seen)", _INK, font)
