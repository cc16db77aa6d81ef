"""Overlap of two label maps: one pass over the voxels counts all organs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LabelMap = npt.NDArray[Any]
"""Integers, of any type and shape."""

_CHUNK = 2**20  # voxels counted at once: NumPy widens them to 8 bytes each


@dataclass(frozen=True)
class Counts:
    """Voxels of one organ, where reference and prediction agree and where they do not.

    Args:
        true_positives: In both.
        false_positives: In the prediction alone.
        false_negatives: In the reference alone.
    """

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def in_reference(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def in_prediction(self) -> int:
        return self.true_positives + self.false_positives


def count(
    reference: LabelMap,
    prediction: LabelMap,
    organs: Mapping[str, Sequence[int]],
    *,
    ignore_label: int | None = None,
) -> dict[str, Counts]:
    """Compare two label maps.

    Args:
        reference: What an expert drew; any shape.
        prediction: What is to be scored; same shape.
        organs: Label values that make up each organ; organs may share values.
        ignore_label: Value of the reference's voxels that do not count.

    Returns:
        The counts of each organ, in the order given.
    """
    values = sorted({value for united in organs.values() for value in united})
    if ignore_label is not None and ignore_label not in values:
        values.append(ignore_label)
    joint = _joint_histogram(reference, prediction, values)
    if ignore_label is not None:
        joint[values.index(ignore_label) + 1] = 0
    counts = {}
    for organ, united in organs.items():
        rows = [values.index(value) + 1 for value in set(united)]
        both = int(joint[np.ix_(rows, rows)].sum())
        counts[organ] = Counts(both, int(joint[:, rows].sum()) - both, int(joint[rows].sum()) - both)
    return counts


def dice(counts: Counts) -> float:
    """Dice similarity coefficient: 2 TP / (2 TP + FP + FN).

    Args:
        counts: Voxels of one organ.

    Returns:
        Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

    Reference:
        Dice 1945, doi:10.2307/1932409.
    """
    both, total = counts.true_positives, counts.in_reference + counts.in_prediction
    return 2 * both / total if total else math.nan


def iou(counts: Counts) -> float:
    """Intersection over union: TP / (TP + FP + FN).

    Args:
        counts: Voxels of one organ.

    Returns:
        Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

    Reference:
        Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.
    """
    united = counts.in_reference + counts.false_positives
    return counts.true_positives / united if united else math.nan


def _joint_histogram(reference: LabelMap, prediction: LabelMap, values: Sequence[int]) -> npt.NDArray[np.int64]:
    """Voxels by (reference, prediction), (V + 1, V + 1); row and column 0 are all values not listed."""
    num_bins = len(values) + 1
    total = np.zeros(num_bins**2, dtype=np.int64)
    if reference.flags.f_contiguous and prediction.flags.f_contiguous:
        reference, prediction = reference.T, prediction.T  # flat without a copy
    pair = (reference.ravel(), prediction.ravel())
    for start in range(0, reference.size, _CHUNK):
        rows, columns = (_bins(array[start : start + _CHUNK], values) for array in pair)
        total += np.bincount(rows * num_bins + columns, minlength=num_bins**2)
    return total.reshape(num_bins, num_bins)


def _bins(label: LabelMap, values: Sequence[int]) -> npt.NDArray[np.int64]:
    """Place of each voxel's value in the list, from 1; 0 if it is not there."""
    low, high = min(0, int(label.min())), max(0, int(label.max()))
    table = np.zeros(high - low + 1, dtype=np.int64)
    for number, value in enumerate(values, 1):
        if low <= value <= high:
            table[value - low] = number
    return table[label if low == 0 else label.astype(np.int64) - low]
