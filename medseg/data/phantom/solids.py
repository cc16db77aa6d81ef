"""Solids as formulas: how deep a point lies inside an ellipsoid, a tube or a trunk, and how to combine them.

A formula has no resolution, so the same anatomy can be rendered on any grid, slab by slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Point: TypeAlias = Sequence[float] | Array
Depth: TypeAlias = Callable[[Array, Array, Array], Array]

EVERYWHERE = (math.inf, math.inf, math.inf)

_FIELD_NODES = 48
_SPLINE_STD = 0.33  # of a uniform cubic B-spline in 3D whose coefficients have a standard deviation of 1


@dataclass(frozen=True, eq=False)
class Solid:
    """A shape in millimetres.

    Args:
        depth: Of points given by x, y and z: about the distance to the surface in mm, negative outside.
        low: Lowest corner of a box that holds the shape.
        high: Its highest corner.
    """

    depth: Depth
    low: tuple[float, ...] = (-math.inf, -math.inf, -math.inf)
    high: tuple[float, ...] = EVERYWHERE

    def grown(self, mm: float) -> Solid:
        """The shape with its surface moved outwards; negative: inwards."""
        return Solid(
            lambda x, y, z: self.depth(x, y, z) + mm,
            tuple(a - mm for a in self.low),
            tuple(a + mm for a in self.high),
        )

    def within(self, *others: Solid) -> Solid:
        """What this shape shares with all the others."""

        def depth(x: Array, y: Array, z: Array) -> Array:
            return reduce(np.minimum, (other.depth(x, y, z) for other in others), self.depth(x, y, z))

        low = np.max([self.low, *[other.low for other in others]], axis=0)
        high = np.min([self.high, *[other.high for other in others]], axis=0)
        return Solid(depth, tuple(low), tuple(high))

    def without(self, *others: Solid) -> Solid:
        """This shape less the others."""

        def depth(x: Array, y: Array, z: Array) -> Array:
            return reduce(np.minimum, (-other.depth(x, y, z) for other in others), self.depth(x, y, z))

        return Solid(depth, self.low, self.high)


def merged(*solids: Solid, blend_mm: float = 0.0) -> Solid:
    """The union of shapes; creases are filled over a width of `blend_mm`."""

    def depth(x: Array, y: Array, z: Array) -> Array:
        return reduce(lambda a, b: _smooth_maximum(a, b, blend_mm), (solid.depth(x, y, z) for solid in solids))

    low = np.min([solid.low for solid in solids], axis=0) - blend_mm
    high = np.max([solid.high for solid in solids], axis=0) + blend_mm
    return Solid(depth, tuple(low), tuple(high))


def ellipsoid(center: Point, radii: Point, *, turn_degrees: float = 0.0) -> Solid:
    """An ellipsoid; an infinite radius along z makes it an elliptic cylinder.

    Args:
        center: In mm.
        radii: Semi-axes in mm.
        turn_degrees: Rotation about z, from x (Right) towards y (Anterior).
    """
    cx, cy, cz = map(float, center)  # plain numbers leave the arrays in float32
    a, b, c = map(float, radii)
    cos, sin = math.cos(math.radians(turn_degrees)), math.sin(math.radians(turn_degrees))
    reach = (math.hypot(a * cos, b * sin), math.hypot(a * sin, b * cos), c)

    def depth(x: Array, y: Array, z: Array) -> Array:
        u, v = (x - cx) / a, (y - cy) / b
        if turn_degrees:
            u, v = ((x - cx) * cos + (y - cy) * sin) / a, ((y - cy) * cos - (x - cx) * sin) / b
        u2, v2, w2 = u * u, v * v, np.square((z - cz) / c)
        radius = np.sqrt(u2 + v2 + w2 + 1e-6)
        slope = np.sqrt(u2 / a**2 + v2 / b**2 + w2 / c**2 + 1e-6 / max(a, b) ** 2)
        return (1 - radius) * radius / slope  # first-order distance: value over gradient

    low, high = np.subtract((cx, cy, cz), reach), np.add((cx, cy, cz), reach)
    return Solid(depth, tuple(low), tuple(high))


def tube(points: Sequence[Point] | Array, radii: Point) -> Solid:
    """A tube with rounded ends along straight pieces between points, its radius changing linearly."""
    course = [(*map(float, point), float(radius)) for point, radius in zip(points, radii, strict=True)]

    def depth(x: Array, y: Array, z: Array) -> Array:
        return reduce(np.maximum, (_piece_depth(x, y, z, *ends) for ends in pairwise(course)))

    low = np.min([np.subtract(center, radius) for *center, radius in course], axis=0)
    high = np.max([np.add(center, radius) for *center, radius in course], axis=0)
    return Solid(depth, tuple(low), tuple(high))


def trunk(half_width: float, half_depth: float, *, y: float = 0.0) -> Solid:
    """A cylinder along z with the rounded-rectangle cross-section of a torso, centered on x = 0 and `y`."""

    def depth(x: Array, y_: Array, z: Array) -> Array:
        u2, v2 = np.square(x / half_width), np.square((y_ - y) / half_depth)
        ellipse = u2 + v2
        size = 0.6 * np.sqrt(ellipse) + 0.4 * np.sqrt(np.sqrt(u2 * u2 + v2 * v2)) + 1e-3
        return np.hypot(x, y_ - y) * (1 - size) / size  # along the ray from the axis

    return Solid(depth, (-half_width, y - half_depth, -math.inf), (half_width, y + half_depth, math.inf))


def bent_tube(points: Sequence[Point] | Array, radii: Point) -> Solid:
    """A tube whose bends are rounded: each corner is cut at a quarter of its sides, twice."""
    course = np.column_stack([np.asarray(points, np.float64), radii])
    for _ in range(2):
        cut = np.stack([0.75 * course[:-1] + 0.25 * course[1:], 0.25 * course[:-1] + 0.75 * course[1:]], axis=1)
        course = np.concatenate([course[:1], cut.reshape(-1, 4)[1:-1], course[-1:]])
    return tube(course[:, :3], course[:, 3])


@dataclass(frozen=True, eq=False)
class SmoothField:
    """A random smooth function of space with mean 0 and standard deviation 1, without end (it repeats after 48 nodes).

    Args:
        coefficients: (N, N, N), of a cubic B-spline.
        pitch_mm: Distance of its nodes: the size of the smallest detail.
    """

    coefficients: Array
    pitch_mm: float

    @classmethod
    def random(cls, rng: np.random.Generator, pitch_mm: float) -> SmoothField:
        nodes = rng.standard_normal((_FIELD_NODES,) * 3, dtype=np.float32)
        return cls(nodes.clip(-2.5, 2.5) / np.float32(_SPLINE_STD), pitch_mm)

    def on_grid(self, x: Array, y: Array, z: Array) -> Array:
        """Values (I, J, K) at the crossings of the coordinates x (I,), y (J,), z (K,) in mm.

        Four shifted sums along each axis in turn: only elementwise arithmetic, so the bits depend
        neither on the number of threads nor on how a volume is cut into slabs.
        """
        values = _along_axis(self.coefficients, 2, z / self.pitch_mm)  # (N, N, K)
        values = _along_axis(values, 1, y / self.pitch_mm)  # (N, J, K)
        return _along_axis(values, 0, x / self.pitch_mm)


def _along_axis(values: Array, axis: int, position: Array) -> Array:
    node = np.floor(position)
    t = position - node
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    shape = [1, 1, 1]
    shape[axis] = len(position)
    total: Array | None = None
    for tap, weight in enumerate(weights):
        term = values.take((node.astype(np.int64) + tap - 1) % _FIELD_NODES, axis=axis)
        term *= (weight / 6).astype(np.float32).reshape(shape)
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None
    return total


def _smooth_maximum(a: Array, b: Array, blend_mm: float) -> Array:
    larger = np.maximum(a, b)
    if blend_mm == 0:
        return larger
    return larger + np.square(np.maximum(blend_mm - np.abs(a - b), 0)) / (4 * blend_mm)


def _piece_depth(x: Array, y: Array, z: Array, start: tuple[float, ...], end: tuple[float, ...]) -> Array:
    """Depth in a straight piece between two ends (x, y, z, radius)."""
    ax, ay, az, widening = (b - a for a, b in zip(start, end, strict=True))
    px, py, pz = x - start[0], y - start[1], z - start[2]
    t = ((px * ax + py * ay + pz * az) / (ax * ax + ay * ay + az * az + 1e-9)).clip(0, 1)
    distance = np.sqrt(np.square(px - t * ax) + np.square(py - t * ay) + np.square(pz - t * az))
    return start[3] + t * widening - distance
