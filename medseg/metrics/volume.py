"""Volumes in milliliters: how much there is, and how far the prediction is off.

Voxels with the ignore label belong to neither volume. Pictures have none: all values are NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.metrics.evidence import OrganEvidence

_CHUNK = 1 << 22
"""Voxels that are counted at once, so that counting takes no memory worth telling."""


def volume_ml(organ: OrganEvidence) -> float:
    """Of the prediction; 0 if it is empty."""
    return organ.prediction_ml


def reference_volume_ml(organ: OrganEvidence) -> float:
    """Of the reference; 0 if it is empty."""
    return organ.reference_ml


def volume_difference_ml(organ: OrganEvidence) -> float:
    """Prediction minus reference; NaN if both masks are empty."""
    return math.nan if organ.is_in_neither else organ.prediction_ml - organ.reference_ml


def absolute_volume_difference_ml(organ: OrganEvidence) -> float:
    """Without its sign; NaN if both masks are empty."""
    return abs(volume_difference_ml(organ))


def relative_volume_difference(organ: OrganEvidence) -> float:
    """Prediction minus reference, over the reference: -1 if it was missed; NaN if the reference is empty."""
    if not organ.counts.in_reference:
        return math.nan
    return volume_difference_ml(organ) / organ.reference_ml


def volumes_by_value(label_map: Volume) -> tuple[dict[int, float], str]:
    """How much of a label map has each value but 0.

    Args:
        label_map: (1, I, J[, K]).

    Returns:
        By value ml, or pixels where a picture says nothing of its size; and which of them.
    """
    counts: Counter[int] = Counter()
    voxels = label_map.array.ravel(order="K")
    for start in range(0, voxels.size, _CHUNK):
        part = voxels[start : start + _CHUNK]
        if part.dtype.kind == "u":  # as medseg's own are, which need no sorting
            found = np.bincount(part)
            values = np.flatnonzero(found)
            found = found[values]
        else:
            values, found = np.unique(part, return_counts=True)
        counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    del counts[0]
    is_volume = label_map.geometry.spatial_dims == 3
    size, unit = (label_map.geometry.voxel_ml, "ml") if is_volume else (1.0, "pixels")
    return {int(value): count * size for value, count in counts.items()}, unit


def organ_volumes(by_value: Mapping[int, float], labels: Labels) -> dict[str, float]:
    """How much there is of each organ or region.

    Args:
        by_value: See `volumes_by_value`.
        labels: What the values mean.
    """
    return {
        organ: sum((by_value.get(value, 0.0) for value in values), 0.0) for organ, values in labels.organ_values.items()
    }
