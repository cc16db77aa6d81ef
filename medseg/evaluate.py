"""`medseg evaluate`: segmentations against references, per case and organ."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medseg.data.checks import check_label_values
from medseg.data.inputs import MANIFEST_SUFFIX, PROBABILITIES, check_unique, find_cases, manifest_cases
from medseg.data.manifest import Manifest
from medseg.data.volume_io import read_label
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.table import PER_CASE, Score, Summary, score_organs, summarize, write_table
from medseg.model import load_spec

Result = dict[str, Any]
Drawn = tuple[Path, Path | None]
"""A label map, and the scan that it was drawn on, where that is known."""


@dataclass(frozen=True)
class Pair:
    """A segmentation and what it should be.

    Args:
        case: Their id.
        prediction: Label map to score.
        reference: Label map that an expert drew.
        image: The scan that it was drawn on, where that is known.
    """

    case: str
    prediction: Path
    reference: Path
    image: Path | None = None


def evaluate(
    predictions: Path,
    references: Path,
    *,
    labels: Path | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
    resample: bool = False,
    output: Path | None = None,
    split: str | None = None,
) -> Result:
    """Score segmentations; files belong together that are called the same, or after the same case.

    Args:
        predictions: A file, or a folder.
        references: A file, a folder, or a manifest, whose labelled cases are the references.
        labels: A manifest or a model that names the labels; None: the references' manifest, or else the
            values that occur.
        metrics: Names in METRICS.
        resample: Bring a prediction that stands on another grid to its reference's, by nearest neighbor,
            and say so in its note.
        output: Folder for `per_case.csv`, made if need be; None: no table is written.
        split: Part of a manifest: ``training``, ``test`` or ``fold_N``; None: whatever is predicted.

    Returns:
        ``cases``, ``mean`` (of the organs' means) and ``per_organ`` for each metric, ``table``, and
        ``unmatched``: what was not scored for want of its counterpart.

    Raises:
        MedsegError: If a file cannot be used or nothing matches; all cases at once.
    """
    for name in metrics:
        METRICS[name]
    expected, manifest = _references(references, split)
    predicted = _predictions(predictions)
    if predictions.is_file() and references.is_file() and not manifest:  # they need no common name
        pairs = [Pair(*predicted.popitem(), *drawn) for drawn in expected.values()]
        unmatched: dict[str, list[str]] = {"predictions": [], "references": []}
    else:
        pairs, unmatched = _matched(predicted, expected, references)
    if manifest and split is None:  # nobody said that all of them should have been predicted
        unmatched["references"] = []
    _warn_of(unmatched)
    described = _read_labels(labels) if labels else manifest.labels if manifest else None
    organs = described.organ_values if described else _values_present(pairs)
    scores = _score(pairs, organs, described, metrics=metrics, resample=resample)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_table(output / PER_CASE, scores)
    summary = summarize(scores)
    return {
        "cases": len(pairs),
        "mean": {metric: _mean_of_organs(summary, metric) for metric in metrics},
        "per_organ": summary,
        "table": str(output / PER_CASE) if output else None,
        "unmatched": unmatched,
    }


def _predictions(path: Path) -> dict[str, Path]:
    """Label map of each case; probabilities that stand beside them are none."""
    cases = find_cases([path])
    check_unique(cases)
    return {case.id: case.images[0] for case in cases if not case.id.endswith(PROBABILITIES)}


def _references(path: Path, split: str | None) -> tuple[dict[str, Drawn], Manifest | None]:
    """Label map of each case with its scan, and the manifest they come from."""
    if path.suffix != MANIFEST_SUFFIX:
        cases = find_cases([path], split=split)
        check_unique(cases)
        return {case.id: (case.images[0], None) for case in cases}, None
    manifest = Manifest.load(path)
    parts = [split] if split else [name for name in ("training", "test") if getattr(manifest, name)]
    cases = [case for part in parts for case in manifest_cases(manifest, part)]
    return {case.id: (case.label, case.images[0]) for case in cases if case.label}, manifest


def _matched(
    predicted: Mapping[str, Path], references: Mapping[str, Drawn], where: Path
) -> tuple[list[Pair], dict[str, list[str]]]:
    """What has a counterpart, and what has none."""
    pairs = [Pair(name, predicted[name], *references[name]) for name in references if name in predicted]
    unmatched = {
        "predictions": [name for name in predicted if name not in references],
        "references": [name for name in references if name not in predicted],
    }
    if not pairs:
        found, wanted = (", ".join(names[:3]) for names in unmatched.values())
        raise DataError(
            "E-NO-PAIRS", f"no prediction ({found} …) is called like a reference ({wanted} …)", where=str(where)
        )
    return pairs, unmatched


def _warn_of(unmatched: Mapping[str, Sequence[str]]) -> None:
    for what, names in unmatched.items():
        if names:
            logging.getLogger("medseg").warning(
                "W-UNMATCHED %d %s without counterpart are not scored: %s", len(names), what, ", ".join(names[:5])
            )


def _read_labels(path: Path) -> Labels:
    if path.suffix == MANIFEST_SUFFIX:
        return Manifest.load(path).labels
    run = path / "model"
    return load_spec(run if run.is_dir() else path).labels


def _values_present(pairs: Sequence[Pair]) -> dict[str, tuple[int, ...]]:
    """Every label value that any file holds, as an organ of its own."""
    found: set[int] = set()
    for pair in track(pairs, "looking for labels"):
        for path in (pair.reference, pair.prediction):
            found.update(int(value) for value in np.unique(read_label(path).array))
    return {f"label {value}": (value,) for value in sorted(found - {0})}


def _score(
    pairs: Sequence[Pair],
    organs: Mapping[str, Sequence[int]],
    labels: Labels | None,
    *,
    metrics: Sequence[str],
    resample: bool,
) -> list[Score]:
    """Score all pairs.

    Raises:
        Problems: All that cannot be scored; a mean over the others would be a mean over the easy ones.
    """
    scores: list[Score] = []
    problems: list[MedsegError] = []
    for pair in track(pairs, "scoring"):
        try:
            reference = read_label(pair.reference, image=pair.image, labels=labels)
            prediction = read_label(pair.prediction)
            if labels:
                check_label_values(reference.array, labels, str(pair.reference))
                check_label_values(prediction.array, labels, str(pair.prediction))
            moved = resample and not prediction.geometry.matches(reference.geometry)
            if moved:
                prediction = _nearest(prediction, reference.geometry)
            ignored = labels.ignore_label if labels else None
            rows = score_organs(pair.case, reference, prediction, organs, ignore_label=ignored, metrics=metrics)
        except MedsegError as error:
            problems.append(error)
            continue
        scores += [replace(row, note=_joined(row.note, "prediction resampled")) for row in rows] if moved else rows
    if problems:
        raise Problems(problems)
    return scores


def _nearest(label: Volume, target: Geometry) -> Volume:
    """A label map on another grid, by nearest neighbor; background outside."""
    n = target.spatial_dims
    between = np.linalg.inv(label.geometry.affine) @ target.affine
    array = ndimage.affine_transform(
        label.array[0], between[:n, :n], between[:n, 3], output_shape=target.shape, order=0, mode="constant", cval=0
    )
    return Volume(array[None], target)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _mean_of_organs(summary: Summary, metric: str) -> float:
    means = [values[metric]["mean"] for values in summary.values() if metric in values]
    known = [mean for mean in means if not math.isnan(mean)]
    return sum(known) / len(known) if known else math.nan
