"""A trained network scored as it will be used: every held-out scan segmented and judged on its own grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medseg.build.data import TrainingData
from medseg.build.model import predictor
from medseg.data.sources import read_label_map
from medseg.data.volume_io import write_volume
from medseg.display import track
from medseg.errors import WorkflowError
from medseg.files import remove_leftovers
from medseg.metrics import METRICS
from medseg.metrics.table import Score, score_case, summarize
from medseg.training.memory import LARGE_SCAN, memory_told
from medseg.workflow import Workflow


def score_held_out(
    plan: Workflow,
    data: TrainingData,
    run: Path,
    *,
    weights: Mapping[str, Tensor],
    device: str,
    called: str,
    keep_in: Path | None = None,
) -> list[Score]:
    """Segment every held-out scan as `medseg predict` would, and score it.

    Args:
        plan: What was trained.
        data: Its cases.
        run: The run folder, with its model.
        weights: Instead of the model's own.
        device: ``cpu`` or ``cuda``.
        called: What people call the weights.
        keep_in: Folder for the segmentations, ``<case>.nii.gz`` on their scans' own grids; None: they are not kept.

    Raises:
        TrainingError: If memory runs out.
    """
    segment = predictor(str(run), device=device, weights=weights, precision=plan.train.precision)
    scores: list[Score] = []
    numbers = data.manifest.patient_numbers()
    if keep_in:
        keep_in.mkdir(exist_ok=True)
        remove_leftovers(keep_in)
    for case in track(data.held_out, f"scoring the {called} checkpoint"):
        assert case.label is not None
        with memory_told(LARGE_SCAN, where=f"case {case.id}"):
            prediction = segment.segment(case.images).label
            if keep_in and case.id == Path(case.id).name:  # an id of a manifest may be no file name
                write_volume(keep_in / f"{case.id}.nii.gz", prediction)
            reference = read_label_map(case.label, data.preprocessing, images=case.images, labels=data.labels)
            scores += score_case(
                case.id,
                reference,
                prediction,
                data.labels,
                unions=plan.validate_.unions,
                metrics=tuple(dict.fromkeys(("dice", *plan.validate_.metrics))),
                patient=numbers[case.patient],
            )
    return scores


def check_metrics(names: Sequence[str]) -> None:
    """Refuse, before a training, what its end could not compute.

    Raises:
        WorkflowError: If a metric is unknown, or needs probabilities.
    """
    for name in names:
        if METRICS[name].needs_probabilities:
            message = f"metric {name!r} needs probabilities, which are not kept; see medseg evaluate"
            raise WorkflowError("E-METRIC-PROBABILITIES", message)


def dice_result(scores: Sequence[Score], organs: Sequence[str]) -> dict[str, Any]:
    """What a training's result says of its scores: ``mean_dice`` over the organs, ``dice`` of each organ and union."""
    dice = {organ: metrics["dice"]["mean"] for organ, metrics in summarize(scores).items() if "dice" in metrics}
    known = [dice[organ] for organ in organs if not math.isnan(dice[organ])]
    return {"mean_dice": float(np.mean(known)) if known else math.nan, "dice": dice}
