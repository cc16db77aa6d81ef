"""Scores of a segmentation against a reference, by name.

Rules for empty masks: what is not defined is NaN, never 0 or 1 by accident, and the table says why. If both masks are
empty, every score is NaN; only specificity and the two volumes have a value. If one is empty, the organ was missed or
is spurious: overlap, surface Dice and lesion F1 are 0, distances are NaN. Precision and recall are NaN where they would
divide by 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal

from medseg.errors import WorkflowError
from medseg.metrics import confusion as overlap
from medseg.metrics import distances, volume
from medseg.metrics.calibration import organ_calibration_error
from medseg.metrics.confusion import Counts, IntArray
from medseg.metrics.evidence import CaseEvidence, OrganEvidence
from medseg.metrics.lesions import Lesions
from medseg.registry import Registry


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS.

    Args:
        score: Its value from the `OrganEvidence` of one organ, or the `CaseEvidence` if its scope is the image; NaN
            where it is not defined.
        title: What it is called in papers.
        paper: Where it comes from.
        good_for: When to look at it.
        lower_is_better: Whether less is better.
        is_distance: Whether it is in mm and NaN for a missed organ, which comparisons count as the scan's diagonal.
        is_ranked: Whether one value is better than another; of volumes and signed differences none is.
        scope: Whether each organ of a case has a value, or the case as a whole.
        parameter: Keyword of `score` that a number after a colon sets: ``nsd:2``.
        below: What that number must be smaller than; it is never negative.
        needs_probabilities: Whether label maps do not suffice.
    """

    score: Callable[..., float]
    title: str
    paper: str
    good_for: str
    lower_is_better: bool = False
    is_distance: bool = False
    is_ranked: bool = True
    scope: Literal["organ", "image"] = "organ"
    parameter: str | None = None
    below: float = math.inf
    needs_probabilities: bool = False


class MetricRegistry(Registry[Metric]):
    """A registry that also knows ``nsd:2``: the entry ``nsd`` with its parameter set to 2."""

    def __getitem__(self, name: str) -> Metric:
        base, colon, number = name.partition(":")
        metric = super().__getitem__(base)
        return _with_parameter(metric, name, number) if colon else metric

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self[name])
        except WorkflowError:
            return False


def _with_parameter(metric: Metric, name: str, number: str) -> Metric:
    base = name.partition(":")[0]
    if metric.parameter is None:
        raise WorkflowError("E-METRIC-NUMBER", f"metric {base!r} takes no number, found {name!r}; write {base!r}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < metric.below:
        limit = f"number from 0 to below {metric.below:g}" if metric.below < math.inf else "finite number from 0 on"
        message = f"metric {name!r}: expected a {limit} ({metric.parameter}) after the colon, as in '{base}:0.5'"
        raise WorkflowError("E-METRIC-NUMBER", message)
    title = f"{metric.title}; here {metric.parameter} = {value:g}"
    return replace(metric, score=partial(metric.score, **{metric.parameter: value}), title=title, parameter=None)


def _of_counts(score: Callable[[Counts], float]) -> Callable[[OrganEvidence], float]:
    @wraps(score)  # with its docstring, for `medseg metrics`
    def of_organ(organ: OrganEvidence) -> float:
        return score(organ.counts)

    return of_organ


def _of_classes(score: Callable[[IntArray], float]) -> Callable[[CaseEvidence], float]:
    @wraps(score)
    def of_case(case: CaseEvidence) -> float:
        return score(case.confusion.classes())

    return of_case


def _of_lesions(score: Callable[..., float]) -> Callable[..., float]:
    @wraps(score)
    def of_organ(organ: OrganEvidence, **parameters: Any) -> float:
        return score(organ.lesions, **parameters)

    return of_organ


_LONG = "Long et al. 2015, arXiv:1411.4038"
_MAIER_HEIN = "Maier-Hein et al. 2024, doi:10.1038/s41592-023-02151-z"
_TAHA = "Taha and Hanbury 2015, doi:10.1186/s12880-015-0068-x"

METRICS = MetricRegistry(
    "metric",
    {
        "dice": Metric(
            _of_counts(overlap.dice),
            title="Dice similarity coefficient (the F1 of the voxels)",
            paper="Dice 1945, doi:10.2307/1932409",
            good_for="overlap; the field's common currency, hard on small organs",
        ),
        "iou": Metric(
            _of_counts(overlap.iou),
            title="Intersection over union (Jaccard index)",
            paper="Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x",
            good_for="overlap; ranks cases as Dice does, stricter in number",
        ),
        "precision": Metric(
            _of_counts(overlap.precision),
            title="Precision (positive predictive value)",
            paper=_TAHA,
            good_for="telling whether too much was segmented",
        ),
        "recall": Metric(
            _of_counts(overlap.recall),
            title="Recall (sensitivity, true positive rate)",
            paper=_TAHA,
            good_for="telling whether too little was segmented",
        ),
        "specificity": Metric(
            _of_counts(overlap.specificity),
            title="Specificity (true negative rate)",
            paper=_TAHA,
            good_for="little: the background is so large that it is always near 1; some journals ask for it",
        ),
        "volume_ml": Metric(
            volume.volume_ml,
            title="Volume of the prediction in ml",
            paper=_TAHA,
            good_for="agreement of volumes (Bland-Altman), together with reference_volume_ml",
            is_ranked=False,
        ),
        "reference_volume_ml": Metric(
            volume.reference_volume_ml,
            title="Volume of the reference in ml",
            paper=_TAHA,
            good_for="agreement of volumes (Bland-Altman), together with volume_ml",
            is_ranked=False,
        ),
        "volume_difference_ml": Metric(
            volume.volume_difference_ml,
            title="Volume difference in ml: prediction minus reference",
            paper=_TAHA,
            good_for="bias: whether organs come out too large or too small",
            is_ranked=False,
        ),
        "absolute_volume_difference_ml": Metric(
            volume.absolute_volume_difference_ml,
            title="Absolute volume difference in ml",
            paper=_TAHA,
            good_for="volumetry, whatever the outline",
            lower_is_better=True,
        ),
        "relative_volume_difference": Metric(
            volume.relative_volume_difference,
            title="Relative volume difference: prediction minus reference, over the reference",
            paper=_TAHA,
            good_for="bias where organs differ in size; 0.1 is 10 % too large",
            is_ranked=False,
        ),
        "hd": Metric(
            distances.hausdorff,
            title="Hausdorff distance in mm",
            paper="Huttenlocher et al. 1993, doi:10.1109/34.232073",
            good_for="the worst error; one stray voxel decides it",
            lower_is_better=True,
            is_distance=True,
        ),
        "hd95": Metric(
            distances.hausdorff95,
            title="95th percentile of the Hausdorff distance in mm",
            paper=_TAHA,
            good_for="large errors of the outline, without the last stray voxels",
            lower_is_better=True,
            is_distance=True,
        ),
        "assd": Metric(
            distances.average_distance,
            title="Average symmetric surface distance in mm",
            paper="Heimann et al. 2009, doi:10.1109/TMI.2009.2013851",
            good_for="the typical error of the outline",
            lower_is_better=True,
            is_distance=True,
        ),
        "nsd": Metric(
            distances.surface_dice,
            title=f"Surface Dice within {distances.TOLERANCE_MM:g} mm (within 2 mm: nsd:2)",
            paper="Nikolov et al. 2018, arXiv:1809.04430",
            good_for="the share of the outline that needs no correction; fair to small organs",
            parameter="tolerance_mm",
        ),
        "lesion_sensitivity": Metric(
            _of_lesions(Lesions.sensitivity),
            title="Lesions found: those the prediction touches (with IoU above 0.1: lesion_sensitivity:0.1)",
            paper=_MAIER_HEIN,
            good_for="whether lesions are missed, however small",
            parameter="min_iou",
            below=1,
        ),
        "lesion_precision": Metric(
            _of_lesions(Lesions.precision),
            title="Predicted lesions that touch one (with IoU above 0.1: lesion_precision:0.1)",
            paper=_MAIER_HEIN,
            good_for="whether there are false alarms",
            parameter="min_iou",
            below=1,
        ),
        "lesion_f1": Metric(
            _of_lesions(Lesions.f1),
            title="F1 of lesions: harmonic mean of lesion_sensitivity and lesion_precision (takes an IoU too)",
            paper=_MAIER_HEIN,
            good_for="detection in one number: many small lesions count as much as a large one",
            parameter="min_iou",
            below=1,
        ),
        "ece": Metric(
            organ_calibration_error,
            title="Expected calibration error on the organ's bounding box",
            paper="Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602",
            good_for="whether probabilities can be trusted; needs those of medseg predict --probabilities",
            lower_is_better=True,
            needs_probabilities=True,
        ),
        "pixel_accuracy": Metric(
            _of_classes(overlap.pixel_accuracy),
            title="Pixel accuracy: voxels of the right class, background included",
            paper=_LONG,
            good_for="pictures that classes fill; near 1 where organs are small",
            scope="image",
        ),
        "mean_accuracy_by_recall": Metric(
            _of_classes(overlap.mean_accuracy_by_recall),
            title="Mean pixel accuracy, recall-wise: mean over classes of TP / (TP + FN)",
            paper=_LONG,
            good_for="comparing with papers on FCN and DeepLab, which mean this by mean accuracy",
            scope="image",
        ),
        "mean_accuracy_by_precision": Metric(
            _of_classes(overlap.mean_accuracy_by_precision),
            title="Mean pixel accuracy, precision-wise: mean over classes of TP / (TP + FP)",
            paper=_TAHA,
            good_for="comparing with papers that divide by what was predicted",
            scope="image",
        ),
        "mean_iou": Metric(
            _of_classes(overlap.mean_iou),
            title="Mean intersection over union of the classes, background included",
            paper=_LONG,
            good_for="comparing with papers on pictures; the organs alone: the mean of iou",
            scope="image",
        ),
        "frequency_weighted_iou": Metric(
            _of_classes(overlap.frequency_weighted_iou),
            title="Intersection over union of the classes, weighted by their share of the reference",
            paper=_LONG,
            good_for="comparing with papers on pictures; the background decides it",
            scope="image",
        ),
    },
)
