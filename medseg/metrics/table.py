"""Scores per case and organ, and what they add up to."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError
from medseg.files import write_atomically
from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.confusion import Counts, count

PER_CASE = "per_case.csv"
"""What a table with a row per case and organ is called, in a run folder and wherever else."""

NUM_RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""

Organs = Mapping[str, Sequence[int]]


class MetricSummary(TypedDict):
    """A metric of an organ over the cases; NaN where there are too few.

    Args:
        mean: Of the cases with a value.
        std: Of the sample.
        median: Of the cases with a value.
        ci95: Where the mean lies, by the percentile bootstrap.
        n: Cases with a value.
        n_missing: Cases where it is NaN.
    """

    mean: float
    std: float
    median: float
    ci95: list[float]
    n: int
    n_missing: int


Summary = dict[str, dict[str, MetricSummary]]
"""By organ, then by metric."""


@dataclass(frozen=True)
class Score:
    """How well one organ of one case was found.

    Args:
        case: The case's id.
        organ: Organ, region or union of labels.
        values: Metric to value; NaN where it is not defined.
        note: Why a value is NaN or 0, or else empty.
    """

    case: str
    organ: str
    values: Mapping[str, float]
    note: str = ""


def score_case(
    case: str,
    reference: Volume,
    prediction: Volume,
    labels: Labels,
    *,
    unions: Organs | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
) -> list[Score]:
    """Score every organ of a case.

    Args:
        case: Its id.
        reference: Label map (1, I, J, K) that an expert drew.
        prediction: Label map on the same grid.
        labels: Which organs there are, and the ignore label.
        unions: Label values also scored together, by name.
        metrics: Names in METRICS.

    Raises:
        GeometryError: If the label maps do not stand on the same grid.
        WorkflowError: If a metric is unknown.
    """
    organs = labels.scored(unions or {})
    return score_organs(case, reference, prediction, organs, ignore_label=labels.ignore_label, metrics=metrics)


def score_organs(
    case: str,
    reference: Volume,
    prediction: Volume,
    organs: Organs,
    *,
    ignore_label: int | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
) -> list[Score]:
    """As `score_case`, for label maps that no `Labels` describes.

    Args:
        case: Its id.
        reference: Label map (1, I, J, K) that an expert drew.
        prediction: Label map on the same grid.
        organs: Label values that make up each organ.
        ignore_label: Value of the reference's voxels that do not count.
        metrics: Names in METRICS.

    Raises:
        GeometryError: If the label maps do not stand on the same grid.
        WorkflowError: If a metric is unknown.
    """
    chosen = {name: METRICS[name] for name in metrics}
    check_same_grid(case, reference, prediction)
    counts = count(reference.array, prediction.array, organs, ignore_label=ignore_label)
    return [
        Score(case, organ, {name: metric.score(found) for name, metric in chosen.items()}, _note(found))
        for organ, found in counts.items()
    ]


def check_same_grid(case: str, reference: Volume, prediction: Volume) -> None:
    """Refuse to compare voxels that lie at different places.

    Raises:
        GeometryError: If shapes or affines differ.
    """
    wanted, found = reference.geometry, prediction.geometry
    if wanted.shape != found.shape:
        raise GeometryError(
            "E-PAIR-SHAPE",
            f"the prediction has {found.shape} voxels, the reference {wanted.shape}; predict on the reference's scan, "
            "or add --resample",
            where=f"case {case}",
        )
    if not wanted.matches(found):
        raise GeometryError(
            "E-PAIR-AFFINE",
            "prediction and reference have the same shape but lie at different places: "
            f"spacing {_mm(found.spacing_mm)} and {_mm(wanted.spacing_mm)} mm, "
            f"orientation {found.orientation} and {wanted.orientation}, "
            f"first voxel at {_mm(found.affine[:3, 3])} and {_mm(wanted.affine[:3, 3])} mm; "
            "correct the files, or add --resample",
            where=f"case {case}",
        )


def summarize(scores: Sequence[Score], *, seed: int = 0) -> Summary:
    """Each organ over the cases.

    Args:
        scores: Rows of any number of cases.
        seed: Of the bootstrap.

    Returns:
        For each organ and metric what `MetricSummary` says.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        for metric, value in score.values.items():
            values.setdefault(score.organ, {}).setdefault(metric, []).append(value)
    return {
        organ: {metric: _summary(np.array(column), seed) for metric, column in columns.items()}
        for organ, columns in values.items()
    }


def write_table(path: Path, scores: Sequence[Score]) -> None:
    """Write a CSV with a row per case and organ: ``case,organ,dice,iou,note``; NaN is an empty field."""
    metrics = list(dict.fromkeys(metric for score in scores for metric in score.values))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", "organ", *metrics, "note"])
    for score in scores:
        numbers = [score.values.get(metric, math.nan) for metric in metrics]
        fields = ["" if math.isnan(number) else f"{number:.6f}" for number in numbers]
        table.writerow([score.case, score.organ, *fields, score.note])
    write_atomically(path, text.getvalue().encode())


def read_table(path: Path) -> list[Score]:
    """The scores that `write_table` wrote."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [
        Score(
            row.pop("case"),
            row.pop("organ"),
            note=row.pop("note"),
            values={m: float(v or "nan") for m, v in row.items()},
        )
        for row in rows
    ]


def _note(counts: Counts) -> str:
    if not counts.in_reference and not counts.in_prediction:
        return "absent in both"
    if not counts.in_prediction:
        return "missed"
    if not counts.in_reference:
        return "false positive: absent in the reference"
    return ""


def _summary(values: npt.NDArray[np.float64], seed: int) -> MetricSummary:
    known = values[~np.isnan(values)]
    n = len(known)
    return {
        "mean": float(known.mean()) if n else math.nan,
        "std": float(known.std(ddof=1)) if n > 1 else math.nan,
        "median": float(np.median(known)) if n else math.nan,
        "ci95": _ci95(known, seed) if n > 1 else [math.nan, math.nan],
        "n": n,
        "n_missing": len(values) - n,
    }


def _ci95(values: npt.NDArray[np.float64], seed: int) -> list[float]:
    drawn = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def _mm(numbers: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{number:.4g}" for number in numbers) + ")"
