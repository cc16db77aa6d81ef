"""Scores of a segmentation against a reference, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medseg.metrics.confusion import Counts, dice, iou
from medseg.registry import Registry


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS.

    Args:
        score: Its value for one organ of one case; NaN where it is not defined.
        title: What it is called in papers.
        paper: Where it comes from.
        good_for: When to look at it.
    """

    score: Callable[[Counts], float]
    title: str
    paper: str
    good_for: str


METRICS = Registry(
    "metric",
    {
        "dice": Metric(
            dice,
            title="Dice similarity coefficient",
            paper="Dice 1945, doi:10.2307/1932409",
            good_for="overlap; the field's common currency, hard on small organs",
        ),
        "iou": Metric(
            iou,
            title="Intersection over union (Jaccard index)",
            paper="Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x",
            good_for="overlap; ranks cases as Dice does, stricter in number",
        ),
    },
)
