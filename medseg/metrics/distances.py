"""Distances between the surfaces of one organ, in millimeters.

A distance is NaN if either mask is empty: there is none to an organ that was missed, and 0 would look perfect. Whoever
averages must count such cases, see `medseg.metrics.table`.
"""

from __future__ import annotations

import math

from medseg.metrics.evidence import OrganEvidence

TOLERANCE_MM = 1.0
"""Of the surface Dice, if none is named."""


def hausdorff(organ: OrganEvidence) -> float:
    """Largest distance from either surface to the other."""
    return organ.surfaces.hausdorff() if organ.is_in_both else math.nan


def hausdorff95(organ: OrganEvidence) -> float:
    """The larger of both directions' 95th percentiles."""
    return organ.surfaces.hausdorff(percentile=95) if organ.is_in_both else math.nan


def average_distance(organ: OrganEvidence) -> float:
    """Average symmetric surface distance: the mean over the voxels of both surfaces."""
    return organ.surfaces.average() if organ.is_in_both else math.nan


def surface_dice(organ: OrganEvidence, tolerance_mm: float = TOLERANCE_MM) -> float:
    """Share of both surfaces that lies within a tolerance of the other.

    Args:
        organ: What is scored.
        tolerance_mm: Largest distance counted as agreement.

    Returns:
        Score in [0, 1]; NaN if both masks are empty, 0 if only one is.

    Reference:
        Nikolov et al. 2018, arXiv:1809.04430.
    """
    if organ.is_in_both:
        return organ.surfaces.surface_dice(tolerance_mm)
    return math.nan if organ.is_in_neither else 0.0
