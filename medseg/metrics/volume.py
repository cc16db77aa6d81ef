"""Volumes in milliliters: how much there is, and how far the prediction is off.

Voxels with the ignore label belong to neither volume. Pictures have none: all values are NaN.
"""

from __future__ import annotations

import math

from medseg.metrics.evidence import OrganEvidence


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
