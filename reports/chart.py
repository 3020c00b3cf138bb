"""Small line charts as SVG text, in the page's own colours (light, dark, print): for run sections, by the hundred.

The figures of a suite are drawn by :mod:`analysis.figures`; these are its sparklines.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 320, 110
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 20
Point = tuple[float, float]


def training_curve(lines: Sequence[Mapping[str, Any]], max_iter: int) -> Markup:
    """Training loss over iterations, an empty text if nothing was logged. Long curves are thinned to 160 points."""
    points = [(float(line["iteration"]), float(line["loss"])) for line in lines if _is_finite_loss(line)]
    if len(points) < 2:
        return Markup("")
    return line_chart(thin(points, 160), max(max_iter, points[-1][0]), "training loss")


def _is_finite_loss(line: Mapping[str, Any]) -> bool:
    loss = line.get("loss")
    return line.get("kind") == "train" and isinstance(loss, int | float) and abs(loss) < 1e30


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
        '<polyline points="{path}"/>'
        '<text x="{t}" y="{top8}" text-anchor="end">{y1}</text><text x="{t}" y="{bottom}" text-anchor="end">{y0}</text>'
        '<text x="{left}" y="{below}">0</text><text x="{right}" y="{below}" text-anchor="end">{x1}</text>'
        '<text x="{middle}" y="{below}" text-anchor="middle">{label}</text></svg>'
    ).format(
        w=WIDTH, h=HEIGHT, label=label, y0=f"{low:.3g}", y1=f"{high:.3g}", left=_LEFT, top=_TOP, bottom=bottom,
        right=right,
        path=path, t=_LEFT - 4, top8=_TOP + 8, below=HEIGHT - 6, x1=f"{x_max:g}", middle=(_LEFT + right) / 2,
    )  # fmt: skip
