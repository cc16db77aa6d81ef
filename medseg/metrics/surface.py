"""How far the surfaces of two masks lie apart, and which part of a scan holds an organ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError
from medseg.metrics.marching_cubes import element_sizes
from medseg.metrics.nearest import Grid, nearest_mm
from medseg.metrics.stretches import LabelMap, first_axis_is_fastest, stretches

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Box = tuple[slice, ...]

_ROUNDING_MM = 1e-5  # of distances: two voxels of 0.7 mm apart is within 1.4 mm
_CHUNK = 2**17  # voxels whose neighbors are looked at together: what fits the processor's cache


def surface_distances(reference: BoolArray, prediction: BoolArray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Compare the surfaces of two masks.

    Nothing beyond the masks' common bounding box is looked at, so they may be cropped to it or not. Beyond the image
    there is no organ: a mask that touches the image's border has a surface there.

    Args:
        reference: What an expert drew, (I, J[, K]).
        prediction: What is to be scored; same shape.
        spacing_mm: Voxel size along I, J[, K].

    Returns:
        The distances, computed when asked for.

    Raises:
        GeometryError: If the shapes differ, or do not go with the spacing.
    """
    if reference.shape != prediction.shape:
        raise GeometryError(
            "E-PAIR-SHAPE",
            f"the prediction's mask has {prediction.shape} voxels, the reference's {reference.shape}; "
            "resample one to the other's grid",
        )
    if (
        reference.ndim not in (2, 3)
        or len(spacing_mm) != reference.ndim
        or not all(0 < mm < math.inf for mm in spacing_mm)
    ):
        raise GeometryError(
            "E-SPACING",
            f"spacing {tuple(spacing_mm)} mm of masks of {reference.shape} voxels; expected 2 or 3 axes, "
            "each with a size above 0; pass one image without channels, and its spacing",
        )
    box = common_box(reference, prediction)
    spacing = tuple(float(mm) for mm in spacing_mm)
    if first_axis_is_fastest(reference, prediction):  # no distance depends on the order of the axes
        return SurfaceDistances(reference[box].T, prediction[box].T, spacing[::-1])
    return SurfaceDistances(reference[box], prediction[box], spacing)


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Two masks, and what the distances between their surfaces add up to; `surface_distances` makes it.

    Hausdorff and average distances are those from voxel to voxel: a surface voxel is one of the organ with a neighbor
    outside, of the 4 or 6 that share a side with it; each counts once. That is MONAI's definition.

    Args:
        reference: What an expert drew, (I, J[, K]); fast where the last axis lies closest in memory.
        prediction: What is to be scored; same shape.
        spacing_mm: Voxel size along I, J[, K].
    """

    reference: BoolArray
    prediction: BoolArray
    spacing_mm: tuple[float, ...]

    def hausdorff(self, percentile: float = 100) -> float:
        """The largest distance from either surface to the other, or the larger of the two percentiles.

        DeepMind's surface-distance weighs its percentiles by area, and measures from corner to corner of the voxels.
        SimpleITK's filter has these values of contours; given masks, it measures from mask to mask instead. Of a block
        of 11 voxels and the same one without its middle voxel the distance is 4 here, there 5 and 1.

        Args:
            percentile: 95 for HD95; in (0, 100], between two distances on the line that joins them.

        Returns:
            Distance in mm; NaN if a mask is empty.

        Reference:
            Huttenlocher et al. 1993, doi:10.1109/34.232073.
        """
        if not self._both_present:
            return math.nan
        return max(float(np.percentile(mm, percentile)) for mm in self._voxel_distances)

    def average(self) -> float:
        """Average symmetric surface distance: the mean over the voxels of both surfaces.

        Others, SimpleITK's filter of contours among them, take the mean of each surface first and then that of the two:
        the same where both surfaces have as many voxels, 1.06 for 1.08 where a block of 6 voxels grew to 8. DeepMind's
        surface-distance has two means, weighed by area: 1 and 1.07.

        Returns:
            Distance in mm; NaN if a mask is empty.

        Reference:
            Heimann et al. 2009, doi:10.1109/TMI.2009.2013851.
        """
        return float(np.concatenate(self._voxel_distances).mean()) if self._both_present else math.nan

    def surface_dice(self, tolerance_mm: float, *, by_area: bool = True) -> float:
        """The part of both surfaces that lies within a tolerance of the other one.

        The surface is the one between the voxels, as marching cubes finds it, in elements that count by their area in
        mm² (in 2D by their length); distances are those from element to element. This is the definition of Nikolov et
        al. and their program, surface-distance, and MONAI's with ``use_subvoxels``. Without ``by_area`` it is what MONAI
        computes otherwise: the surface voxels are counted, whatever their orientation and spacing, which favors
        directions along which voxels are small, and lets diagonal surfaces weigh less than they are large.

        Args:
            tolerance_mm: Largest distance that counts as agreement.
            by_area: Weigh elements by area rather than count surface voxels.

        Returns:
            Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

        Reference:
            Nikolov et al. 2018, arXiv:1809.04430.
        """
        if not self._both_present:
            return 0.0 if self.reference.any() or self.prediction.any() else math.nan
        limit_mm = tolerance_mm + _ROUNDING_MM
        if not by_area:
            return float((np.concatenate(self._voxel_distances) <= limit_mm).mean())
        areas, distances = self._element_distances
        return float(areas[distances <= limit_mm].sum() / areas.sum())

    @cached_property
    def _both_present(self) -> bool:
        return bool(self.reference.any() and self.prediction.any())

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.reference.shape, self.spacing_mm)

    @cached_property
    def _voxel_distances(self) -> tuple[FloatArray, FloatArray]:
        """In mm, from each surface voxel of the reference to the prediction's surface, and the other way around."""
        grid = self._grid
        reference, prediction = (
            _surface_voxels(grid.with_rim(mask), grid) for mask in (self.reference, self.prediction)
        )
        return nearest_mm(reference, prediction, grid), nearest_mm(prediction, reference, grid)

    @cached_property
    def _element_distances(self) -> tuple[FloatArray, FloatArray]:
        """Of the elements of both surfaces: areas in mm² (in 2D lengths in mm), distances in mm to the other surface."""
        grid, sizes = self._grid, element_sizes(self.spacing_mm)
        codes = [_cell_codes(grid.with_rim(mask), grid) for mask in (self.reference, self.prediction)]
        reference, prediction = ((code > 0) & (code < len(sizes) - 1) for code in codes)
        areas = sizes[codes[0][reference]], sizes[codes[1][prediction]]
        distances = nearest_mm(reference, prediction, grid), nearest_mm(prediction, reference, grid)
        return np.concatenate(areas), np.concatenate(distances)


def common_box(reference: BoolArray, prediction: BoolArray) -> Box:
    """The box of `bounding_boxes` that holds both of two masks."""
    (box,) = bounding_boxes(reference.view(np.uint8), prediction.view(np.uint8), {"": (1,)}).values()
    return box


def bounding_boxes(reference: LabelMap, prediction: LabelMap, organs: Mapping[str, Sequence[int]]) -> dict[str, Box]:
    """Where each organ lies in either of two label maps, found in one pass for all organs.

    Args:
        reference: Label map of any shape.
        prediction: Label map of the same shape.
        organs: Label values that make up each organ; organs may share values.

    Returns:
        For each organ, in the order given, the smallest box that holds it in both maps, and a voxel more on each side
        where the image has one; a box without voxels where the organ is in neither.
    """
    if first_axis_is_fastest(reference, prediction):
        boxes = bounding_boxes(reference.T, prediction.T, organs)
        return {organ: box[::-1] for organ, box in boxes.items()}
    values = np.array(sorted({value for united in organs.values() for value in united}), dtype=np.int64)
    low, high = _extents(reference, prediction, values)
    boxes = {}
    for organ, united in organs.items():
        rows = np.isin(values, united) & (low <= high).all(axis=1)
        if not rows.any():
            boxes[organ] = (slice(0, 0),) * reference.ndim
            continue
        first, last = low[rows].min(axis=0) - 1, high[rows].max(axis=0) + 1
        boxes[organ] = tuple(
            slice(max(0, int(a)), min(n, int(b) + 1)) for a, b, n in zip(first, last, reference.shape, strict=True)
        )
    return boxes


def _extents(reference: LabelMap, prediction: LabelMap, values: IntArray) -> tuple[IntArray, IntArray]:
    """First and last place of each value in either map, along each axis, (values, D) each."""
    shape = reference.shape
    low = np.full((len(values), len(shape)), max(shape, default=0))
    high = np.full_like(low, -1)
    flat = reference.ravel(), prediction.ravel()
    for starts, ends in stretches(*flat):
        labels = np.concatenate([labels[starts] for labels in flat])
        rows = np.searchsorted(values, labels)
        wanted = np.flatnonzero(rows < np.searchsorted(values, labels, side="right"))
        by_row = wanted[np.argsort(rows[wanted], kind="stable")]
        found, groups = np.unique(rows[by_row], return_index=True)
        if not len(found):
            continue
        stretch = by_row % len(starts)
        for axis in range(len(shape)):
            first, last = _places_along(axis, starts[stretch], ends[stretch] - 1, shape)
            low[found, axis] = np.minimum(low[found, axis], np.minimum.reduceat(first, groups))
            high[found, axis] = np.maximum(high[found, axis], np.maximum.reduceat(last, groups))
    return low, high


def _places_along(axis: int, starts: IntArray, lasts: IntArray, shape: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """Lowest and highest index that flat stretches have along an axis."""
    size, below = shape[axis], math.prod(shape[axis + 1 :])
    starts, lasts = starts // below, lasts // below
    over_the_end = starts // size != lasts // size  # it goes on at the beginning, one further along an axis before
    return np.where(over_the_end, 0, starts % size), np.where(over_the_end, size - 1, lasts % size)


def _surface_voxels(mask: BoolArray, grid: Grid) -> BoolArray:
    """Voxels of a flat mask with a neighbor outside, among those that share a side with it."""
    surface = mask.copy()
    rim = grid.strides[0]  # nothing is marked nearer the ends
    for start in range(rim, len(mask) - rim, _CHUNK):
        end = min(start + _CHUNK, len(mask) - rim)
        inner = mask[start - rim : end - rim] & mask[start + rim : end + rim]
        for step in grid.strides[1:]:
            inner &= mask[start - step : end - step]
            inner &= mask[start + step : end + step]
        surface[start:end] &= ~inner
    return surface


def _cell_codes(mask: BoolArray, grid: Grid) -> npt.NDArray[np.uint8]:
    """Which corners of each cell are inside, as `element_sizes` numbers them; a cell has its first corner's place."""
    codes = mask.astype(np.uint8)
    for axis, step in enumerate(grid.strides):
        for start in range(0, len(codes) - step, _CHUNK):
            end = min(start + _CHUNK, len(codes) - step)
            codes[start:end] |= codes[start + step : end + step] << 2**axis
    return codes
