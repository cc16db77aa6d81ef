"""`medseg train`: a workflow becomes a trained model, an MLflow run and a table of Dice per case and organ."""

from __future__ import annotations

import json
import math
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.build.data import TrainingData, manifest, training_data
from medseg.build.model import Hardware, predictor, specification
from medseg.build.provenance import run_tags
from medseg.build.training import check_parts, recorded
from medseg.build.training import tracker as make_tracker
from medseg.build.training import trainer as make_trainer
from medseg.data.sources import read_label_map
from medseg.display import console, track
from medseg.errors import Interrupted, WorkflowError
from medseg.files import write_atomically
from medseg.metrics.table import Score, score_case, summarize, write_table
from medseg.model import save_model
from medseg.training.live import LiveDisplay
from medseg.training.run_folder import RESULT, RunFolder
from medseg.training.signals import ending_work
from medseg.training.state import Progress
from medseg.training.trainer import Trainer
from medseg.training.validator import Validator
from medseg.workflow import Workflow

RUNS = Path("runs")
REHEARSED_ITERATIONS = 5

Result = dict[str, Any]


def train(
    workflow: Path,
    *,
    overrides: Sequence[str] = (),
    fold: str | None = None,
    output: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    dry_run: bool = False,
) -> Result:
    """Train what a workflow describes.

    Args:
        workflow: The YAML file.
        overrides: ``train.batch_size=4`` and the like.
        fold: The fold held out, instead of the workflow's; ``all`` trains every fold, one after the other.
        output: Run folder; by default ``runs/<name>/<time>-<id>``.
        resume: Go on with the run in `output`, or with the workflow's latest unfinished one.
        device: ``auto``, ``cpu`` or ``cuda``.
        dry_run: Build everything, run a few iterations, say how long the training will take, and stop.

    Returns:
        ``run_dir, mlflow_run_id, model_dir, best {step, mean_dice, dice}, seconds, iterations``, and more.

    Raises:
        MedsegError: For everything a user can mend.
    """
    plan = Workflow.load(workflow, overrides)
    hardware = Hardware(device)
    held_out = _fold(fold, plan)
    if dry_run:
        return _rehearse(plan, 0 if held_out is None else held_out, hardware)
    folder = _choose_folder(plan, output, resume=resume, all_folds=held_out is None)
    try:
        if held_out is None:
            return _cross_validate(plan, folder, hardware)
        return _train_fold(plan, folder, held_out, hardware)
    except Interrupted as stop:
        command = ["medseg", "train", str(workflow)]
        for override in overrides:
            command += ["--set", override]
        command += ["--fold", fold] if fold else []
        command += ["--device", device] if device != "auto" else []
        message = f"{stop.message}; go on with: {shlex.join([*command, '--output', str(folder), '--resume'])}"
        raise Interrupted(stop.error_id, message) from None


def _train_fold(
    plan: Workflow, path: Path, fold: int, hardware: Hardware, *, parent_run_id: str | None = None
) -> Result:
    started = time.monotonic()
    plan = plan.model_copy(update={"validate_": plan.validate_.model_copy(update={"fold": fold})})  # as it is recorded
    data = _prepare(plan, fold)
    display = LiveDisplay(console(), f"{plan.name} fold {fold}", plan.train.iterations)
    trainer = make_trainer(plan, data, observer=display, hardware=hardware)
    with RunFolder(path) as folder:  # only now: what cannot be built leaves no trace
        _record(plan, data, folder)
        tags = run_tags(plan, data)
        tracker = make_tracker(plan, path, run_name=f"{plan.name}-fold{fold}", tags=tags, parent_run_id=parent_run_id)
        try:
            with display:
                progress = trainer.fit(folder, tracker)
            with ending_work("the training is done and saved, its scoring is not"):
                result = _finish(plan, data, trainer, progress, tracker)
            result["seconds"] = round(time.monotonic() - started, 1)
            tracker.log_metrics({"seconds": result["seconds"]}, progress.step)
        except (Interrupted, KeyboardInterrupt):
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")
        folder.write(RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _prepare(plan: Workflow, fold: int) -> TrainingData:
    source = manifest(plan)
    check_parts(plan, source)
    return training_data(plan, source, fold)


def _finish(plan: Workflow, data: TrainingData, trainer: Trainer, progress: Progress, tracker: Any) -> Result:
    """Keep the best weights as a model and score both checkpoints on every held-out scan's own grid."""
    folder = trainer.folder
    provenance = {
        "run_dir": str(folder.path),
        "mlflow_run_id": tracker.run_id,
        "fold": data.fold,
        "step": progress.best_step,
        **run_tags(plan, data),
    }
    best = trainer.best.load()
    weights = {"best": best["network"] if best else trainer.trained.state_dict(), "last": trainer.trained.state_dict()}
    save_model(folder.model, specification(plan, data.manifest, data.preprocessing, provenance), weights["best"])
    final: dict[str, Any] = {}
    for which in ("last", "best"):
        if which == "best" and progress.best_step == progress.step:
            final["best"] = final["last"]
            continue
        scores = _score(plan, data, folder.path, weights[which], trainer.fabric.device.type, which)
        final[which] = _means(scores)
    write_table(folder.path / "per_case.csv", scores)
    organs = list(data.labels.organs)
    for which, dice in final.items():
        tracker.log_metrics(
            {f"final/{which}/dice/{organ}": value for organ, value in dice.items()}
            | {f"final/{which}/mean_dice": _mean(dice, organs)},
            progress.step,
        )
    for name in ("per_case.csv", "validation.csv", "workflow.yaml", "manifest.json"):
        tracker.log_file(folder.path / name)
    for name in ("model.json", "model.safetensors"):
        tracker.log_file(folder.model / name, "model")
    return {
        "run_dir": str(folder.path),
        "mlflow_run_id": tracker.run_id,
        "model_dir": str(folder.model),
        "pictures": str(folder.pictures),
        "per_case": str(folder.path / "per_case.csv"),
        "best": {"step": progress.best_step, "mean_dice": _mean(final["best"], organs), "dice": final["best"]},
        "last": {"step": progress.step, "mean_dice": _mean(final["last"], organs), "dice": final["last"]},
        "iterations": progress.step,
        "seconds_waiting_for_data": round(trainer.seconds_waiting, 1),
        "seconds_training": round(trainer.seconds_training, 1),
    }


def _score(
    plan: Workflow, data: TrainingData, run: Path, weights: Mapping[str, Any], device: str, which: str
) -> list[Score]:
    """Segment every held-out scan as `medseg predict` would, and score it on its own grid."""
    segment = predictor(str(run), device=device, weights=weights, precision=plan.train.precision)
    scores: list[Score] = []
    for case in track(data.held_out, f"scoring the {which} checkpoint"):
        assert case.label is not None
        prediction = segment.segment(case.images).label
        reference = read_label_map(case.label, data.preprocessing, images=case.images, labels=data.labels)
        scores += score_case(case.id, reference, prediction, data.labels, unions=plan.validate_.unions)
    return scores


def _cross_validate(plan: Workflow, path: Path, hardware: Hardware) -> Result:
    """Every fold, one after the other, as nested MLflow runs under a parent that holds the joint result."""
    source = manifest(plan)
    check_parts(plan, source)
    folds = sorted(set(source.folds().values()))
    for fold in folds:
        source.split(fold)
    path.mkdir(parents=True, exist_ok=True)
    parent = make_tracker(plan, path, run_name=f"{plan.name}-cv", tags={"medseg.folds": str(len(folds))})
    results = []
    try:
        for fold in folds:
            done = path / f"fold_{fold}" / RESULT
            if done.exists():
                results.append(json.loads(done.read_text()))
            else:
                results.append(_train_fold(plan, done.parent, fold, hardware, parent_run_id=parent.run_id))
    except (Interrupted, KeyboardInterrupt):
        parent.finish("KILLED")
        raise
    except BaseException:
        parent.finish("FAILED")
        raise
    best = {
        organ: float(np.nanmean([r["best"]["dice"][organ] for r in results])) for organ in results[0]["best"]["dice"]
    }
    mean = float(np.mean([r["best"]["mean_dice"] for r in results]))
    parent.log_metrics({f"cv/dice/{organ}": value for organ, value in best.items()} | {"cv/mean_dice": mean}, 0)
    parent.finish("FINISHED")
    joint = {
        "run_dir": str(path),
        "mlflow_run_id": parent.run_id,
        "best": {"mean_dice": mean, "dice": best},
        "folds": results,
        "seconds": sum(r["seconds"] for r in results),
        "iterations": sum(r["iterations"] for r in results),
    }
    write_atomically(path / RESULT, (json.dumps(joint, indent=1) + "\n").encode())
    return joint


def _rehearse(plan: Workflow, fold: int, hardware: Hardware) -> Result:
    """Build everything, time a few iterations and one validation case, and extrapolate."""
    data = _prepare(plan, fold)
    display = LiveDisplay(console(), plan.name, plan.train.iterations)
    trainer = make_trainer(plan, data, observer=display, hardware=hardware)
    seconds = []
    asked = time.monotonic()
    for batch, _ in zip(trainer.batches(0), range(REHEARSED_ITERATIONS * plan.train.accumulate), strict=False):
        loss = trainer.train_step([trainer.fabric.to_device(batch)])
        seconds.append(time.monotonic() - asked)
        asked = time.monotonic()
    assert isinstance(trainer.validate, Validator)
    trainer.trained.eval()
    trainer.validate.predict(trainer.trained, data.validation[0])
    validation = time.monotonic() - asked
    step = float(np.median(seconds)) * plan.train.accumulate
    num_validations = math.ceil(plan.train.iterations / plan.train.validate_every)
    num_cases = min(plan.validate_.max_cases, len(data.validation))
    scoring = 2 * len(data.held_out) * 2 ** len(plan.infer.mirror_axes)  # best and last, in all mirrored copies
    total = plan.train.iterations * step + (num_validations * num_cases + scoring) * validation
    console().print(
        f"{plan.name}: {len(data.training)} training and {len(data.validation)} held-out cases; "
        f"{step:.2f} s an iteration, {validation:.1f} s a validation case: about {_duration(total)} on this machine"
    )
    return {
        "dry_run": True,
        "seconds_per_iteration": step,
        "seconds_per_validation_case": validation,
        "seconds": round(total),
        "iterations": plan.train.iterations,
        "loss": loss,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
    }


def _fold(fold: str | None, plan: Workflow) -> int | None:
    """The fold to hold out; None for all of them."""
    if fold is None:
        return plan.validate_.fold
    if fold == "all":
        return None
    if not fold.isdigit():
        raise WorkflowError("E-FOLD", f"{fold!r} must be a number or 'all'", where="--fold")
    return int(fold)


def _choose_folder(plan: Workflow, output: Path | None, *, resume: bool, all_folds: bool) -> Path:
    if not resume:
        if output and output.exists() and any(output.iterdir()):
            raise WorkflowError(
                "E-OUTPUT-EXISTS",
                "is not empty; add --resume to go on with it, or choose another",
                where=f"--output {output}",
            )
        return output or RUNS / plan.name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if output:
        if not output.exists():
            console().print(f"{output} holds no run yet: a new one starts", style="yellow", markup=False)
        return output
    started = sorted((RUNS / plan.name).glob("*-*"))
    unfinished = [run for run in started if not (run / RESULT).exists() and _is_of_folds(run) == all_folds]
    if not unfinished:
        raise WorkflowError(
            "E-RESUME", f"{RUNS / plan.name} holds no unfinished run; name one with --output", where="--resume"
        )
    return unfinished[-1]


def _is_of_folds(run: Path) -> bool:
    return any(run.glob("fold_*"))


def _record(plan: Workflow, data: TrainingData, folder: RunFolder) -> None:
    resolved = recorded(plan).model_copy(update={"data": plan.data.model_copy(update={"manifest": "manifest.json"})})
    folder.record("workflow.yaml", resolved.to_yaml())
    folder.record("manifest.json", json.dumps(data.manifest.to_dict(data.hashes), indent=1) + "\n")


def _means(scores: Sequence[Score]) -> dict[str, float]:
    return {organ: metrics["dice"]["mean"] for organ, metrics in summarize(scores).items()}


def _mean(dice: Mapping[str, float], organs: Sequence[str]) -> float:
    values = [dice[organ] for organ in organs if not math.isnan(dice[organ])]
    return float(np.mean(values)) if values else math.nan


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
