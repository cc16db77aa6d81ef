"""`medseg train`: a workflow becomes a trained model, an MLflow run and a table of Dice per case and organ."""

from __future__ import annotations

import json
import logging
import math
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medseg.build.balance import balanced_weights, weights_told, with_class_weights
from medseg.build.data import TrainingData, manifest, training_data
from medseg.build.model import Hardware, specification
from medseg.build.provenance import MANIFEST_TAG, run_tags, workflow_tags
from medseg.build.scoring import choose_postprocessing, dice_result, metric_means, score_held_out, score_postprocessed
from medseg.build.training import check_parts, listener, recorded
from medseg.build.training import tracker as make_tracker
from medseg.build.training import trainer as make_trainer
from medseg.data.manifest import Manifest
from medseg.display import console, track
from medseg.errors import Interrupted, TrainingError, WorkflowError
from medseg.memory import keep_freed_memory
from medseg.metrics.table import PER_CASE, read_table, write_table
from medseg.model import load_spec, save_model
from medseg.reporting.page import REPORT
from medseg.reporting.run import PREDICTIONS
from medseg.reporting.run_page import write_run_page
from medseg.tracking.mlflow_tracker import MlflowTracker
from medseg.training.live import LiveDisplay
from medseg.training.memory import memory_told
from medseg.training.run_folder import FOLDS, RESULT, RunFolder
from medseg.training.signals import ending_work
from medseg.training.state import Progress
from medseg.training.trainer import Trainer
from medseg.training.validator import Validator
from medseg.wording import duration
from medseg.workflow import Workflow

RUNS = Path("runs")
REHEARSED_ITERATIONS = 5

RESUMABLE = ("E-INTERRUPTED", "E-WORKER")
"""What ends a training with its state saved, to be gone on with as it is."""

FREE_TO_CHANGE = ("workers:",)
"""What a resumed run may have otherwise than it began: nobody sees in a result how many processes read its cases."""

Result = dict[str, Any]

log = logging.getLogger("medseg")


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
        ``run_dir, mlflow_run_id, model_dir, per_case, best {step, mean_dice, dice}, seconds, iterations``, and more.
        Of all folds ``folds`` has these for each; ``per_case`` and ``best`` are of all cases, each scored by the model
        that has not seen it, ``model_dir`` and ``best.step`` are None, and ``model_dirs`` lists the models.

    Raises:
        MedsegError: For everything a user can mend.
    """
    plan = Workflow.load(workflow, overrides)
    hardware = Hardware(device)
    keep_freed_memory()
    held_out = _fold(fold, plan)
    if dry_run:
        return _rehearse(plan, 0 if held_out is None else held_out, hardware)
    folder = _choose_folder(plan, output, resume=resume, all_folds=held_out is None)
    try:
        if held_out is None:
            return _cross_validate(plan, folder, hardware)
        return _train_fold(plan, folder, held_out, hardware)
    except (Interrupted, TrainingError) as stop:
        if stop.error_id not in RESUMABLE:
            raise
        command = ["medseg", "train", str(workflow)]
        for override in overrides:
            command += ["--set", override]
        command += ["--fold", fold] if fold else []
        command += ["--device", device] if device != "auto" else []
        stop.message += f"; go on with: {shlex.join([*command, '--output', str(folder), '--resume'])}"
        raise


def _train_fold(
    plan: Workflow, path: Path, fold: int, hardware: Hardware, *, parent_run_id: str | None = None
) -> Result:
    started = time.monotonic()
    plan = plan.model_copy(update={"validate_": plan.validate_.model_copy(update={"fold": fold})})  # as it is recorded
    plan, data = _prepare(plan, fold, hardware)
    display = LiveDisplay(console(), f"{plan.name} fold {fold}", plan.train.iterations)
    with _training_memory(plan):
        trainer = make_trainer(plan, data, observer=display, hardware=hardware)
    with RunFolder(path) as folder:  # only now: what cannot be built leaves no trace
        _record(plan, data, folder)
        tags = run_tags(plan, data)
        tracker = make_tracker(plan, path, run_name=f"{plan.name}-fold{fold}", tags=tags, parent_run_id=parent_run_id)
        with _ended(tracker):
            _tell_data_set(plan, data.manifest, tags[MANIFEST_TAG], tracker)
            with display, _training_memory(plan):
                progress = trainer.fit(folder, listener(plan, path, tracker))
            with ending_work("the training is done and saved, its scoring is not"):
                result = _finish(plan, data, trainer, progress, tracker)
            result["seconds"] = round(time.monotonic() - started, 1)
            _report(path, result, tracker)
            tracker.log_metrics({"seconds": result["seconds"]}, progress.step)
        folder.write(RESULT, json.dumps(result, indent=1) + "\n")
    return result


@contextmanager
def _ended(tracker: MlflowTracker) -> Iterator[None]:
    """End an MLflow run as what happens inside ends."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def _training_memory(plan: Workflow) -> AbstractContextManager[None]:
    """What to change where the memory is not enough to train."""
    options = plan.train
    remedy = (
        f"batch_size is {options.batch_size} and patch_size {list(options.patch_size)}: make one of them smaller "
        "(train.accumulate adds small batches up to a large one)"
    )
    remedy += "" if options.precision == "bf16" else ", or set train.precision: bf16"
    return memory_told(remedy, where=plan.where("train", "patch_size"))


def _prepare(plan: Workflow, fold: int, hardware: Hardware) -> tuple[Workflow, TrainingData]:
    """The cases, and the workflow with numbers for what they decide about the loss."""
    source = manifest(plan)
    check_parts(plan, source, hardware)
    with memory_told("set data.cache: disk, or a coarser data.spacing_mm", where=plan.where("data", "cache")):
        data = training_data(plan, source, fold)
    weights = balanced_weights(data.training, data.labels)
    weighted = with_class_weights(plan, weights)
    if weighted.loss != plan.loss:
        console().print(weights_told(weights, data.labels), markup=False, soft_wrap=True)
    return weighted, data


def _finish(plan: Workflow, data: TrainingData, trainer: Trainer, progress: Progress, tracker: MlflowTracker) -> Result:
    """Keep the best weights as a model and score both checkpoints on every held-out scan's own grid."""
    folder, organs = trainer.folder, data.labels.organs
    provenance = {
        "run_dir": str(folder.path),
        "mlflow_run_id": tracker.run_id,
        "fold": data.fold,
        "step": progress.best_step,
        **run_tags(plan, data),
    }
    best = trainer.best.load()
    assert best is not None  # the last step is always validated
    weights = {"best": best["network"], "last": trainer.trained.state_dict()}
    save_model(folder.model, specification(plan, data.manifest, data.preprocessing, provenance), weights["best"])
    scores = {}
    for which in ("best", "last") if progress.best_step < progress.step else ("best",):
        device = trainer.fabric.device.type
        keep_in = folder.path / PREDICTIONS if which == "best" else None
        scores[which] = score_held_out(
            plan, data, folder.path, weights=weights[which], device=device, called=which, keep_in=keep_in
        )
        if keep_in and plan.infer.postprocess == "auto" and choose_postprocessing(data, folder.model, keep_in):
            scores[which] = score_postprocessed(
                plan, data, folder.path, weights=weights[which], device=device, kept_in=keep_in
            )
    write_table(folder.path / PER_CASE, scores["best"])
    found = {
        "best": {"step": progress.best_step, **dice_result(scores["best"], organs)},
        "last": {"step": progress.step, **dice_result(scores.get("last", scores["best"]), organs)},
    }
    for which, result in found.items():
        means = metric_means(scores.get(which, scores["best"]))
        numbers = {**means, "mean_dice": result["mean_dice"]}
        tracker.log_metrics({f"final/{which}/{name}": value for name, value in numbers.items()}, progress.step)
    tracker.log_table(folder.path / PER_CASE)
    for name in ("validation.csv", "workflow.yaml", "manifest.json"):
        tracker.log_file(folder.path / name)
    for name in ("model.json", "model.safetensors"):
        tracker.log_file(folder.model / name, "model")
    return {
        "run_dir": str(folder.path),
        "mlflow_run_id": tracker.run_id,
        "manifest_sha256": provenance[MANIFEST_TAG],
        "fold": data.fold,
        "model_dir": str(folder.model),
        "postprocess": dict(load_spec(folder.model).postprocess),
        "pictures": str(folder.pictures),
        "per_case": str(folder.path / PER_CASE),
        **found,
        "iterations": progress.step,
        "seconds_waiting_for_data": round(trainer.seconds_waiting, 1),
        "seconds_training": round(trainer.seconds_training, 1),
    }


def _cross_validate(plan: Workflow, path: Path, hardware: Hardware) -> Result:
    """Every fold, one after the other, as nested MLflow runs under a parent that holds the joint result."""
    source = manifest(plan)
    check_parts(plan, source, hardware)
    folds = sorted(set(source.folds().values()))
    for fold in folds:
        source.split(fold)
    with RunFolder(path) as folder:
        folder.record(FOLDS, json.dumps(folds) + "\n")
        folder.record("workflow.yaml", recorded(plan).to_yaml(), free=FREE_TO_CHANGE)
        tags = workflow_tags(plan) | {"medseg.folds": str(len(folds))}
        parent = make_tracker(plan, path, run_name=f"{plan.name}-cv", tags=tags)
        with _ended(parent):
            results = []
            for fold in folds:
                done = path / f"fold_{fold}" / RESULT
                if done.exists():
                    results.append(json.loads(done.read_text()))
                else:
                    results.append(_train_fold(plan, done.parent, fold, hardware, parent_run_id=parent.run_id))
            if digest := results[0].get("manifest_sha256"):  # not of folds that an earlier version has trained
                parent.log_tags({MANIFEST_TAG: digest})
                _tell_data_set(plan, source, digest, parent)
            joint = _joint(results, path, source.labels.organs, parent)
            _report(path, joint, parent)
        folder.write(RESULT, json.dumps(joint, indent=1) + "\n")
    return joint


def _joint(results: Sequence[Result], path: Path, organs: Sequence[str], parent: MlflowTracker) -> Result:
    """One table of all cases, each scored by the model that has not seen it, and what it adds up to."""
    scores = [score for result in results for score in read_table(path / f"fold_{result['fold']}" / PER_CASE)]
    write_table(path / PER_CASE, scores)
    best = dice_result(scores, organs)
    numbers = {**metric_means(scores), "mean_dice": best["mean_dice"]}
    parent.log_metrics({f"cv/{name}": value for name, value in numbers.items()}, 0)
    parent.log_table(path / PER_CASE)
    return {
        "run_dir": str(path),
        "mlflow_run_id": parent.run_id,
        "model_dir": None,
        "model_dirs": [result["model_dir"] for result in results],
        "per_case": str(path / PER_CASE),
        "best": {"step": None, **best},
        "folds": results,
        "seconds": sum(result["seconds"] for result in results),
        "iterations": sum(result["iterations"] for result in results),
    }


def _tell_data_set(plan: Workflow, source: Manifest, digest: str, tracker: MlflowTracker) -> None:
    """Name the data set in MLflow, with numbers but without a path that the workflow does not show, or a case."""
    organs = ", ".join(source.labels.organs)
    profile = {"cases": len(source.training), "organs": organs, "channels": ", ".join(source.channels)}
    tracker.log_data_set(source.name, digest, source=plan.data.manifest, profile=profile)


def _report(folder: Path, result: Result, tracker: MlflowTracker) -> None:
    """Write the page that people look at. A training is worth more than its report: one that fails is only told."""
    page = folder / REPORT
    try:
        write_run_page(folder, page, result)
    except Exception as error:
        log.warning(
            "W-REPORT %s: the training is done, but its report failed (%s: %s); try: medseg report %s",
            folder, type(error).__name__, error, shlex.quote(str(folder)),
        )  # fmt: skip
        return
    result["report"] = str(page)
    tracker.log_file(page)


def _rehearse(plan: Workflow, fold: int, hardware: Hardware) -> Result:
    """Build everything, time a few iterations and one validation case, and extrapolate."""
    plan, data = _prepare(plan, fold, hardware)
    display = LiveDisplay(console(), plan.name, plan.train.iterations)
    seconds = []
    with _training_memory(plan):
        trainer = make_trainer(plan, data, observer=display, hardware=hardware)
        asked = time.monotonic()
        num_steps = REHEARSED_ITERATIONS * plan.train.accumulate
        for batch in track(islice(trainer.batches(0), num_steps), "rehearsing", total=num_steps):
            loss = trainer.train_step([trainer.fabric.to_device(batch)])
            seconds.append(time.monotonic() - asked)
            asked = time.monotonic()
    if not math.isfinite(loss):
        message = (
            "the loss of the rehearsal is NaN or infinite: try train.precision=fp32, or a lower train.optimizer.lr"
        )
        raise TrainingError("E-NAN-LOSS", message)
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
        f"{step:.2f} s an iteration, {validation:.1f} s a validation case: about {duration(total)} on this machine",
        soft_wrap=True,
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
    unfinished = [run for run in started if not (run / RESULT).exists() and (run / FOLDS).exists() == all_folds]
    if not unfinished:
        raise WorkflowError(
            "E-RESUME", f"{RUNS / plan.name} holds no unfinished run; name one with --output", where="--resume"
        )
    return unfinished[-1]


def _record(plan: Workflow, data: TrainingData, folder: RunFolder) -> None:
    resolved = recorded(plan).model_copy(update={"data": plan.data.model_copy(update={"manifest": "manifest.json"})})
    folder.record("workflow.yaml", resolved.to_yaml(), free=FREE_TO_CHANGE)
    folder.record("manifest.json", json.dumps(data.manifest.to_dict(data.hashes), indent=1) + "\n")
