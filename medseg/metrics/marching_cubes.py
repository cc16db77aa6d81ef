"""How much surface passes between voxels, by which of them belong to the organ.

Four neighbors in 2D, eight in 3D, span a cell whose corners are their centers. The surface passes through the middle of
each of the cell's edges that has one end inside and one outside, as in marching cubes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Corner = tuple[int, ...]
Point = tuple[float, ...]
Segment = tuple[Point, Point]

SQUARE: tuple[Corner, ...] = ((0, 0), (1, 0), (1, 1), (0, 1))
"""Its corners, in the order in which edges join them."""


def element_sizes(spacing_mm: Sequence[float]) -> FloatArray:
    """Size of the surface inside a cell.

    Two opposite corners of a square can be joined or not: here the corners that are fewer in the cell are cut off one
    by one. A polygon that is not flat is divided into the fan of triangles whose area is largest in a cell of equal
    sides. So the sizes are those of Nikolov et al.

    Args:
        spacing_mm: Voxel size along I, J[, K].

    Returns:
        Length in mm or area in mm², (2 ** 2 ** D,), by the sum of ``2 ** number`` over the corners inside, whose number
        is ``i + 2 j [+ 4 k]`` for the corner (i, j[, k]).

    Reference:
        Lorensen and Cline 1987, doi:10.1145/37402.37422; Nikolov et al. 2018, arXiv:1809.04430.
    """
    spacing = np.array(spacing_mm, dtype=np.float64)
    return np.linalg.norm(_normals(len(spacing)) * (math.prod(spacing) / spacing), axis=-1).sum(axis=-1)


@functools.cache  # some 20 ms, the same for every organ and scan
def _normals(spatial_dims: int) -> FloatArray:
    """Normal of each surface element in a cell of unit sides, as long as the element is large, (cells, elements, D)."""
    corners = [corner[::-1] for corner in itertools.product((0, 1), repeat=spatial_dims)]
    cells = []
    for code in range(2 ** len(corners)):
        inside = {corner for number, corner in enumerate(corners) if code >> number & 1}
        few_inside = len(inside) <= len(corners) / 2
        cells.append(_normals_of_cell(inside, spatial_dims, cut_off_inside=few_inside))
    most = max(len(normals) for normals in cells)
    return np.stack([np.pad(normals, ((0, most - len(normals)), (0, 0))) for normals in cells])


def _normals_of_cell(inside: set[Corner], spatial_dims: int, *, cut_off_inside: bool) -> FloatArray:
    if spatial_dims == 2:
        segments = _segments(SQUARE, inside, cut_off_inside=cut_off_inside)
        return np.array([(b[1] - a[1], a[0] - b[0]) for a, b in segments]).reshape(-1, 2)
    segments = [pair for face in _faces() for pair in _segments(face, inside, cut_off_inside=cut_off_inside)]
    return np.concatenate([np.zeros((0, 3)), *(_largest_fan(polygon) for polygon in _polygons(segments))])


def _faces() -> list[list[Corner]]:
    """The six squares that bound a cube."""
    return [
        [(*corner[:axis], side, *corner[axis:]) for corner in SQUARE]
        for axis, side in itertools.product(range(3), (0, 1))
    ]


def _segments(square: Sequence[Corner], inside: set[Corner], *, cut_off_inside: bool) -> list[Segment]:
    """Where the surface crosses a square: nowhere, from one edge to another, or twice."""
    middles = [tuple((a + b) / 2 for a, b in zip(square[n - 1], square[n], strict=True)) for n in range(4)]
    crossed = [n for n in range(4) if (square[n - 1] in inside) != (square[n] in inside)]
    if len(crossed) == 4:  # corner n lies between edges n and n + 1
        return [(middles[n], middles[(n + 1) % 4]) for n in range(4) if (square[n] in inside) == cut_off_inside]
    return [(middles[crossed[0]], middles[crossed[1]])] if crossed else []


def _polygons(segments: Sequence[Segment]) -> Iterator[FloatArray]:
    """The closed polygons that the segments make up, each (corners, 3)."""
    neighbors: dict[Point, list[Point]] = {}
    for a, b in segments:
        neighbors.setdefault(a, []).append(b)
        neighbors.setdefault(b, []).append(a)
    while neighbors:
        polygon = [next(iter(neighbors))]
        while ahead := [point for point in neighbors.pop(polygon[-1]) if point in neighbors]:
            polygon.append(ahead[0])
        yield np.array(polygon)


def _largest_fan(polygon: FloatArray) -> FloatArray:
    """Normals of the triangles between one corner and the sides it does not touch."""
    fans = []
    for shift in range(len(polygon)):
        spokes = np.roll(polygon, shift, axis=0)[1:] - polygon[-shift]
        fans.append(np.cross(spokes[:-1], spokes[1:]) / 2)
    return max(fans, key=lambda fan: np.linalg.norm(fan, axis=1).sum())
