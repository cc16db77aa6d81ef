"""What metrics are called and mean, for readers who have never heard of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.metrics import METRICS
from medseg.metrics.distances import TOLERANCE_MM


@dataclass(frozen=True)
class Words:
    """How a metric is told of.

    Args:
        name: Short, with its unit.
        meaning: A sentence or two that begin with the name and need no other.
        number: What a number after the colon adds to the name; ``{}`` stands for it.
        default: Completes the sentence where there is no number.
        numbered: Completes it where there is one.
    """

    name: str
    meaning: str
    number: str = ""
    default: str = ""
    numbered: str = ""


_AT_IOU = {"number": " at IoU {}", "default": "overlap, be it in one voxel", "numbered": "overlap with an IoU above {}"}
_ALL_CLASSES = "the background counts as a class"

WORDS = {
    "dice": Words(
        "Dice",
        "Dice tells how far two outlines overlap: 1 if they are the same, 0 if they have no voxel in common. It is "
        "harsh on small structures, where a rim one voxel wide is much of the whole.",
    ),
    "iou": Words(
        "IoU",
        "IoU is the share of all outlined voxels that both outlines hold: 1 if they are the same, 0 if none is. It "
        "ranks cases as Dice does, with smaller numbers.",
    ),
    "precision": Words(
        "precision", "Precision is the share of the segmented voxels that belong to the organ: low if too much is drawn."
    ),
    "recall": Words("recall", "Recall is the share of the organ’s voxels that were found: low if too little is drawn."),
    "specificity": Words(
        "specificity",
        "Specificity is the share of the voxels outside the organ that were left out. It is near 1 almost always, for "
        "most of a scan is outside.",
    ),
    "volume_ml": Words("volume (ml)", "Volume is that of the segmentation, in ml; by itself it is neither good nor bad."),
    "reference_volume_ml": Words(
        "reference volume (ml)", "Reference volume is that of what the expert drew, in ml; by itself it is neither good nor bad."
    ),
    "volume_difference_ml": Words(
        "volume difference (ml)",
        "Volume difference is the segmentation’s volume minus the reference’s, in ml: above 0 if too much was drawn, "
        "below 0 if too little. At 0 the outlines may differ all the same.",
    ),
    "absolute_volume_difference_ml": Words(
        "absolute volume difference (ml)",
        "Absolute volume difference is how far the segmentation’s volume is from the reference’s, in ml: 0 if they are "
        "the same size, though the outlines may differ all the same.",
    ),
    "relative_volume_difference": Words(
        "relative volume difference",
        "Relative volume difference is the volume difference as a share of the reference’s volume: 0.1 is 10 % too "
        "large, −0.1 is 10 % too small.",
    ),
    "hd": Words("HD (mm)", "HD is the largest distance, in mm, between the two surfaces: 0 if they are the same."),
    "hd95": Words(
        "HD95 (mm)",
        "HD95 is the distance, in mm, that 95 % of the surface stays within: 0 if the surfaces are the same.",
    ),
    "assd": Words(
        "ASSD (mm)", "ASSD is the average distance, in mm, between the two surfaces: 0 if they are the same."
    ),
    "nsd": Words(
        "surface Dice",
        "Surface Dice is the share of both surfaces that lies within {} of the other one: 1 if all of it does, so that "
        "nothing needs correction.",
        number=" at {} mm",
        default=f"{TOLERANCE_MM:g} mm",
        numbered="{} mm",
    ),
    "lesion_sensitivity": Words(
        "lesion sensitivity",
        "Lesion sensitivity is the share of the expert’s lesions that were found, however small they are. A lesion is "
        "found where the two {}.",
        **_AT_IOU,
    ),
    "lesion_precision": Words(
        "lesion precision",
        "Lesion precision is the share of the segmented lesions that are lesions; the others are false alarms. Two "
        "lesions match if they {}.",
        **_AT_IOU,
    ),
    "lesion_f1": Words(
        "lesion F1",
        "Lesion F1 joins lesion sensitivity and lesion precision: 1 if every lesion was found without a false alarm, 0 "
        "if none was. Two lesions match if they {}.",
        **_AT_IOU,
    ),
    "ece": Words(
        "calibration error",
        "Calibration error is how far the network’s probabilities are, on average, from how often it is right: 0 if "
        "it is right in 90 % of what it is 90 % sure of, and so on.",
    ),
    "pixel_accuracy": Words(
        "pixel accuracy",
        f"Pixel accuracy is the share of all voxels that have the right class; {_ALL_CLASSES}, and decides it where "
        "organs are small.",
    ),
    "mean_accuracy_by_recall": Words(
        "mean accuracy (recall)",
        f"Mean accuracy by recall is the share of each class that was found, averaged over the classes; {_ALL_CLASSES}.",
    ),
    "mean_accuracy_by_precision": Words(
        "mean accuracy (precision)",
        "Mean accuracy by precision is the share of what was segmented as a class that belongs to it, averaged over the "
        f"classes; {_ALL_CLASSES}.",
    ),
    "mean_iou": Words("mean IoU", f"Mean IoU is the IoU of each class, averaged over the classes; {_ALL_CLASSES}."),
    "frequency_weighted_iou": Words(
        "frequency-weighted IoU",
        f"Frequency-weighted IoU is the IoU of each class, averaged by how many voxels the class has; {_ALL_CLASSES}, "
        "and decides it where organs are small.",
    ),
}  # fmt: skip
"""By the name in METRICS, without its number."""


def short_name(metric: str) -> str:
    """What people call a metric: ``Dice``, ``surface Dice at 2 mm``; a name that METRICS does not have stays itself."""
    words, number = _of(metric)
    return words.name + (words.number.format(number) if number else "") if words else metric


def plain_words(metric: str) -> str:
    """What a metric says, in plain text; with its tolerance, if it has one. Empty where METRICS does not have it."""
    words, number = _of(metric)
    return words.meaning.format(words.numbered.format(number) if number else words.default) if words else ""


def digits_for(metric: str, values: Sequence[float]) -> int:
    """How many digits behind the point tell values apart without pretending more than was measured.

    Args:
        metric: Scores have three; distances and volumes so many that the median has three digits in all.
        values: That are shown together; NaN does not count.
    """
    return significant_digits(values) if short_name(metric).endswith(("(mm)", "(ml)")) else 3


def significant_digits(values: Sequence[float]) -> int:
    """Digits behind the point with which the median size has three in all; 0 to 3."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value) and value)
    return min(3, max(0, 2 - math.floor(math.log10(sizes[len(sizes) // 2])))) if sizes else 1


def is_score(metric: str) -> bool:
    """Whether it lies between 0 and 1, and 1 is best."""
    return metric in METRICS and METRICS[metric].is_ranked and not METRICS[metric].lower_is_better


def _of(metric: str) -> tuple[Words | None, str]:
    base, _, number = metric.partition(":")
    return (WORDS[base], f"{float(number):g}" if number else "") if metric in METRICS else (None, "")
