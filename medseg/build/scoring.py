"""A trained network scored as it will be used: every held-out scan segmented and judged on its own grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medseg.build.data import TrainingData
from medseg.build.model import predictor
from medseg.build.postprocessing import FEW_PATIENTS, as_steps, choose, pieces_in
from medseg.data.manifest import Case
from medseg.data.sources import read_label_map
from medseg.data.volume_io import read_label, write_volume
from medseg.display import console, track
from medseg.errors import WorkflowError
from medseg.files import remove_leftovers
from medseg.geometry import Volume
from medseg.metrics import METRICS
from medseg.metrics.table import Score, score_case, summarize
from medseg.model import set_postprocess
from medseg.training.memory import LARGE_SCAN, memory_told
from medseg.workflow import Workflow

log = logging.getLogger("medseg")


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
    if keep_in:
        keep_in.mkdir(exist_ok=True)
        remove_leftovers(keep_in)
    for case in track(data.held_out, f"scoring the {called} checkpoint"):
        with memory_told(LARGE_SCAN, where=f"case {case.id}"):
            prediction = segment.segment(case.images).label
            if keep_in and _is_file_name(case.id):
                write_volume(keep_in / f"{case.id}.nii.gz", prediction)
            scores += _scored(plan, data, case, prediction)
    return scores


def _scored(plan: Workflow, data: TrainingData, case: Case, prediction: Volume) -> list[Score]:
    return score_case(
        case.id,
        _reference(data, case),
        prediction,
        data.labels,
        unions=plan.validate_.unions,
        metrics=tuple(dict.fromkeys(("dice", *plan.validate_.metrics))),
        patient=data.manifest.patient_numbers()[case.patient],
    )


def _reference(data: TrainingData, case: Case) -> Volume:
    assert case.label is not None
    return read_label_map(case.label, data.preprocessing, images=case.images, labels=data.labels)


def _is_file_name(case_id: str) -> bool:
    """An id of a manifest may be none."""
    return case_id == Path(case_id).name


def score_postprocessed(
    plan: Workflow, data: TrainingData, run: Path, *, weights: Mapping[str, Tensor], device: str, kept_in: Path
) -> list[Score]:
    """Score again what `score_held_out` has kept, after the model's post-processing has changed.

    Args:
        plan: What was trained.
        data: Its cases.
        run: The run folder, with its model.
        weights: Instead of the model's own, for cases that were not kept.
        device: ``cpu`` or ``cuda``.
        kept_in: Folder with the segmentations, which are overwritten.
    """
    segment = predictor(str(run), device=device, weights=weights, precision=plan.train.precision)
    scores: list[Score] = []
    for case in track(data.held_out, "scoring after post-processing"):
        if _is_file_name(case.id):
            file = kept_in / f"{case.id}.nii.gz"
            prediction = segment.postprocessed(read_label(file))
            write_volume(file, prediction)
        else:
            prediction = segment.segment(case.images).label
        scores += _scored(plan, data, case, prediction)
    return scores


def choose_postprocessing(data: TrainingData, model: Path, predictions: Path) -> dict[str, Any]:
    """Choose post-processing on the held-out cases, see `medseg.build.postprocessing`, and write it into the model.

    Dice on the cases that it was chosen on flatters it a little; other cases tell the truth.

    Args:
        data: The cases.
        model: The model's folder; it has no post-processing yet.
        predictions: Folder with the segmentations that `score_held_out` has kept.

    Returns:
        What was chosen, as a workflow would say it, organ by organ.
    """
    cases = [case for case in data.held_out if _is_file_name(case.id)]
    labels, found = data.labels, []
    for case in track(cases, "choosing post-processing"):
        prediction, reference = read_label(predictions / f"{case.id}.nii.gz"), _reference(data, case)
        grid = prediction.geometry
        voxel_ml = grid.voxel_ml if grid.spatial_dims == 3 else math.nan
        found.append(
            pieces_in(
                prediction.array[0], reference.array[0], labels.organ_values,
                voxel_ml=voxel_ml, ignore_label=labels.ignore_label,
            )
        )  # fmt: skip
    patients = [case.patient for case in cases]
    choices = choose(found, patients)
    told = "; ".join(map(str, choices)) or "none, as no step raises the Dice by more than chance"
    console().print(f"post-processing: {told}", markup=False)
    if choices and len(set(patients)) < FEW_PATIENTS:
        log.warning(
            "W-FEW-CASES post-processing was chosen on %d patients, which may be chance: %s", len(set(patients)), told
        )
    steps = as_steps(choices)
    set_postprocess(model, steps)
    return steps


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


def metric_means(scores: Sequence[Score]) -> dict[str, float]:
    """Every metric's mean over the cases, by ``metric/organ``; the distances are those of organs that were found."""
    known: dict[str, list[float]] = {}
    for score in scores:
        for metric, value in score.values.items():
            if not math.isnan(value):
                known.setdefault(f"{metric}/{score.organ}", []).append(value)
    return {name: float(np.mean(values)) for name, values in known.items()}
