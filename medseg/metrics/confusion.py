"""Overlap of two label maps: one pass over the voxels counts all organs.

A ratio whose denominator is 0 is NaN: Dice and IoU where both masks are empty (0 if only one is), recall where the
reference is empty, precision where the prediction is, specificity where the reference fills the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medseg.metrics.stretches import LabelMap, first_axis_is_fastest, stretches

IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Voxels of one organ, where reference and prediction agree and where they do not.

    Args:
        true_positives: In both.
        false_positives: In the prediction alone.
        false_negatives: In the reference alone.
        true_negatives: In neither.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def in_reference(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def in_prediction(self) -> int:
        return self.true_positives + self.false_positives


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often each label value of the reference meets each of the prediction.

    Args:
        organs: Label values that make up each organ; organs may share values.
        values: The label values told apart.
        joint: Voxels by (reference, prediction), (V + 1, V + 1); row and column 0 are all values not listed.
    """

    organs: Mapping[str, Sequence[int]]
    values: Sequence[int]
    joint: IntArray

    def counts(self, organ: str) -> Counts:
        """Of one organ against everything else."""
        rows = [self.values.index(value) + 1 for value in set(self.organs[organ])]
        both = int(self.joint[np.ix_(rows, rows)].sum())
        in_reference, in_prediction = int(self.joint[rows].sum()), int(self.joint[:, rows].sum())
        neither = int(self.joint.sum()) - in_reference - in_prediction + both
        return Counts(both, in_prediction - both, in_reference - both, neither)

    def classes(self) -> IntArray:
        """Voxels by class, (C, C): reference down, prediction across.

        Values that belong to the same organs are one class: the organs themselves where none overlap, what tells them
        apart where they do. The first class is the background, all that belongs to no organ.
        """
        members = [frozenset(organ for organ, united in self.organs.items() if v in united) for v in self.values]
        places = {organs: place for place, organs in enumerate(dict.fromkeys([frozenset(), *members]))}
        return _folded(self.joint, [0, *(places[organs] for organs in members)], len(places))


def confusion(
    reference: LabelMap,
    prediction: LabelMap,
    organs: Mapping[str, Sequence[int]],
    *,
    ignore_label: int | None = None,
) -> Confusion:
    """Compare two label maps.

    Args:
        reference: What an expert drew; any shape.
        prediction: What is to be scored; same shape.
        organs: Label values that make up each organ; organs may share values.
        ignore_label: Value of the reference's voxels that do not count.
    """
    values = sorted({value for united in organs.values() for value in united})
    if ignore_label is not None and ignore_label not in values:
        values.append(ignore_label)
    joint = _joint_histogram(reference, prediction, values)
    if ignore_label is not None:
        joint[values.index(ignore_label) + 1] = 0
    return Confusion(organs, values, joint)


def count(
    reference: LabelMap,
    prediction: LabelMap,
    organs: Mapping[str, Sequence[int]],
    *,
    ignore_label: int | None = None,
) -> dict[str, Counts]:
    """The counts of each organ, in the order given; see `confusion`."""
    found = confusion(reference, prediction, organs, ignore_label=ignore_label)
    return {organ: found.counts(organ) for organ in organs}


def dice(counts: Counts) -> float:
    """Dice similarity coefficient: 2 TP / (2 TP + FP + FN), which is also the F1 of the voxels.

    Args:
        counts: Voxels of one organ.

    Returns:
        Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

    Reference:
        Dice 1945, doi:10.2307/1932409.
    """
    return _ratio(2 * counts.true_positives, counts.in_reference + counts.in_prediction)


def iou(counts: Counts) -> float:
    """Intersection over union: TP / (TP + FP + FN).

    Args:
        counts: Voxels of one organ.

    Returns:
        Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

    Reference:
        Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.
    """
    return _ratio(counts.true_positives, counts.in_reference + counts.false_positives)


def precision(counts: Counts) -> float:
    """Share of the prediction that is right: TP / (TP + FP); NaN if the prediction is empty."""
    return _ratio(counts.true_positives, counts.in_prediction)


def recall(counts: Counts) -> float:
    """Share of the reference that was found (sensitivity): TP / (TP + FN); NaN if the reference is empty."""
    return _ratio(counts.true_positives, counts.in_reference)


def specificity(counts: Counts) -> float:
    """Share of what is not the organ that was left out: TN / (TN + FP); NaN if the reference is everywhere."""
    return _ratio(counts.true_negatives, counts.true_negatives + counts.false_positives)


def pixel_accuracy(classes: IntArray) -> float:
    """Share of the voxels whose class is right, the background being a class; NaN if no voxel counts.

    Args:
        classes: Voxels by class, (C, C), see `Confusion.classes`.
    """
    return _ratio(int(classes.trace()), int(classes.sum()))


def mean_accuracy_by_recall(classes: IntArray) -> float:
    """Mean over the classes of TP / (TP + FN), classes that the reference lacks left out.

    Args:
        classes: Voxels by class, (C, C), see `Confusion.classes`.

    Reference:
        Long et al. 2015, arXiv:1411.4038: "mean accuracy".
    """
    return _mean(_ratios(classes.diagonal(), classes.sum(axis=1)))


def mean_accuracy_by_precision(classes: IntArray) -> float:
    """Mean over the classes of TP / (TP + FP), classes that the prediction lacks left out.

    Args:
        classes: Voxels by class, (C, C), see `Confusion.classes`.
    """
    return _mean(_ratios(classes.diagonal(), classes.sum(axis=0)))


def mean_iou(classes: IntArray) -> float:
    """Mean over the classes, the background among them, of TP / (TP + FP + FN); classes in neither are left out.

    Args:
        classes: Voxels by class, (C, C), see `Confusion.classes`.

    Reference:
        Long et al. 2015, arXiv:1411.4038.
    """
    return _mean(_class_ious(classes))


def frequency_weighted_iou(classes: IntArray) -> float:
    """As `mean_iou`, each class weighted by its share of the reference.

    Args:
        classes: Voxels by class, (C, C), see `Confusion.classes`.

    Reference:
        Long et al. 2015, arXiv:1411.4038.
    """
    in_reference = classes.sum(axis=1)
    if not in_reference.any():
        return math.nan
    return float(np.average(np.nan_to_num(_class_ious(classes)), weights=in_reference))


def _class_ious(classes: IntArray) -> Array:
    both = classes.diagonal()
    return _ratios(both, classes.sum(axis=0) + classes.sum(axis=1) - both)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _ratios(parts: IntArray, wholes: IntArray) -> Array:
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _mean(ratios: Array) -> float:
    known = ratios[~np.isnan(ratios)]
    return float(known.mean()) if len(known) else math.nan


def _joint_histogram(reference: LabelMap, prediction: LabelMap, values: Sequence[int]) -> IntArray:
    """Voxels by (reference, prediction), (V + 1, V + 1); row and column 0 are all values not listed."""
    if first_axis_is_fastest(reference, prediction):
        reference, prediction = reference.T, prediction.T
    num_bins = len(values) + 1
    total = np.zeros(num_bins**2, dtype=np.int64)
    flat = reference.ravel(), prediction.ravel()
    for starts, ends in stretches(*flat):
        rows, columns = (_bins(labels[starts], values) for labels in flat)
        lengths = np.bincount(rows * num_bins + columns, weights=ends - starts, minlength=num_bins**2)
        total += lengths.astype(np.int64)
    return total.reshape(num_bins, num_bins)


def _folded(joint: IntArray, places: npt.ArrayLike, width: int) -> IntArray:
    """A joint histogram, (width, width), whose rows and columns were added to those of their places."""
    total = np.zeros((width, width), dtype=np.int64)
    rows = np.asarray(places)
    np.add.at(total, (rows[:, None], rows), joint)
    return total


def _bins(label: LabelMap, values: Sequence[int]) -> IntArray:
    """Place of each voxel's value in the list, from 1; 0 if it is not there."""
    low, high = min(0, int(label.min())), max(0, int(label.max()))
    table = np.zeros(high - low + 1, dtype=np.int64)
    for number, value in enumerate(values, 1):
        if low <= value <= high:
            table[value - low] = number
    return table[label if low == 0 else label.astype(np.int64) - low]
