"""Scores per case and organ, and what they add up to."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError, WorkflowError
from medseg.files import write_atomically
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics import METRICS, Metric
from medseg.metrics.confusion import Counts
from medseg.metrics.evidence import CaseEvidence
from medseg.metrics.lesions import Lesion
from medseg.metrics.statistics import bootstrap_ci

PER_CASE = "per_case.csv"
"""What a table with a row per case and organ is called, in a run folder and wherever else."""

EVALUATION = "evaluation.json"
"""What the result of `medseg evaluate` is called, beside its tables."""

PER_LESION = "per_lesion.csv"
"""What a table with a row per lesion is called."""

ALL_CLASSES = "all classes"
"""Stands for an organ where metrics of scope ``image`` are told."""

MISSED = "missed"
SPURIOUS = "false positive: absent in the reference"
ABSENT = "absent in both"
NOTHING_COUNTS = "every voxel has the ignore label"
"""Notes, which say why a value is NaN or 0; several are joined by ``"; "``."""

Organs = Mapping[str, Sequence[int]]


class MetricSummary(TypedDict):
    """A metric of an organ over the cases; NaN where there are too few.

    Args:
        mean: Of the cases with a value.
        std: Of the sample.
        median: Of the cases with a value.
        p25: First quartile of the cases with a value.
        p75: Third quartile.
        ci95: Where the mean lies, by the bootstrap; over patients where they are known, else over cases.
        n: Cases with a value.
        n_missing: Cases where it is NaN.
        n_missed: Cases whose organ was missed, be the value 0 or NaN.
        n_spurious: Cases whose organ is only in the prediction.
    """

    mean: float
    std: float
    median: float
    p25: float
    p75: float
    ci95: list[float]
    n: int
    n_missing: int
    n_missed: int
    n_spurious: int


Summary = dict[str, dict[str, MetricSummary]]
"""By organ, then by metric."""


@dataclass(frozen=True)
class Score:
    """How well one organ of one case was found.

    Args:
        case: The case's id.
        organ: Organ, region or union of labels; `ALL_CLASSES` for what is told of the case as a whole.
        values: Metric to value; NaN where it is not defined.
        note: Why a value is NaN or 0, or else empty.
        patient: Whose case it is; empty where nobody said.
        diagonal_mm: Length of the scan's diagonal, which no distance in it exceeds.
        lesions: Its lesions, if they were asked for.
    """

    case: str
    organ: str
    values: Mapping[str, float]
    note: str = ""
    patient: str = ""
    diagonal_mm: float = math.nan
    lesions: Sequence[Lesion] = ()

    @property
    def is_missed(self) -> bool:
        return MISSED in self.note.split("; ")

    @property
    def is_spurious(self) -> bool:
        return SPURIOUS in self.note.split("; ")


def score_case(
    case: str,
    reference: Volume,
    prediction: Volume,
    labels: Labels,
    *,
    unions: Organs | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
    patient: str = "",
) -> list[Score]:
    """Score every organ of a case.

    Args:
        case: Its id.
        reference: Label map (1, I, J[, K]) that an expert drew.
        prediction: Label map on the same grid.
        labels: Which organs there are, and the ignore label.
        unions: Label values also scored together, by name.
        metrics: Names in METRICS.
        patient: Whose case it is.

    Raises:
        GeometryError: If the label maps do not stand on the same grid.
        WorkflowError: If a metric is unknown.
    """
    organs, ignored = labels.scored(unions or {}), labels.ignore_label
    return score_organs(case, reference, prediction, organs, ignore_label=ignored, metrics=metrics, patient=patient)


def score_organs(
    case: str,
    reference: Volume,
    prediction: Volume,
    organs: Organs,
    *,
    ignore_label: int | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
    patient: str = "",
    probabilities: Mapping[str, npt.NDArray[np.floating]] | None = None,
    with_lesions: bool = False,
) -> list[Score]:
    """As `score_case`, for label maps that no `Labels` describes.

    Args:
        case: Its id.
        reference: Label map (1, I, J[, K]) that an expert drew.
        prediction: Label map on the same grid.
        organs: Label values that make up each organ.
        ignore_label: Value of the reference's voxels that do not count.
        metrics: Names in METRICS.
        patient: Whose case it is.
        probabilities: Predicted probability of each organ, (I, J[, K]), for metrics that need it.
        with_lesions: Whether to tell of each lesion too.

    Returns:
        A row for each organ, then one for `ALL_CLASSES` if a metric's scope is the image.

    Raises:
        GeometryError: If the label maps do not stand on the same grid.
        WorkflowError: If a metric is unknown, or needs probabilities and there are none.
    """
    chosen = {name: METRICS[name] for name in metrics}
    _check_probabilities(chosen, given=probabilities is not None)
    check_same_grid(case, reference, prediction)
    grid = reference.geometry
    evidence = CaseEvidence(
        reference.array[0], prediction.array[0], organs,
        spacing_mm=grid.spacing_mm, voxel_ml=grid.voxel_ml if grid.spatial_dims == 3 else math.nan,
        ignore_label=ignore_label, probabilities=probabilities,
    )  # fmt: skip
    rows = [
        _score_organ(case, evidence, organ, _of_scope(chosen, "organ"), with_lesions=with_lesions) for organ in organs
    ]
    rows += _score_image(case, evidence, _of_scope(chosen, "image"))
    return [replace(row, patient=patient, diagonal_mm=_diagonal_mm(grid)) for row in rows]


def _score_organ(
    case: str, evidence: CaseEvidence, name: str, metrics: Mapping[str, Metric], *, with_lesions: bool
) -> Score:
    organ = evidence.organ(name)
    values = {called: metric.score(organ) for called, metric in metrics.items()}
    lesions = organ.lesions.table(evidence.voxel_ml) if with_lesions else ()
    note = _note(organ.counts) if evidence.confusion.joint.any() else NOTHING_COUNTS
    return Score(case, name, values, note, lesions=lesions)


def _score_image(case: str, evidence: CaseEvidence, metrics: Mapping[str, Metric]) -> list[Score]:
    """One row, or none if no metric looks at the image."""
    if not metrics:
        return []
    values = {called: metric.score(evidence) for called, metric in metrics.items()}
    return [Score(case, ALL_CLASSES, values, "" if evidence.confusion.joint.any() else NOTHING_COUNTS)]


def _of_scope(metrics: Mapping[str, Metric], scope: str) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if metric.scope == scope}


def _check_probabilities(metrics: Mapping[str, Metric], *, given: bool) -> None:
    needy = [name for name, metric in metrics.items() if metric.needs_probabilities]
    if needy and not given:
        message = f"{', '.join(needy)} needs probabilities, label maps do not suffice; predict with --probabilities"
        raise WorkflowError("E-METRIC-PROBABILITIES", message)


def _diagonal_mm(grid: Geometry) -> float:
    return float(np.linalg.norm(np.multiply(grid.shape, grid.spacing_mm)))


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
    columns: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        for metric in score.values:
            columns.setdefault(score.organ, {}).setdefault(metric, []).append(score)
    return {
        organ: {metric: _summary(rows, metric, seed) for metric, rows in of_organ.items()}
        for organ, of_organ in columns.items()
    }


def write_table(path: Path, scores: Sequence[Score]) -> None:
    """Write a CSV with a row per case and organ: ``case,organ,patient,dice,iou,diagonal_mm,note``.

    NaN is an empty field.
    """
    metrics = list(dict.fromkeys(metric for score in scores for metric in score.values))
    rows = (
        [
            *(score.case, score.organ, score.patient),
            *(_field(score.values.get(metric, math.nan)) for metric in metrics),
            *(_field(score.diagonal_mm), score.note),
        ]
        for score in scores
    )
    _write(path, ["case", "organ", "patient", *metrics, "diagonal_mm", "note"], rows)


def read_table(path: Path) -> list[Score]:
    """The scores that `write_table` wrote, also before there were patients and diagonals; lesions are not in it.

    Raises:
        DataError: If it is no CSV.
        KeyError: If a column is missing.
        ValueError: If a value is no number.
    """
    return [
        Score(
            row.pop("case"),
            organ := row.pop("organ"),
            note=row.pop("note"),
            patient=row.pop("patient", ""),
            diagonal_mm=_number(row.pop("diagonal_mm", "")),
            values={metric: _number(field) for metric, field in row.items() if belongs(metric, organ)},
        )
        for row in read_rows(path)
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a heading; what a short one lacks is empty.

    Raises:
        DataError: If it is no CSV in UTF-8 (a byte order mark is passed over), or a row is longer than the heading.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"is no CSV in UTF-8 ({error}); save it as “CSV UTF-8”"
        raise DataError("E-TABLE", message, where=str(path)) from None
    for number, row in enumerate(rows, start=2):
        if None in row:  # where csv puts what is too much, as of 0,5 for 0.5
            raise DataError("E-TABLE", "has more fields than the heading names", where=f"{path}:{number}")
    return rows


def write_lesions(path: Path, scores: Sequence[Score]) -> None:
    """Write a CSV with a row per lesion: ``case,organ,patient,in_reference,num_voxels,volume_ml,is_matched,dice``.

    First every lesion of the reference, then every predicted one that matches none; NaN is an empty field.
    """
    rows = (
        [score.case, score.organ, score.patient, *(_field(value) for value in asdict(lesion).values())]
        for score in scores
        for lesion in score.lesions
    )
    _write(path, ["case", "organ", "patient", *(field.name for field in fields(Lesion))], rows)


def _write(path: Path, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heading, *rows])
    write_atomically(path, text.getvalue().encode())


def _field(value: float) -> str:
    if isinstance(value, int):  # a count, or yes and no as 1 and 0
        return str(int(value))
    return "" if math.isnan(value) else f"{value:.6f}"


def _number(field: str) -> float:
    value = float(field or "nan")
    if math.isinf(value):
        raise ValueError(f"{field} is no value of a metric")
    return value


def belongs(metric: str, organ: str) -> bool:
    """Whether a row has such a value: the image's metrics stand in a row of their own."""
    return metric not in METRICS or (METRICS[metric].scope == "image") == (organ == ALL_CLASSES)


def _note(counts: Counts) -> str:
    if not counts.in_reference and not counts.in_prediction:
        return ABSENT
    if not counts.in_prediction:
        return MISSED
    if not counts.in_reference:
        return SPURIOUS
    return ""


def _summary(rows: Sequence[Score], metric: str, seed: int) -> MetricSummary:
    scored = [row for row in rows if not math.isnan(row.values[metric])]
    values = np.array([row.values[metric] for row in scored])
    n = len(values)
    p25, median, p75 = np.percentile(values, [25, 50, 75]) if n else [math.nan] * 3
    return {
        "mean": float(values.mean()) if n else math.nan,
        "std": float(values.std(ddof=1)) if n > 1 else math.nan,
        "median": float(median),
        "p25": float(p25),
        "p75": float(p75),
        "ci95": _ci95(values, scored, seed) if n > 1 else [math.nan, math.nan],
        "n": n,
        "n_missing": len(rows) - n,
        "n_missed": sum(row.is_missed for row in rows),
        "n_spurious": sum(row.is_spurious for row in rows),
    }


def _ci95(values: npt.NDArray[np.float64], rows: Sequence[Score], seed: int) -> list[float]:
    """Cases of a patient are drawn together; a case that nobody assigned is a patient of its own."""
    low, high = bootstrap_ci(values, patients=[row.patient or row.case for row in rows], seed=seed)
    return [low, high]


def _mm(numbers: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{number:.4g}" for number in numbers) + ")"
