"""Closed polygons → the voxels of a plane whose centres lie inside.

Even-odd: a point is inside if a ray from it crosses the edges an odd number of times. So a polygon
within another one is a hole, and so is the inner loop of a keyhole (a ring drawn in one line, its two
ends joined by a bridge). A centre on an edge counts as inside: the mask then does not depend on the
direction in which an axis runs, and contours drawn through the centres of border voxels, as tracing
programs do, give back the mask they were traced from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medseg.data.dicom.painting import Mask
from medseg.geometry import Array

ON_EDGE = 1e-5
"""Distance in voxels at which a centre lies on an edge: rounding, no more, so that neighbours which share
a border do not both claim the voxels along it."""

SAME_OUTLINE = 0.1
"""Mean distance in voxels up to which outlines of the same voxels are one, drawn twice. The two of a ring
whose wall runs between the centres enclose the same voxels as well, but lie farther apart."""

Window = tuple[slice, slice]


def fill(polygons: Sequence[Array], shape: Sequence[int]) -> tuple[Window, Mask]:
    """Voxels inside the polygons, all taken together.

    Args:
        polygons: Corners (N, 2) of each in voxels, (0, 0) being the centre of the first voxel.
        shape: (I, J) of the plane; what lies beyond is cut off.

    Returns:
        The part of the plane that the polygons touch, and the mask of that part.
    """
    window, edges, size = _windowed(polygons, shape)
    return window, _inside(edges, size) | _on_edge(edges, size)


def without_repeats(polygons: Sequence[Array], shape: Sequence[int]) -> list[Array]:
    """Polygons, each once, whatever the points and the direction in which it is drawn again."""
    if len(polygons) == 1:
        return list(polygons)
    kept: list[tuple[Array, Window, Mask]] = []
    for polygon in polygons:
        window, mask = fill([polygon], shape)
        if not any(_is_repeat(polygon, window, mask, *other) for other in kept):
            kept.append((polygon, window, mask))
    return [polygon for polygon, _, _ in kept]


def crossing_voxels(polygons: Sequence[Array], shape: Sequence[int]) -> int:
    """How many voxels lie in two polygons that cross: neither apart nor one within the other."""
    masks: list[tuple[Window, Mask]] = []
    count = 0
    for polygon in polygons:
        window, edges, size = _windowed([polygon], shape)
        mask = _inside(edges, size)
        for other_window, other in masks:
            both = _common(window, mask, other_window, other)
            count += both if both < min(mask.sum(), other.sum()) else 0
        masks.append((window, mask))
    return count


def _windowed(polygons: Sequence[Array], shape: Sequence[int]) -> tuple[Window, Array, npt.NDArray[np.int_]]:
    """The voxels that polygons can touch, their edges (E, 2 ends, 2) seen from there, and its size."""
    corners = np.concatenate(polygons)
    low = np.clip(np.ceil(corners.min(0) - ON_EDGE), 0, shape).astype(int)
    high = np.clip(np.floor(corners.max(0) + ON_EDGE) + 1, low, shape).astype(int)
    edges = np.concatenate([np.stack([p, np.roll(p, -1, axis=0)], axis=1) for p in polygons])
    return (slice(low[0], high[0]), slice(low[1], high[1])), edges - low, high - low


def _is_repeat(a: Array, a_window: Window, a_mask: Mask, b: Array, b_window: Window, b_mask: Mask) -> bool:
    both = _common(a_window, a_mask, b_window, b_mask)
    if not both or not both == a_mask.sum() == b_mask.sum():
        return False
    length = np.linalg.norm(a - np.roll(a, -1, axis=0), axis=1).sum()
    return bool(abs(_area(a) - _area(b)) <= SAME_OUTLINE * length)


def _area(polygon: Array) -> float:
    (x, y), (next_x, next_y) = polygon.T, np.roll(polygon, -1, axis=0).T
    return float(abs((x * next_y - next_x * y).sum()) / 2)


def share_voxels(a: Window, b: Window) -> bool:
    """Whether two parts of a plane overlap."""
    return all(part.start < part.stop for part in _overlap(a, b))


def _overlap(a: Window, b: Window) -> Window:
    (ai, aj), (bi, bj) = a, b
    return slice(max(ai.start, bi.start), min(ai.stop, bi.stop)), slice(max(aj.start, bj.start), min(aj.stop, bj.stop))


def _common(a_window: Window, a: Mask, b_window: Window, b: Mask) -> int:
    """Voxels in both masks."""
    if not share_voxels(a_window, b_window):
        return 0
    shared = _overlap(a_window, b_window)
    parts = [
        mask[tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(shared, window, strict=True))]
        for window, mask in ((a_window, a), (b_window, b))
    ]
    return int((parts[0] & parts[1]).sum())


def _inside(edges: Array, size: npt.NDArray[np.int_]) -> Mask:
    """Even-odd along each line of constant j: an edge toggles every voxel that lies behind it."""
    upward = edges[..., 1].argsort(axis=1)
    (x0, y0), (x1, y1) = np.take_along_axis(edges, upward[..., None], axis=1).transpose(1, 2, 0)
    # the lines y0 <= j < y1: a corner belongs to one of its two edges, so that no line counts it twice
    edge, j = _ranges(np.clip(np.ceil(y0), 0, size[1]), np.clip(np.ceil(y1), 0, size[1]))
    x = x0[edge] + (j - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    i = np.clip(np.ceil(x), 0, size[0]).astype(int)
    toggles = np.bincount(i * size[1] + j, minlength=(size[0] + 1) * size[1]).reshape(size[0] + 1, size[1])
    odd = (toggles[:-1] % 2).astype(np.bool_)
    return np.logical_xor.accumulate(odd, axis=0)


def _on_edge(edges: Array, size: npt.NDArray[np.int_]) -> Mask:
    """Voxels whose centre an edge runs through: found along both axes, so that flat edges are exact too."""
    mask = np.zeros(size, np.bool_)
    for axis, other in ((0, 1), (1, 0)):
        start, end = edges[edges[:, 0, axis] != edges[:, 1, axis]].transpose(1, 0, 2)
        low, high = np.minimum(start, end)[:, axis], np.maximum(start, end)[:, axis]
        edge, at = _ranges(
            np.clip(np.ceil(low - ON_EDGE), 0, size[axis]), np.clip(np.floor(high + ON_EDGE) + 1, 0, size[axis])
        )
        along = ((at - start[edge, axis]) / (end - start)[edge, axis]).clip(0, 1)
        across = start[edge, other] + along * (end - start)[edge, other]
        nearest = np.rint(across).astype(int)
        hit = (np.abs(across - nearest) <= ON_EDGE) & (nearest >= 0) & (nearest < size[other])
        mask[(at[hit], nearest[hit]) if axis == 0 else (nearest[hit], at[hit])] = True
    return mask


def _ranges(first: Array, stop: Array) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
    """All integers of ``range(first[e], stop[e])`` and the e that each belongs to."""
    counts = np.maximum(stop - first, 0).astype(int)
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first.astype(int)[which]
