"""Whether probabilities mean what they say: of all voxels given 0.8, 80 % should belong to the organ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError
from medseg.metrics.evidence import OrganEvidence
from medseg.metrics.surface import common_box

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]
Array = npt.NDArray[np.float64]

NUM_BINS = 15
_CHUNK = 2**20  # voxels binned at once: NumPy widens them to 8 bytes each


@dataclass(frozen=True, eq=False)
class Reliability:
    """Voxels by their probability, in bins of equal width: what a reliability diagram shows.

    Args:
        num_voxels: Of each bin, (N,).
        probability_sum: Of each bin's voxels, (N,).
        num_positive: Each bin's voxels that do belong, (N,).
    """

    num_voxels: Array
    probability_sum: Array
    num_positive: Array

    def __add__(self, other: Reliability) -> Reliability:
        """Over the voxels of both."""
        return Reliability(
            self.num_voxels + other.num_voxels,
            self.probability_sum + other.probability_sum,
            self.num_positive + other.num_positive,
        )

    @property
    def error(self) -> float:
        """Mean over the voxels of |mean probability - share that belongs| in their bin; NaN without voxels."""
        total = self.num_voxels.sum()
        return float(np.abs(self.probability_sum - self.num_positive).sum() / total) if total else math.nan


def reliability(
    probability: FloatArray, reference: BoolArray, *, counted: BoolArray | None = None, num_bins: int = NUM_BINS
) -> Reliability:
    """Sort voxels by the probability they were given.

    Args:
        probability: That a voxel belongs to the organ, in [0, 1]; any shape.
        reference: Whether it does, same shape.
        counted: Which voxels count, same shape; None: all.
        num_bins: Bins of equal width; 1 belongs to the last.

    Raises:
        GeometryError: If the shapes differ.
    """
    _check_shapes(probability.shape, reference if counted is None else counted, reference)
    if counted is not None:
        probability, reference = probability[counted], reference[counted]
    flat, belongs = probability.ravel(), reference.ravel()
    sums = np.zeros((3, num_bins))
    for start in range(0, flat.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        bins = np.clip(flat[chunk].astype(np.float64) * num_bins, 0, num_bins - 1).astype(np.intp)
        for total, weights in zip(sums, (None, flat[chunk], belongs[chunk]), strict=True):
            total += np.bincount(bins, weights, minlength=num_bins)
    return Reliability(*sums)


def expected_calibration_error(
    probability: FloatArray, reference: BoolArray, *, counted: BoolArray | None = None, num_bins: int = NUM_BINS
) -> float:
    """Expected calibration error of one organ's probabilities.

    Most voxels of a scan are far from any organ, their probability 0 and right: over the whole scan the error is small
    whatever the network does. The metric ``ece`` therefore looks at the organ's bounding box.

    Args:
        probability: That a voxel belongs to the organ, in [0, 1]; any shape.
        reference: Whether it does, same shape.
        counted: Which voxels count, same shape; None: all.
        num_bins: Bins of equal width.

    Returns:
        Error in [0, 1], 0 being best; NaN if no voxel counts.

    Raises:
        GeometryError: If the shapes differ.

    Reference:
        Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602; of one class against the rest.
    """
    return reliability(probability, reference, counted=counted, num_bins=num_bins).error


def organ_calibration_error(organ: OrganEvidence) -> float:
    """`expected_calibration_error` on the organ's box; NaN if it is in neither mask or has no probabilities."""
    if organ.is_in_neither or organ.probability is None:
        return math.nan
    reference, prediction = organ.masks
    box = common_box(reference, prediction)  # what is predicted in voxels that do not count has no say
    return expected_calibration_error(organ.probability[box], reference[box], counted=organ.counted[box])


def _check_shapes(expected: tuple[int, ...], *arrays: npt.NDArray[Any]) -> None:
    for array in arrays:
        if array.shape != expected:
            message = f"probabilities have {expected} voxels, the reference {array.shape}; give those of one grid"
            raise GeometryError("E-PAIR-SHAPE", message)
