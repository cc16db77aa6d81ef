"""Where a plane of DICOM pixels comes to lie in the array of a voxel grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medseg.data.dicom.painting import Mask, Piece, indices_of
from medseg.geometry import Array, Geometry

GRID_TOLERANCE = 0.1
"""Share of a voxel by which a plane may miss the grid. Positions are decimal text, rounded to 0.01 mm or
finer; a tenth of a voxel is more than rounding does, and less than a study could notice."""


@dataclass(frozen=True)
class Placement:
    """The part of the grid that a plane covers.

    Args:
        normal: Axis of the grid across the plane.
        at: Where on it; may lie beyond its ends.
        axes: Axes along which rows, and columns, follow one another.
        flips: Whether they do so against the axis.
        crop: Rows and columns that are within the grid.
        window: Where on `axes` these go.
    """

    normal: int
    at: int
    axes: tuple[int, int]
    flips: tuple[bool, bool]
    crop: tuple[slice, slice]
    window: tuple[slice, slice]

    def piece(self, number: int, mask: Mask) -> Piece:
        """A mask (rows, columns) of the plane as part of the grid's array."""
        mask = np.flip(mask[self.crop], tuple(axis for axis in (0, 1) if self.flips[axis]))
        index: list[slice | int] = [self.at] * 3
        for axis, part in zip(self.axes, self.window, strict=True):
            index[axis] = part
        return Piece(number, tuple(index), mask if self.axes[0] < self.axes[1] else mask.T)


def place_plane(position: Array, steps: Array, size: tuple[int, int], grid: Geometry) -> Placement | float:
    """Where a plane of pixels lies.

    Args:
        position: Of the first pixel, LPS mm.
        steps: (2, 3): from row to row, and from column to column, LPS mm.
        size: Rows and columns.
        grid: The image's.

    Returns:
        The place; or, if pixels do not lie on voxels, how many mm they are off at a corner.
    """
    last = np.array(size) - 1
    corners = np.array([(0, 0), (0, last[1]), (last[0], 0), last])
    found = indices_of(position + corners @ steps, grid)  # (4, 3)
    origin, *ends = indices_of(np.stack([position, *(position + steps)]), grid)
    units = np.rint(ends - origin).astype(int)  # of a row and of a column, in voxels
    wanted = np.rint(found[0]).astype(int) + corners @ units
    is_along_axes = (np.abs(units).sum(axis=1) == 1).all() and not (units[0] & units[1]).any()
    if not is_along_axes or np.abs(found - wanted).max() > GRID_TOLERANCE:
        nearest = wanted if is_along_axes else np.rint(found)
        return float(np.linalg.norm((found - nearest) @ grid.affine[:3, :3].T, axis=1).max())
    return _cropped(wanted[0], units, size, grid.shape)


def _cropped(start: Array, units: Array, size: tuple[int, int], shape: tuple[int, ...]) -> Placement:
    axes = (int(np.abs(units[0]).argmax()), int(np.abs(units[1]).argmax()))
    flips = (bool(units[0].sum() < 0), bool(units[1].sum() < 0))
    crops, windows = [], []
    for axis, number, flip in zip(axes, size, flips, strict=True):
        first = int(start[axis]) - (number - 1 if flip else 0)
        low, high = (min(max(edge, 0), shape[axis]) for edge in (first, first + number))
        windows.append(slice(low, high))
        crops.append(slice(first + number - high, first + number - low) if flip else slice(low - first, high - first))
    normal = 3 - sum(axes)
    return Placement(normal, int(start[normal]), axes, flips, (crops[0], crops[1]), (windows[0], windows[1]))
