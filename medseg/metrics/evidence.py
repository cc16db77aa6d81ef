"""What metrics look at: each thing is computed when the first metric asks for it, and once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from medseg.metrics.confusion import Confusion, Counts, confusion
from medseg.metrics.lesions import Lesions, match_lesions
from medseg.metrics.stretches import LabelMap
from medseg.metrics.surface import SurfaceDistances, bounding_boxes, surface_distances

BoolArray = npt.NDArray[np.bool_]
Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class CaseEvidence:
    """Two label maps of a case; what metrics of scope ``image`` look at.

    Args:
        reference: What an expert drew, (I, J[, K]).
        prediction: What is to be scored, same shape and geometry.
        organs: Label values that make up each organ; organs may share values.
        spacing_mm: Voxel size along each axis. On a tilted grid distances are those of an upright one.
        voxel_ml: Volume of a voxel; NaN for a picture.
        ignore_label: Value of the reference's voxels that do not count: they belong to neither mask.
        probabilities: Predicted probability of each organ, (I, J[, K]), where it is known.
    """

    reference: LabelMap
    prediction: LabelMap
    organs: Mapping[str, Sequence[int]]
    spacing_mm: Sequence[float]
    voxel_ml: float
    ignore_label: int | None = None
    probabilities: Mapping[str, npt.NDArray[np.floating]] | None = None

    @cached_property
    def confusion(self) -> Confusion:
        """Counts of all organs."""
        return confusion(self.reference, self.prediction, self.organs, ignore_label=self.ignore_label)

    @cached_property
    def boxes(self) -> Mapping[str, Box]:
        """Box around each organ in both label maps."""
        return bounding_boxes(self.reference, self.prediction, self.organs)

    def organ(self, name: str) -> OrganEvidence:
        """One organ; what is computed for it lives as long as what this returns."""
        return OrganEvidence(self, name)


@dataclass(frozen=True, eq=False)
class OrganEvidence:
    """One organ of a case; what metrics of scope ``organ`` look at.

    Args:
        case: Its case.
        name: Organ, region or union.
    """

    case: CaseEvidence
    name: str

    @cached_property
    def counts(self) -> Counts:
        return self.case.confusion.counts(self.name)

    @property
    def is_in_both(self) -> bool:
        return bool(self.counts.in_reference and self.counts.in_prediction)

    @property
    def is_in_neither(self) -> bool:
        return not (self.counts.in_reference or self.counts.in_prediction)

    @property
    def reference_ml(self) -> float:
        return self.counts.in_reference * self.case.voxel_ml

    @property
    def prediction_ml(self) -> float:
        return self.counts.in_prediction * self.case.voxel_ml

    @cached_property
    def box(self) -> Box:
        """Around the organ in both label maps, with a margin of a voxel where there is room."""
        if self.is_in_neither:
            return (slice(0, 0),) * self.case.reference.ndim
        return self.case.boxes[self.name]

    @cached_property
    def counted(self) -> BoolArray:
        """Which voxels of the box count."""
        reference = self.case.reference[self.box]
        if self.case.ignore_label is None:
            return np.ones(reference.shape, dtype=bool)
        return reference != self.case.ignore_label

    @cached_property
    def masks(self) -> tuple[BoolArray, BoolArray]:
        """Reference and prediction on the box."""
        reference, prediction = (self._mask(label) for label in (self.case.reference, self.case.prediction))
        return reference, prediction

    @cached_property
    def surfaces(self) -> SurfaceDistances:
        return surface_distances(*self.masks, self.case.spacing_mm)

    @cached_property
    def lesions(self) -> Lesions:
        return match_lesions(*self.masks)

    @property
    def probability(self) -> npt.NDArray[np.floating] | None:
        """Of the organ, on the box."""
        known = self.case.probabilities
        return None if known is None or self.name not in known else known[self.name][self.box]

    def _mask(self, label: LabelMap) -> BoolArray:
        cropped = label[self.box]
        first, *others = self.case.organs[self.name]
        mask: BoolArray = cropped == first
        for value in others:
            mask |= cropped == value
        if self.case.ignore_label is not None:
            mask &= self.counted
        return mask
