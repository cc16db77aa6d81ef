"""What the scores of all cases come to: means, agreement of volumes, lesions by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medseg.metrics.groups import asks_for_lesions
from medseg.metrics.lesions import by_size
from medseg.metrics.statistics import bland_altman, mean_of_known
from medseg.metrics.table import ALL_CLASSES, Score, Summary, summarize

Result = dict[str, Any]

VOLUMES = ("reference_volume_ml", "volume_ml")
"""Metrics that scores must have for the agreement of volumes."""


def overview(scores: Sequence[Score], metrics: Sequence[str]) -> Result:
    """Every organ, and all of them.

    Args:
        scores: Of any number of cases, with the metrics and `VOLUMES`.
        metrics: What is told.

    Returns:
        ``mean`` of the organs' means for each metric; ``per_organ``, see `summarize`; ``volumes``: Bland and Altman's
        numbers by organ; ``lesions`` by organ and size, if a metric looks at them; ``patients``: how many, None: none
        is named, and each case counts as one.
    """
    summary = summarize(only(scores, metrics))
    return {
        "mean": {metric: _mean_of_organs(summary, metric) for metric in metrics},
        "per_organ": {organ: values for organ, values in summary.items() if values},
        "volumes": _volume_agreement(scores),
        **({"lesions": _lesions_by_size(scores)} if asks_for_lesions(metrics) else {}),
        "patients": len({score.patient or score.case for score in scores}) if any(s.patient for s in scores) else None,
    }


def only(scores: Sequence[Score], metrics: Sequence[str]) -> list[Score]:
    """The same rows without the values of other metrics."""
    return [
        replace(score, values={name: score.values[name] for name in metrics if name in score.values})
        for score in scores
    ]


def _mean_of_organs(summary: Summary, metric: str) -> float:
    return float(mean_of_known([values[metric]["mean"] for values in summary.values() if metric in values]))


def _volume_agreement(scores: Sequence[Score]) -> dict[str, Result]:
    """In ml by organ, of the cases where either has it; none for pictures."""
    pairs: dict[str, list[list[float]]] = {}
    for score in scores:
        volumes = [score.values.get(name, math.nan) for name in VOLUMES]
        if any(volumes) and not any(map(math.isnan, volumes)):
            pairs.setdefault(score.organ, []).append(volumes)
    agreement = {}
    for organ, volumes_of in pairs.items():
        reference, prediction = np.transpose(volumes_of)
        bias, limits = bland_altman(reference, prediction)
        agreement[organ] = {
            "n": len(reference),
            "mean_reference_ml": float(reference.mean()),
            "mean_prediction_ml": float(prediction.mean()),
            "bias_ml": bias,
            "limits_ml": list(limits),
        }
    return agreement


def _lesions_by_size(scores: Sequence[Score]) -> dict[str, list[Result]]:
    organs = dict.fromkeys(score.organ for score in scores if score.organ != ALL_CLASSES)
    return {
        organ: [
            asdict(size) for size in by_size([n for score in scores if score.organ == organ for n in score.lesions])
        ]
        for organ in organs
    }
