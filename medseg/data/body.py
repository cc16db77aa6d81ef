"""Where in a CT or MR the patient is, so that a network need not look at the air around."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.data.checks import expected_modality

Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]

COARSE_MM = 4.0
"""The patient is looked for on voxels of at most this size."""

MARGIN_MM = 12.0
"""What lies this close to the patient counts too."""

MIN_PIECE_ML = 20.0
"""Smaller pieces of matter in the air are noise, or nothing that is segmented; arms and the table are larger."""

AIR_HU = -500.0
"""Halfway between air and soft tissue; what the lungs hold counts as it lies within."""

MR_SHARE = 0.25
"""Of the way from the darkness around a patient to Otsu's threshold: dark tissue is to lie above it, noise below."""


@dataclass(frozen=True, eq=False)
class Body:
    """The patient and some margin.

    Args:
        mask: True in blocks of the scan's grid that hold some of it.
        block: Voxels of a block along each axis.
        shape: Voxels of the grid.
    """

    mask: Mask
    block: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The voxels (I, J, K) that enclose it."""
        (blocks,) = ndimage.find_objects(self.mask.astype(np.uint8))
        return tuple(
            slice(b.start * n, min(b.stop * n, size)) for b, n, size in zip(blocks, self.block, self.shape, strict=True)
        )

    def touches(self, box: Sequence[slice]) -> bool:
        """Whether any of it lies in a box of voxels."""
        blocks = tuple(slice(s.start // n, -(-s.stop // n)) for s, n in zip(box, self.block, strict=True))
        return bool(self.mask[blocks].any())


def find_body(image: npt.NDArray[np.generic], spacing_mm: Sequence[float], channels: Sequence[str]) -> Body | None:
    """The patient in a scan.

    Pieces of matter apart from the largest one (arms, the table) belong to it: nothing that a network might be asked
    for is to be lost.

    Args:
        image: (C, I, J, K), HU in CT.
        spacing_mm: Voxel size.
        channels: What each channel is; those that are neither CT nor MR are passed over.

    Returns:
        None where no channel is CT or MR, or nothing stands out.
    """
    block = tuple(max(1, int(COARSE_MM / mm)) for mm in spacing_mm)
    found = [
        _matter(channel[tuple(slice(n // 2, None, n) for n in block)], modality)
        for channel, modality in zip(image, map(expected_modality, channels), strict=True)
        if modality in ("CT", "MR") and all(n > size // 2 for n, size in zip(channel.shape, block, strict=True))
    ]
    if not found:
        return None
    mask: Mask = np.zeros([-(-n // size) for n, size in zip(image.shape[1:], block, strict=True)], bool)
    for matter in found:
        mask[tuple(slice(n) for n in matter.shape)] |= matter
    coarse_mm = [n * mm for n, mm in zip(block, spacing_mm, strict=True)]
    mask = _grown(_large_pieces(mask, math.prod(coarse_mm) / 1000), coarse_mm)
    return Body(mask, block, tuple(image.shape[1:])) if mask.any() else None


def _matter(channel: npt.NDArray[np.generic], modality: str | None) -> Mask:
    values = np.asarray(channel, np.float32)
    if modality == "CT":
        return values > AIR_HU
    if not np.ptp(values) > 0:
        return np.zeros(values.shape, bool)
    otsu = _otsu(values)
    dark = float(np.median(values[values <= otsu]))
    return values > dark + MR_SHARE * (otsu - dark)


def _otsu(values: npt.NDArray[np.float32]) -> float:
    import SimpleITK as sitk  # which takes a while to import, and CTs do without

    between = sitk.OtsuThresholdImageFilter()
    between.Execute(sitk.GetImageFromArray(values))
    return float(between.GetThreshold())


def _large_pieces(mask: Mask, voxel_ml: float) -> Mask:
    pieces, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    is_large = np.bincount(pieces.ravel()) * voxel_ml >= MIN_PIECE_ML
    is_large[0] = False
    kept: Mask = is_large[pieces]
    return kept


def _grown(mask: Mask, spacing_mm: Sequence[float]) -> Mask:
    """With what it encloses in any slice, as lungs and bowel, and the margin; on voxels that were thinned out, one more."""
    for axis in range(3):
        for plane in np.moveaxis(mask, axis, 0):
            plane |= ndimage.binary_fill_holes(plane)
    for axis, mm in enumerate(spacing_mm):
        width = 2 * (1 + math.ceil(MARGIN_MM / mm)) + 1
        mask = ndimage.maximum_filter1d(mask.astype(np.uint8), width, axis=axis).astype(bool)
    return mask
