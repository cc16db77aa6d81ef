"""Lesions: connected components of a mask, found or not, each by itself.

Voxels that touch, be it at a corner, are one component: 8 neighbors in a picture, 26 in a volume. Two lesions match if
their IoU is above `min_iou`; with 0, the default, one voxel in common suffices. A lesion may match several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import ndimage

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

SIZE_EDGES_ML = (0.1, 1.0, 10.0)
"""Between the sizes that lesions are reported by; balls of 6, 12 and 27 mm diameter."""


@dataclass(frozen=True)
class Lesion:
    """A lesion of the reference, or one of the prediction that matches none.

    Args:
        in_reference: Whether an expert drew it.
        num_voxels: Its size.
        volume_ml: The same in ml; NaN in a picture.
        is_matched: Whether the prediction found it.
        dice: With all predicted lesions that match it, taken together; 0 if none does.
    """

    in_reference: bool
    num_voxels: int
    volume_ml: float
    is_matched: bool
    dice: float


@dataclass(frozen=True)
class SizeBin:
    """Lesions of one size.

    Args:
        low_ml: Smallest volume that belongs to it.
        high_ml: Volume from which on lesions belong to the next.
        n: Lesions of the reference.
        n_matched: Those that were found.
        dice: Their mean, 0 for each that was not found; NaN if there are none.
    """

    low_ml: float
    high_ml: float
    n: int
    n_matched: int
    dice: float


@dataclass(frozen=True, eq=False)
class Lesions:
    """The lesions of two masks and what they have in common.

    Args:
        reference_sizes: Voxels of each lesion of the reference, (R,).
        prediction_sizes: Voxels of each lesion of the prediction, (P,).
        pairs: Lesions that overlap: places in the lists above, (N, 2).
        overlaps: Voxels that the two have in common, (N,).
    """

    reference_sizes: IntArray
    prediction_sizes: IntArray
    pairs: IntArray
    overlaps: IntArray

    def sensitivity(self, min_iou: float = 0.0) -> float:
        """Share of the reference's lesions that were found; NaN if there are none.

        Args:
            min_iou: IoU above which two lesions match.
        """
        return _share(self._matched(min_iou)[0])

    def precision(self, min_iou: float = 0.0) -> float:
        """Share of the predicted lesions that match one of the reference; NaN if none was predicted.

        Args:
            min_iou: IoU above which two lesions match.
        """
        return _share(self._matched(min_iou)[1])

    def f1(self, min_iou: float = 0.0) -> float:
        """Harmonic mean of sensitivity and precision; NaN if neither mask has a lesion, 0 if only one does.

        Args:
            min_iou: IoU above which two lesions match.
        """
        found, right = self._matched(min_iou)
        if not len(found) or not len(right):
            return 0.0 if len(found) or len(right) else math.nan
        sensitivity, precision = found.mean(), right.mean()
        return float(2 * sensitivity * precision / (sensitivity + precision)) if found.any() else 0.0

    def table(self, voxel_ml: float, *, min_iou: float = 0.0) -> list[Lesion]:
        """Every lesion of the reference, then every predicted one that matches none.

        Args:
            voxel_ml: Volume of a voxel.
            min_iou: IoU above which two lesions match.
        """
        found, right = self._matched(min_iou)
        matching = self._is_match(min_iou)
        (mine, partner), overlaps = self.pairs[matching].T, self.overlaps[matching]
        common = np.bincount(mine, overlaps, minlength=len(found))
        total = self.reference_sizes + np.bincount(mine, self.prediction_sizes[partner], minlength=len(found))
        dice = 2 * common / total
        reference = [
            Lesion(True, int(size), int(size) * voxel_ml, bool(is_found), float(score))
            for size, is_found, score in zip(self.reference_sizes, found, dice, strict=True)
        ]
        spurious = [
            Lesion(False, int(size), int(size) * voxel_ml, False, 0.0) for size in self.prediction_sizes[~right]
        ]
        return reference + spurious

    def _is_match(self, min_iou: float) -> BoolArray:
        mine, partner = self.pairs.T
        united = self.reference_sizes[mine] + self.prediction_sizes[partner] - self.overlaps
        return self.overlaps > min_iou * united

    def _matched(self, min_iou: float) -> tuple[BoolArray, BoolArray]:
        """Which lesions of the reference (R,) and of the prediction (P,) match one of the other side."""
        pairs = self.pairs[self._is_match(min_iou)]
        sizes = (self.reference_sizes, self.prediction_sizes)
        found, right = (np.isin(np.arange(len(size)), pairs[:, side]) for side, size in enumerate(sizes))
        return found, right


def match_lesions(reference: BoolArray, prediction: BoolArray) -> Lesions:
    """Find the lesions of two masks, and which overlap.

    Args:
        reference: What an expert drew, (I, J[, K]).
        prediction: What is to be scored, same shape.
    """
    (mine, num_mine), (theirs, num_theirs) = (_components(mask) for mask in (reference, prediction))
    common = reference & prediction
    width = num_theirs + 1
    joined, overlaps = np.unique(mine[common].astype(np.int64) * width + theirs[common], return_counts=True)
    return Lesions(
        reference_sizes=np.bincount(mine[reference], minlength=num_mine + 1)[1:],
        prediction_sizes=np.bincount(theirs[prediction], minlength=width)[1:],
        pairs=np.stack([joined // width, joined % width], axis=1) - 1,
        overlaps=overlaps,
    )


def by_size(lesions: Sequence[Lesion], edges_ml: Sequence[float] = SIZE_EDGES_ML) -> list[SizeBin]:
    """How well lesions of each size were found and outlined.

    Args:
        lesions: Of any number of cases; predicted ones that match none are left out.
        edges_ml: Volumes that separate the sizes, ascending; below the first and from the last on there is one more.
    """
    drawn = [lesion for lesion in lesions if lesion.in_reference]
    bins = []
    for low, high in pairwise([0.0, *edges_ml, math.inf]):
        inside = [lesion for lesion in drawn if low <= lesion.volume_ml < high]
        dice = float(np.mean([lesion.dice for lesion in inside])) if inside else math.nan
        bins.append(SizeBin(low, high, len(inside), sum(lesion.is_matched for lesion in inside), dice))
    return bins


def _components(mask: BoolArray) -> tuple[npt.NDArray[np.int32], int]:
    """Number of each voxel's component, from 1, and how many there are."""
    if not mask.size:
        return np.zeros(mask.shape, dtype=np.int32), 0
    numbered, num_found = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=bool))
    return numbered, int(num_found)


def _share(matched: BoolArray) -> float:
    return float(matched.mean()) if len(matched) else math.nan
