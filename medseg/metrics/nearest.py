"""From each marked voxel of a grid to the nearest voxel that is marked in another mask of that grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from edt import edt
from scipy.spatial import cKDTree

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_REACH = 3.2  # voxels of mean size within which neighbors are looked at one by one: 137 of them in 3D
_VOXELS_PER_QUERY = 20  # of a distance transform, in the time that the tree takes to find one neighbor


@dataclass(frozen=True)
class Grid:
    """Voxels in C order, with a rim that holds no marks.

    The rim is as wide as the neighborhood, so that a place in the flat grid plus a step is a place in it too.

    Args:
        inner_shape: Voxels along each axis without the rim.
        spacing_mm: Their size along each axis.
    """

    inner_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]

    @cached_property
    def rim(self) -> tuple[int, ...]:
        return tuple(max(1, math.floor(self._reach_mm / mm)) for mm in self.spacing_mm)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(inner + 2 * rim for inner, rim in zip(self.inner_shape, self.rim, strict=True))

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """How far neighbors along each axis are apart in the flat grid."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @cached_property
    def shells(self) -> list[tuple[float, list[int]]]:
        """Distance in mm, from 0 up, and the steps in the flat grid that lead that far: all up to the reach."""
        steps = np.indices([2 * rim + 1 for rim in self.rim]).reshape(len(self.rim), -1).T - self.rim
        distances_mm = np.sqrt(((steps * self.spacing_mm) ** 2).sum(axis=1))
        reached = np.unique(distances_mm[distances_mm <= self._reach_mm])
        flat = steps @ np.array(self.strides)
        return [(float(mm), flat[distances_mm == mm].tolist()) for mm in reached]

    def with_rim(self, mask: BoolArray) -> BoolArray:
        """A mask of the inner shape as a flat grid."""
        padded = np.zeros(self.shape, dtype=bool)
        padded[tuple(slice(rim, rim + size) for rim, size in zip(self.rim, mask.shape, strict=True))] = mask
        return padded.ravel()

    def positions_mm(self, places: IntArray) -> FloatArray:
        """Where places of the flat grid lie, (N, D)."""
        return np.stack(np.unravel_index(places, self.shape), axis=1) * np.array(self.spacing_mm)

    @property
    def _reach_mm(self) -> float:
        return _REACH * math.prod(self.spacing_mm) ** (1 / len(self.spacing_mm))


def nearest_mm(sources: BoolArray, marked: BoolArray, grid: Grid) -> FloatArray:
    """Distance to the nearest mark.

    Args:
        sources: Where to measure from, the flat grid.
        marked: What to measure to, the flat grid; at least one mark.
        grid: What both lie in.

    Returns:
        Distance in mm of each source, in the order of the grid, (N,).
    """
    places = np.flatnonzero(sources)
    distances_mm = np.empty(len(places))
    left = np.arange(len(places))
    for mm, steps in grid.shells:  # the first hit is the nearest
        at = places[left]
        hit = marked.take(at + steps[0])
        for step in steps[1:]:
            hit |= marked.take(at + step)
        distances_mm[left[hit]] = mm
        left = left[~hit]
        if not len(left):
            return distances_mm
    distances_mm[left] = _far_mm(places[left], marked, grid)
    return distances_mm


def _far_mm(places: IntArray, marked: BoolArray, grid: Grid) -> FloatArray:
    """By a tree of the marks, or where very many are far by a distance transform."""
    if len(places) * _VOXELS_PER_QUERY > marked.size:
        unmarked = ~marked.reshape(grid.shape)
        return edt(unmarked, anisotropy=grid.spacing_mm).ravel()[places].astype(np.float64)
    marks = grid.positions_mm(np.flatnonzero(marked))
    tree = cKDTree(marks, leafsize=32, balanced_tree=False, compact_nodes=False)
    return tree.query(grid.positions_mm(places))[0]
