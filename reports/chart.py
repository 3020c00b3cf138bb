"""Small line charts as SVG text, in the page's own colours (light, dark, print): for run sections, by the hundred.

The figures of a suite are drawn by :mod:`analysis.figures`; these are its sparklines.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 320, 110
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 20
Point = tuple[float, float]


_SCORES = ("AP", "PQ", "mIoU", "mIoU-L", "Util")


def curves(lines: Sequence[Mapping[str, Any]], max_iter: int) -> tuple[Markup, ...]:
    """Training loss and the scores of the probes over iterations; from the first logged iteration on.

    Long curves are thinned to 160 points.
    """
    train = [line for line in lines if line.get("kind") == "train"]
    probes = [line for line in lines if line.get("kind") == "evaluation" and not line.get("final")]
    found = {"training loss": points(train, "loss")}
    scores = [{**line, **(line.get("metrics") or {})} for line in probes]
    found |= {f"{name} of the probes": points(scores, name) for name in _SCORES}
    drawn = {label: line for label, line in found.items() if line}
    return tuple(line_chart(thin(line, 160), max(max_iter, line[-1][0]), label) for label, line in drawn.items())


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(iteration, value) of the lines whose value is a number that can be drawn."""
    return [(float(line["iteration"]), float(line[key])) for line in lines if _can_be_drawn(line, key)]


def _can_be_drawn(line: Mapping[str, Any], key: str) -> bool:
    value, at = line.get(key), line.get("iteration")
    return isinstance(at, int | float) and isinstance(value, int | float) and abs(value) < 1e30


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points: means of equal blocks."""
    size = -(-len(points) // most)
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks]


def line_chart(points: Sequence[Point], x_max: float, label: str) -> Markup:
    """One line from x = 0 to ``x_max``, with the range of y written at its axis."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    path = " ".join(f"{_LEFT + x / x_max * width:.1f},{_TOP + (high - y) / span * height:.1f}" for x, y in points)
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    # numbers and a caller's constant label only: nothing here needs escaping, and Markup.format escapes all the same
    return Markup(
        '<svg class="spark" viewBox="0 0 {w} {h}" role="img" aria-label="{label} over iterations, {y0} to {y1}">'
        '<path class="axis" d="M{left} {top}V{bottom}H{right}"/>'
        '<polyline points="{path}"/>{dot}'
        '<text x="{t}" y="{top8}" text-anchor="end">{y1}</text><text x="{t}" y="{bottom}" text-anchor="end">{y0}</text>'
        '<text x="{left}" y="{below}">0</text><text x="{right}" y="{below}" text-anchor="end">{x1}</text>'
        '<text x="{middle}" y="{below}" text-anchor="middle">{label}</text></svg>'
    ).format(
        w=WIDTH, h=HEIGHT, label=label, y0=f"{low:.3g}", y1=f"{high:.3g}", left=_LEFT, top=_TOP, bottom=bottom,
        right=right,
        path=path, dot=_dot(path) if len(points) == 1 else "", t=_LEFT - 4, top8=_TOP + 8, below=HEIGHT - 6,
        x1=f"{x_max:g}", middle=(_LEFT + right) / 2,
    )  # fmt: skip


def _dot(place: str) -> Markup:
    """A curve's only point."""
    x, y = place.split(",")
    return Markup('<circle cx="{}" cy="{}" r="2.5"/>').format(x, y)
