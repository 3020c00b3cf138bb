"""The procedural ``shapes`` images: deterministic by seed on any machine, numpy only.

The class of a thing is its shape, the class of a stuff region its texture; colour carries no class. The images stress
what mask piloting is about: near-identical neighbours compete for queries, large objects are split in two by a bar,
thin and tiny ones vanish at the attention resolution, camouflaged ones wear the texture under them.

Every image has its own random stream, seeded ``[seed, split, index]``, so it depends neither on the order nor on
the number of images. The stream is read through uniform doubles only, and pixels are computed with correctly rounded
operations only (no exp, sin or matrix product on arrays; scalars from :mod:`math` are rounded to a coarse grid), so
that other processors, numpy versions and threads give the same bytes. A change of any pixel must raise
GENERATOR_VERSION.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mpformer.config.datasets import SHAPES_STUFF, SHAPES_THINGS
from mpformer.config.schema import ShapesConfig, plain
from mpformer.data.scene import Scene, Segment

GENERATOR_VERSION = 1
SPLITS = ("train", "val")
#: an object of which less than this share is visible becomes void
MIN_VISIBLE_SHARE = 0.2
#: ... and so does a segment of fewer visible pixels than this
MIN_VISIBLE_PIXELS = 12

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
#: local coordinates (u, v) in pixels from the centre, along the object's own axes -> inside?
Outline = Callable[[Floats, Floats], Bools]
Color = tuple[float, float, float]

_THIN = (SHAPES_THINGS.index("bar"), SHAPES_THINGS.index("worm"))
_LARGE_SPLITTER = _THIN[0]
# cos and sin of multiples of 72 degrees, pointing up; of 120 degrees for the triangle
_PENTAGON = tuple((round(math.sin(0.4 * math.pi * k), 9), round(-math.cos(0.4 * math.pi * k), 9)) for k in range(5))
_TRIANGLE = ((0.0, 1.0), (0.866025404, -0.5), (-0.866025404, -0.5))


def fingerprint(config: ShapesConfig) -> str:
    """The identity of the dataset: sha256 of the generator's version and its parameters; nothing is generated."""
    content = {"name": "shapes", "version": GENERATOR_VERSION, "parameters": plain(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def generate(config: ShapesConfig, split: str, index: int) -> Scene:
    """Draw image ``index`` of ``split`` (``train`` or ``val``); a pure function of its arguments."""
    draw = Draw([config.seed, SPLITS.index(split), index])
    canvas = _Canvas.with_stuff(config, draw)
    _draw_lines(canvas, draw, config.clutter)
    for thing in _plan_things(config, draw, canvas):
        canvas.paint(thing)
    _draw_specks(canvas, draw, config.clutter)
    return canvas.finish(_lens(canvas.image, config, draw))


class Draw:
    """Random numbers that every numpy gives alike: PCG64 doubles, and what can be made of them exactly."""

    def __init__(self, seed: list[int]) -> None:
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._random.random()

    def array(self, *shape: int) -> Floats:
        return self._random.random(shape)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def choice(self, n: int) -> int:
        return min(int(self._random.random() * n), n - 1)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.choice(high - low + 1)

    def log_uniform(self, low: float, high: float) -> float:
        return _coarse(low * math.exp(math.log(high / low) * self._random.random()))

    def direction(self) -> tuple[float, float]:
        angle = 2 * math.pi * self._random.random()
        return _coarse(math.cos(angle)), _coarse(math.sin(angle))

    def color(self, low: float = 40, high: float = 215) -> Color:
        return self.uniform(low, high), self.uniform(low, high), self.uniform(low, high)


def _coarse(value: float) -> float:
    """Round to a grid of 2^-20, so that the last bit of the C library's functions does not matter."""
    return round(value * 1048576) / 1048576


@dataclass(frozen=True)
class _Texture:
    """A stuff class with everything drawn that its pixels depend on."""

    kind: int
    colors: tuple[Color, Color]
    period: float
    direction: tuple[float, float]
    phase: tuple[float, float]
    lattice: Floats = field(repr=False)

    def render(self, x: Floats, y: Floats, shift: tuple[float, float] = (0.0, 0.0)) -> Floats:
        """Colours (n, 3) at n pixel positions x, y."""
        c, s = self.direction
        u = (x * c + y * s) / self.period + self.phase[0] + shift[0]
        v = (y * c - x * s) / self.period + self.phase[1] + shift[1]
        return _blend(self.colors, _PATTERNS[self.kind](u, v, self.lattice))


def _blend(colors: tuple[Color, Color], share: Floats) -> Floats:
    low, high = colors
    return np.stack([a + (b - a) * share for a, b in zip(low, high, strict=True)], axis=-1)


def _triangle_wave(u: Floats) -> Floats:
    return np.abs(2 * (u - np.floor(u)) - 1)


def _contrast(wave: Floats) -> Floats:
    return np.clip((wave - 0.5) * 3 + 0.5, 0, 1)


def _stripes(u: Floats, v: Floats, lattice: Floats) -> Floats:
    return _contrast(_triangle_wave(u))


def _checks(u: Floats, v: Floats, lattice: Floats) -> Floats:
    a, b = 4 * _triangle_wave(u * 0.6) - 2, 4 * _triangle_wave(v * 0.6) - 2
    return np.clip(a * b * 2 + 0.5, 0, 1)


def _dots(u: Floats, v: Floats, lattice: Floats) -> Floats:
    du, dv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return np.clip((0.30 - np.sqrt(du * du + dv * dv)) * 6 + 0.5, 0, 1)


def _mottle(u: Floats, v: Floats, lattice: Floats) -> Floats:
    return _contrast(0.7 * _value_noise(u * 0.7, v * 0.7, lattice) + 0.3 * _value_noise(u * 1.6, v * 1.6, lattice))


def _value_noise(u: Floats, v: Floats, lattice: Floats) -> Floats:
    n = len(lattice)
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    a, b = iu.astype(np.int64) % n, iv.astype(np.int64) % n
    a1, b1 = (a + 1) % n, (b + 1) % n
    top = lattice[a, b] * (1 - fu) + lattice[a1, b] * fu
    bottom = lattice[a, b1] * (1 - fu) + lattice[a1, b1] * fu
    return top * (1 - fv) + bottom * fv


_PATTERNS = {0: _stripes, 1: _checks, 2: _dots, 3: _mottle}
assert [f.__name__[1:] for f in _PATTERNS.values()] == list(SHAPES_STUFF)


def _draw_texture(kind: int, draw: Draw, unit: float) -> _Texture:
    base = draw.color(55, 200)
    contrast = draw.uniform(28, 60) * (1 if draw.chance(0.5) else -1)
    tilt = (draw.uniform(-14, 14), draw.uniform(-14, 14), draw.uniform(-14, 14))
    other = tuple(min(max(b + contrast + t, 20.0), 235.0) for b, t in zip(base, tilt, strict=True))
    period = max(5.0, draw.uniform(7, 11) * unit)
    phase = (draw.uniform(), draw.uniform())
    return _Texture(kind, (base, other), period, draw.direction(), phase, draw.array(16, 16))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Thing:
    """One object before it is painted. Lengths in pixels; a pose is a centre and the direction of its own x axis."""

    category: int
    outline: Outline
    extent: float
    center: tuple[float, float]
    direction: tuple[float, float]
    color: Color
    shading: tuple[float, float]
    rim: float
    camouflage: bool
    shift: tuple[float, float]


@dataclass
class _Canvas:
    """The image so far (H, W, 3), the id map (H, W), and the segments with the area that each would have unhidden."""

    image: Floats
    ids: NDArray[np.int32]
    textures: list[_Texture]
    regions: NDArray[np.int64]
    segments: list[Segment]
    areas: list[int]

    @classmethod
    def with_stuff(cls, config: ShapesConfig, draw: Draw) -> "_Canvas":
        kinds = _shuffled(draw, len(SHAPES_STUFF))[: draw.between(2, 4)]
        unit = config.side / 128
        textures = [_draw_texture(kind, draw, unit) for kind in kinds]
        regions = _partition(config.side, len(kinds), draw)
        image = np.zeros((config.side, config.side, 3))
        for i, texture in enumerate(textures):
            row, column = np.nonzero(regions == i)
            image[row, column] = texture.render(_centers(column), _centers(row))
        segments = [Segment(i + 1, len(SHAPES_THINGS) + kind, False) for i, kind in enumerate(kinds)]
        return cls(image, (regions + 1).astype(np.int32), textures, regions, segments, [0] * len(kinds))

    def paint(self, thing: _Thing) -> None:
        side = len(self.ids)
        cx, cy = thing.center
        x0, x1 = math.floor(cx - thing.extent) - 1, math.ceil(cx + thing.extent) + 2
        y0, y1 = math.floor(cy - thing.extent) - 1, math.ceil(cy + thing.extent) + 2
        x, y = _grid(x0, x1, y0, y1)
        u, v = _local(x, y, thing.center, thing.direction)
        inside = thing.outline(u, v)
        rows, columns = slice(max(y0, 0), min(y1, side)), slice(max(x0, 0), min(x1, side))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        crop = (slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0))
        shown = inside[crop]
        row, column = np.nonzero(shown)
        pixels = self._surface(thing, x[0, crop[1]][column], y[crop[0], 0][row], u[crop][shown], v[crop][shown])
        pixels *= np.where(_eroded(inside)[crop][shown], 1.0, thing.rim)[:, None]
        self.image[rows, columns][shown] = pixels
        self.segments.append(Segment(len(self.segments) + 1, thing.category, True))
        self.areas.append(int(inside.sum()))
        self.ids[rows, columns][shown] = self.segments[-1].id

    def _surface(self, thing: _Thing, x: Floats, y: Floats, u: Floats, v: Floats) -> Floats:
        if thing.camouflage:
            side = len(self.ids)
            column, row = (min(max(int(c), 0), side - 1) for c in thing.center)
            return self.textures[self.regions[row, column]].render(x, y, thing.shift)
        shade = (u * thing.shading[0] + v * thing.shading[1]) / thing.extent
        return np.stack([c + shade for c in thing.color], axis=-1)

    def finish(self, image: NDArray[np.uint8]) -> Scene:
        """Void what is hardly visible, drop what is not visible at all, number the rest from 1."""
        visible = np.bincount(self.ids.ravel(), minlength=len(self.segments) + 1)
        kept: list[Segment] = []
        hidden: list[tuple[int, Bools]] = []
        renumber = np.zeros(len(self.segments) + 1, dtype=np.int32)
        for segment, area in zip(self.segments, self.areas, strict=True):
            seen = int(visible[segment.id])
            if seen >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area):
                kept.append(Segment(len(kept) + 1, segment.category, segment.thing))
                renumber[segment.id] = len(kept)
            elif seen and segment.thing:
                hidden.append((segment.category, self.ids == segment.id))
        return Scene(image, renumber[self.ids], tuple(kept), tuple(hidden))


def _shuffled(draw: Draw, n: int) -> list[int]:
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = draw.choice(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def _grid(x0: int, x1: int, y0: int, y1: int) -> tuple[Floats, Floats]:
    """Pixel centres as a row of x (1, W) and a column of y (H, 1)."""
    return _centers(np.arange(x0, x1))[None, :], _centers(np.arange(y0, y1))[:, None]


def _centers(index: NDArray[np.int64]) -> Floats:
    return index.astype(np.float64) + 0.5


def _local(x: Floats, y: Floats, center: tuple[float, float], direction: tuple[float, float]) -> tuple[Floats, Floats]:
    c, s = direction
    dx, dy = x - center[0], y - center[1]
    return dx * c + dy * s, dy * c - dx * s


def _eroded(mask: Bools) -> Bools:
    """Pixels whose four neighbours are inside too; the margin of the bounding box is outside."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return inner


def _partition(side: int, n: int, draw: Draw) -> NDArray[np.int64]:
    """(side, side) region numbers: nearest of n scattered points, with wavy borders."""
    points = [(draw.uniform(0, side), draw.uniform(0, side))]
    while len(points) < n:
        candidates = [(draw.uniform(0, side), draw.uniform(0, side)) for _ in range(6)]
        points.append(max(candidates, key=lambda p: min((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 for q in points)))
    x, y = _grid(0, side, 0, side)
    amplitude, period = draw.uniform(0.02, 0.07) * side, draw.uniform(0.3, 0.6) * side
    warped_x = x + amplitude * _smooth_wave(y / period + draw.uniform())
    warped_y = y + amplitude * _smooth_wave(x / period + draw.uniform())
    distances = [(warped_x - px) ** 2 + (warped_y - py) ** 2 for px, py in points]
    return np.argmin(np.stack(distances), axis=0)


def _smooth_wave(u: Floats) -> Floats:
    """A sine made of parabolas, period 1, between -1 and 1."""
    t = 2 * (u - np.floor(u)) - 1
    return 4 * t * (1 - np.abs(t))


# --- outlines -------------------------------------------------------------------------------------------------


def _disc(r: float, draw: Draw) -> tuple[Outline, float]:
    return lambda u, v: u * u + v * v <= r * r, r


def _square(r: float, draw: Draw) -> tuple[Outline, float]:
    h = 0.886 * r
    return lambda u, v: (np.abs(u) <= h) & (np.abs(v) <= h), 1.415 * h


def _triangle(r: float, draw: Draw) -> tuple[Outline, float]:
    h = 0.7 * r

    def inside(u: Floats, v: Floats) -> Bools:
        sides = [a * u + b * v <= h for a, b in _TRIANGLE]
        return sides[0] & sides[1] & sides[2]

    return inside, 2 * h


def _star(r: float, draw: Draw) -> tuple[Outline, float]:
    """A pentagram is where at most one of the pentagon's five sides is overstepped."""
    outer = 1.45 * r
    h = 0.309017 * outer

    def inside(u: Floats, v: Floats) -> Bools:
        over = [(a * u - b * v < -h).astype(np.int8) for a, b in _PENTAGON]
        return over[0] + over[1] + over[2] + over[3] + over[4] <= 1

    return inside, outer


def _ring(r: float, draw: Draw) -> tuple[Outline, float]:
    inner = draw.uniform(0.42, 0.55) * r

    def inside(u: Floats, v: Floats) -> Bools:
        d = u * u + v * v
        return (d <= r * r) & (d >= inner * inner)

    return inside, r


def _cross(r: float, draw: Draw) -> tuple[Outline, float]:
    length, h = 1.15 * r, draw.uniform(0.32, 0.42) * r

    def inside(u: Floats, v: Floats) -> Bools:
        a, b = np.abs(u), np.abs(v)
        return ((a <= h) & (b <= length)) | ((b <= h) & (a <= length))

    return inside, 1.2 * length


def _bar_of(length: float, h: float) -> tuple[Outline, float]:
    return lambda u, v: (np.abs(u) <= length) & (np.abs(v) <= h), length + h


def _bar(r: float, draw: Draw) -> tuple[Outline, float]:
    return _bar_of(1.5 * r, _half_thickness(r, draw))


def _worm(r: float, draw: Draw) -> tuple[Outline, float]:
    """An S of ten capsules along a cubic."""
    length, h, bend = 1.45 * r, _half_thickness(r, draw), draw.uniform(0.9, 1.4)
    knots = [(k / 5 - 1, bend * ((k / 5 - 1) ** 3 - (k / 5 - 1))) for k in range(11)]
    points = [(length * a, length * b) for a, b in knots]

    def inside(u: Floats, v: Floats) -> Bools:
        near = np.zeros(np.broadcast_shapes(u.shape, v.shape), dtype=bool)
        for start, end in pairwise(points):
            near |= _capsule(u, v, start, end, h)
        return near

    return inside, 1.1 * length + h


def _half_thickness(r: float, draw: Draw) -> float:
    return max(1.5, draw.uniform(0.16, 0.26) * r)


def _capsule(u: Floats, v: Floats, start: tuple[float, float], end: tuple[float, float], h: float) -> Bools:
    """Pixels within h of the segment from start to end."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    du, dv = u - start[0], v - start[1]
    along = np.clip((du * ex + dv * ey) / (ex * ex + ey * ey), 0, 1)
    du, dv = du - along * ex, dv - along * ey
    return du * du + dv * dv <= h * h


_OUTLINES = {0: _disc, 1: _square, 2: _triangle, 3: _star, 4: _ring, 5: _cross, 6: _bar, 7: _worm}
assert [f.__name__[1:] for f in _OUTLINES.values()] == list(SHAPES_THINGS)


# --- the composition ------------------------------------------------------------------------------------------


def _plan_things(config: ShapesConfig, draw: Draw, canvas: _Canvas) -> list[_Thing]:
    """Objects in painting order: large ones (with the bars that split them) behind the groups of small ones.

    A group is 2-5 neighbours with probability ``crowding``, else one large object (so that ``large`` is the share of
    all groups, as far as ``crowding`` leaves room), else one small object. ``thin`` is the share of groups of small
    objects that are bars or worms.
    """
    behind: list[_Thing] = []
    front: list[_Thing] = []
    centers: list[tuple[float, float]] = []
    for _ in range(draw.between(2, 5)):
        crowded = draw.chance(config.crowding)
        large = draw.chance(config.large / max(config.large, 1 - config.crowding, 1e-9))
        center = _free_place(config.side, centers, draw)
        centers.append(center)
        if large and not crowded:
            behind += _large(config, draw, center, canvas)
        else:
            front += _group(config, draw, center, canvas, draw.between(2, 5) if crowded else 1)
    return behind + front


def _free_place(side: int, taken: list[tuple[float, float]], draw: Draw) -> tuple[float, float]:
    """Of three places the one farthest from what is there."""
    places = [(draw.uniform(0.08, 0.92) * side, draw.uniform(0.08, 0.92) * side) for _ in range(3)]
    return max(places, key=lambda p: min(((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 for q in taken), default=0.0))


def _large(config: ShapesConfig, draw: Draw, center: tuple[float, float], canvas: _Canvas) -> list[_Thing]:
    r = draw.log_uniform(0.25, 0.42) * config.side
    solid = SHAPES_THINGS.index(config.solids[draw.choice(len(config.solids))])
    large = _one(config, draw, solid, r, center, canvas)
    outline, extent = _bar_of(1.6 * r, draw.uniform(0.05, 0.09) * r + 1.5)
    bar = _one(config, draw, _LARGE_SPLITTER, r, center, canvas)
    offset = draw.uniform(-0.3, 0.3) * r
    c, s = bar.direction
    moved = (center[0] - s * offset, center[1] + c * offset)
    splitter = replace(bar, outline=outline, extent=extent, center=moved)
    return [large, splitter] if draw.chance(config.split) else [large]


def _group(config: ShapesConfig, draw: Draw, center: tuple[float, float], canvas: _Canvas, count: int) -> list[_Thing]:
    """``count`` near-identical neighbours, -2 ... 3 px apart."""
    kinds = _THIN if draw.chance(config.thin) else tuple(map(SHAPES_THINGS.index, config.solids))
    category = kinds[draw.choice(len(kinds))]
    r = draw.log_uniform(0.10 - 0.05 * config.tiny, 0.16) * config.side
    first = _one(config, draw, category, r, center, canvas)
    things = [first]
    while len(things) < count:
        size = r * draw.uniform(0.95, 1.05)
        place = _beside(things, _reach(first, r), config.side, draw)
        things.append(_alike(first, _OUTLINES[category](size, draw), place, draw))
    return things


def _reach(thing: _Thing, r: float) -> tuple[float, bool]:
    """Half the distance at which a neighbour touches, and whether it lies beside the long axis (thin things)."""
    return (0.35 * r, True) if thing.category in _THIN else (r, False)


def _beside(things: list[_Thing], reach: tuple[float, bool], side: int, draw: Draw) -> tuple[float, float]:
    """A place next to one of the group's members, of several the one with most room, inside the image if any is."""
    half, beside_axis = reach
    anchor = things[draw.choice(len(things))]
    candidates = []
    for _ in range(6):
        c, s = draw.direction()
        if beside_axis:
            sign = 1.0 if draw.chance(0.5) else -1.0
            c, s = -sign * anchor.direction[1], sign * anchor.direction[0]
        distance = 2 * half + draw.uniform(-2, 3)
        candidates.append((anchor.center[0] + c * distance, anchor.center[1] + s * distance))
    margin = 0.02 * side
    inside = [p for p in candidates if all(margin < c < side - margin for c in p)]
    return max(inside or candidates, key=lambda p: _room(p, things))


def _room(place: tuple[float, float], things: list[_Thing]) -> float:
    return min((place[0] - t.center[0]) ** 2 + (place[1] - t.center[1]) ** 2 for t in things)


def _one(
    config: ShapesConfig, draw: Draw, category: int, r: float, center: tuple[float, float], canvas: _Canvas
) -> _Thing:
    outline, extent = _OUTLINES[category](r, draw)
    shading = (draw.uniform(-22, 22), draw.uniform(-22, 22))
    shift = (draw.uniform(0.35, 0.65), draw.uniform(0.35, 0.65))
    camouflage = draw.chance(config.camouflage)
    color, rim = _distinct_color(center, canvas, draw), draw.uniform(0.5, 0.78)
    return _Thing(category, outline, extent, center, draw.direction(), color, shading, rim, camouflage, shift)


def _distinct_color(center: tuple[float, float], canvas: _Canvas, draw: Draw) -> Color:
    """A colour that differs from the ground's two, unlike camouflage."""
    side = len(canvas.ids)
    column, row = (min(max(int(c), 0), side - 1) for c in center)
    ground = canvas.textures[canvas.regions[row, column]].colors
    candidates = [draw.color(35, 225) for _ in range(4)]
    return max(candidates, key=lambda c: min(sum(abs(a - b) for a, b in zip(c, g, strict=True)) for g in ground))


def _alike(first: _Thing, shape: tuple[Outline, float], center: tuple[float, float], draw: Draw) -> _Thing:
    """A near-identical neighbour: slightly other colour and direction."""
    r, g, b = (c + draw.uniform(-6, 6) for c in first.color)
    c, s = first.direction
    turn = draw.uniform(-0.12, 0.12)
    norm = math.sqrt(1 + turn * turn)
    direction = ((c - s * turn) / norm, (s + c * turn) / norm)
    return replace(first, outline=shape[0], extent=shape[1], center=center, color=(r, g, b), direction=direction)


def _draw_lines(canvas: _Canvas, draw: Draw, amount: float) -> None:
    """Unlabelled thin lines under the things."""
    side = len(canvas.ids)
    for _ in range(int(amount * draw.uniform(0, 5))):
        start = (draw.uniform(0, side), draw.uniform(0, side))
        c, s = draw.direction()
        length = draw.uniform(0.06, 0.25) * side
        _stain(canvas, start, (start[0] + c * length, start[1] + s * length), 0.6, draw.color())


def _draw_specks(canvas: _Canvas, draw: Draw, amount: float) -> None:
    """Unlabelled specks on everything."""
    side = len(canvas.ids)
    for _ in range(int(amount * draw.uniform(0, 16))):
        start = (draw.uniform(0, side), draw.uniform(0, side))
        _stain(canvas, start, (start[0] + 0.5, start[1]), draw.uniform(0.5, 1.4), draw.color(20, 235))


def _stain(canvas: _Canvas, start: tuple[float, float], end: tuple[float, float], h: float, color: Color) -> None:
    side = len(canvas.ids)
    x0, x1 = (int(f(start[0], end[0])) for f in (min, max))
    y0, y1 = (int(f(start[1], end[1])) for f in (min, max))
    x0, x1, y0, y1 = max(x0 - 3, 0), min(x1 + 4, side), max(y0 - 3, 0), min(y1 + 4, side)
    x, y = _grid(x0, x1, y0, y1)
    canvas.image[y0:y1, x0:x1][_capsule(x, y, start, end, h)] = color


def _lens(image: Floats, config: ShapesConfig, draw: Draw) -> NDArray[np.uint8]:
    """Blur, exposure, noise, rounding."""
    blur = config.blur * draw.uniform(0.3, 1)
    image = image + blur * (_binomial(_binomial(image, 0), 1) - image)
    image = image * draw.uniform(0.85, 1.1) + draw.uniform(-10, 10)
    sigma = config.noise * draw.uniform(2, 10)
    u = draw.array(3, *image.shape)
    image = image + sigma * (2 * (u[0] + u[1] + u[2]) - 3)
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def _binomial(image: Floats, axis: int) -> Floats:
    """Weights 1/4, 1/2, 1/4 along an axis, the border repeated."""
    image = np.moveaxis(image, axis, 0)
    before, after = np.concatenate([image[:1], image[:-1]]), np.concatenate([image[1:], image[-1:]])
    return np.moveaxis((before + after) * 0.25 + image * 0.5, 0, axis)
