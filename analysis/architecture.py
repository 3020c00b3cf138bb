"""The architecture with mask piloting as one SVG, drawn from how the model is built; the parts that a row's toggles
switch on are highlighted, the others of mask piloting are faint.

It shows what the paper's Figures 2 and 3 show: where ground truth enters the decoder, through which noise, and who may
read whom in self-attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _COLUMN, _BOX = 480, 588, 108, 40
_STYLE = (
    ".arch{font:12px system-ui,sans-serif;max-width:36rem;width:100%;height:auto}"
    ".arch rect{fill:var(--panel,#f6f7f9);stroke:var(--muted,#5d6772);rx:4}"
    ".arch text{fill:var(--fg,#1c2126);text-anchor:middle}.arch .note{fill:var(--muted,#5d6772);font-size:11px}"
    ".arch path{fill:none;stroke:var(--muted,#5d6772);stroke-width:1.2}"
    ".arch .head{fill:var(--muted,#5d6772);stroke:none}"
    ".arch .on rect,.arch .on path{stroke:var(--row1,#d55e00);stroke-width:2.2}"
    ".arch .on .head{fill:var(--row1,#d55e00)}.arch .off{opacity:.3}.arch .off rect{stroke-dasharray:4 3}"
    ".arch rect.reads{fill:var(--row0,#0072b2);stroke:var(--bg,#fff)}"
    ".arch rect.blocked{fill:none;stroke:var(--rule,#d5dae0)}"
)


def architecture(toggles: Mapping[str, Any], layers: int) -> str:
    """An SVG element of the model with ``layers`` decoder layers; ``toggles`` are the configuration's, by name."""
    pilot = bool(toggles.get("mp_queries"))
    flip, point = float(toggles.get("flip_noise") or 0), float(toggles.get("point_noise") or 0)
    kind, groups = str(toggles.get("mask_noise", "point")), str(toggles.get("mp_groups", 1))
    embedding = f"{toggles.get('class_embedding', 'label')}, {toggles.get('class_embedding_layers', 'first')} layer"
    of_groups = groups if not groups.isdigit() else f"{groups} group{'' if groups == '1' else 's'}"
    parts = [
        _part("", _box(0, 0, "image") + _box(0, 1, "backbone") + _box(0, 2, "pixel decoder") + _down(0, 0) + _down(0, 1)
              + _arrow(54, 176, 258) + _note(62, 226, "features", "start")),
        _part(_state(pilot), _box(1, 0, "ground-truth", "masks") + _down(1, 0) + _down(1, 1)
              + _box(1, 2, "guided masks", f"layers: {toggles.get('guided_layers', 'every')}") + _arrow(178, 176, 258)),
        _part(_state(pilot and point > 0), _box(1, 1, f"{kind} noise", f"{point:g}" if pilot else "")),
        _part(_state(pilot), _box(2, 0, "ground-truth", "classes") + _down(2, 0) + _down(2, 1)
              + _box(2, 2, "class embedding", embedding) + _arrow(300, 176, 192)
              + _box(2, 3, "piloted queries", of_groups, y=194) + _arrow(300, 234, 244)),
        _part(_state(pilot and flip > 0), _box(2, 1, "flip noise", f"{flip:g}" if pilot else "")),
        _part("", _box(3, 2, "learnable", "queries") + _arrow(422, 176, 244)),
        _part(_state(bool(toggles.get("query_position", True))), _box(3, 1, "query position", "matching part")
              + _down(3, 1)),
        _part("", _decoder(layers)),
        _part(_state(pilot), _box(2, 0, "piloted loss:", "no matching", y=424) + _arrow(300, 374, 422)),
        _part("", _box(3, 0, "matching loss:", "Hungarian", y=424) + _arrow(422, 374, 422)),
        _part(_state(pilot), _readers(int(groups) if groups.isdigit() else 2)),
    ]  # fmt: skip
    label = (
        "Mask2Former" + (" with mask piloting" if pilot else " without mask piloting") + f", {layers} decoder layers"
    )
    return (
        f'<svg class="arch" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}"><style>{_STYLE}</style>{"".join(parts)}</svg>'
    )


def reads(groups: int) -> list[list[bool]]:
    """Who may read whom in self-attention, by part: each piloted group in turn, then the matching part.

    A group reads itself and the matching part; the matching part reads itself alone.
    """
    parts = range(groups + 1)
    return [[reader == read or (read == groups and reader < groups) for read in parts] for reader in parts]


def _state(on: bool) -> str:
    return "on" if on else "off"


def _part(state: str, drawn: str) -> str:
    return f'<g class="{state}">{drawn}</g>' if state else f"<g>{drawn}</g>"


def _box(column: int, row: int, *lines: str, y: int | None = None) -> str:
    """A box of the grid: four columns; rows lie 58 apart unless ``y`` is given."""
    return _rect(8 + column * (_COLUMN + 11), 20 + 58 * row if y is None else y, _COLUMN, _BOX, lines)


def _rect(x: int, y: int, width: int, height: int, lines: Sequence[str]) -> str:
    shown = [line for line in lines if line]
    first = y + height / 2 + 4 - 7.5 * (len(shown) - 1)
    texts = "".join(
        f'<text x="{x + width / 2}" y="{first + 15 * i}"{" class=note" if i else ""}>{escape(line)}</text>'
        for i, line in enumerate(shown)
    ).replace("class=note", 'class="note"')
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}"/>{texts}'


def _note(x: int, y: int, text: str, anchor: str = "middle") -> str:
    return f'<text class="note" x="{x}" y="{y}" style="text-anchor:{anchor}">{escape(text)}</text>'


def _down(column: int, row: int) -> str:
    return _arrow(62 + column * (_COLUMN + 11), 60 + 58 * row, 76 + 58 * row)


def _arrow(x: int, top: int, bottom: int) -> str:
    return f'<path d="M{x} {top}V{bottom - 5}"/>{_head(x, bottom)}'


def _head(x: int, y: int) -> str:
    return f'<path class="head" d="M{x - 4} {y - 7}h8l-4 7z"/>'


def _decoder(layers: int) -> str:
    """The decoder with its loop: a layer's mask is the next one's attention mask, but for guided piloted queries."""
    boxes = (
        _rect(18, 262, 216, 46, ("masked cross-attention", "the queries read the image"))
        + _rect(244, 262, 104, 46, ("self-attention", "as drawn below"))
        + _rect(358, 262, 104, 46, ("feed-forward",))
        + _rect(18, 326, 216, 40, ("masks: query · mask features", "of the pixel decoder, at 1/4"))
        + _rect(244, 326, 218, 40, ("classes",))
    )
    loop = '<path d="M126 326V313"/><path class="head" d="M122 315h8l-4 -7z"/>' + _note(
        134, 321, "the next layer’s attention mask", "start"
    )
    return f'<rect x="8" y="246" width="464" height="128" style="fill:none"/>{boxes}{loop}' + _note(
        10, 388, f"decoder, {layers} layers; a loss after each", "start"
    )


def _readers(groups: int) -> str:
    """The self-attention mask by part (the paper's Figure 3); at most three groups are drawn."""
    shown = min(groups, 3)
    matrix, size = reads(shown), 22
    names = [f"piloted {k + 1}" if shown > 1 else "piloted" for k in range(shown)] + ["matching"]
    left, top = 100, 492
    box = f'width="{size}" height="{size}" style="stroke-width:1;rx:0"'
    cells = "".join(
        f'<rect class="{"reads" if read else "blocked"}" x="{left + size * x}" y="{top + size * y}" {box}/>'
        for y, line in enumerate(matrix)
        for x, read in enumerate(line)
    )
    labels = "".join(_note(left - 6, top + size * y + 15, name, "end") for y, name in enumerate(names))
    words = (
        "Self-attention: a row reads the filled columns,",
        "in the same order. The matching part never",
        "sees the ground truth.",
    )
    texts = "".join(
        _note(left + size * (shown + 1) + 14, top + 16 + 16 * i, line, "start") for i, line in enumerate(words)
    )
    return cells + labels + texts
