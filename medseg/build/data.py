"""From a workflow to the preprocessed cases of one fold."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg.data import phantom
from medseg.data.dataset import CachedCase, CaseCache, absent_labels
from medseg.data.manifest import Case, Manifest, cache_folder, expand_variables
from medseg.data.transforms import foreground_statistics
from medseg.data.volume_io import read_geometry
from medseg.display import progress_bar
from medseg.errors import DataError, WorkflowError
from medseg.files import remove_leftovers, temporary_path
from medseg.labels import Labels
from medseg.model import Intensity, Preprocessing
from medseg.workflow import IntensityChoice, Workflow

IMAGENET_RGB = tuple((255 * mean, 255 * std) for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))
"""Mean and standard deviation of 8-bit red, green and blue that networks trained on ImageNet expect."""


@dataclass(frozen=True)
class TrainingData:
    """The cases of one fold, preprocessed.

    Args:
        manifest: Where they come from.
        fold: The fold held out.
        preprocessing: With all numbers resolved on the training side.
        training: Cases to learn from.
        validation: Cases held out.
        held_out: The same as `validation`, as the manifest has them.
        hashes: sha256 of each file.
    """

    manifest: Manifest
    fold: int
    preprocessing: Preprocessing
    training: Sequence[CachedCase]
    validation: Sequence[CachedCase]
    held_out: Sequence[Case]
    hashes: Mapping[Path, str]

    @property
    def labels(self) -> Labels:
        return self.manifest.labels


def training_data(workflow: Workflow, source: Manifest, fold: int) -> TrainingData:
    """Split, resolve and preprocess the workflow's cases."""
    with workflow.blamed("validate", "fold"):
        training, held_out = source.split(fold)
    if workflow.train.batch_size > len(training):
        raise WorkflowError(
            "E-BATCH-SIZE",
            f"batch_size {workflow.train.batch_size} but fold {fold} has {len(training)} training cases; "
            f"use {len(training)} or fewer (train.accumulate makes batches larger)",
            where=workflow.where("train", "batch_size"),
        )
    resolved = preprocessing(workflow, source, training)
    cache = CaseCache(_cache_folder(workflow), resolved, source.labels, in_memory=workflow.data.cache == "ram")
    with workflow.blamed("data", "manifest"):
        cached = cache.prepare([*training, *held_out])
        absent = absent_labels(cached[: len(training)], source.labels)
        if absent:
            raise DataError(
                "E-LABEL-ABSENT",
                f"the manifest declares {', '.join(map(repr, absent))}, which no training case of fold {fold} contains; "
                "remove it from labels or correct the label files",
            )
    _check_dims(workflow, cached)
    hashes = {file: cache.hash_of(file) for case in source.training for file in case.files}
    with workflow.blamed("data", "manifest"):
        _check_leakage(training, held_out, hashes)
    return TrainingData(source, fold, resolved, cached[: len(training)], cached[len(training) :], held_out, hashes)


def manifest(workflow: Workflow) -> Manifest:
    """The workflow's data set; a phantom's cases are made if they are not there yet."""
    with workflow.blamed("data", "manifest"):
        path = workflow.file.parent / expand_variables(workflow.data.manifest)
        loaded = Manifest.load(path)
        if loaded.phantom:
            _make_phantoms(loaded)
        loaded.check_files(loaded.training)  # scans for tests may be elsewhere
    return loaded


def preprocessing(workflow: Workflow, source: Manifest, training: Sequence[Case]) -> Preprocessing:
    """Spacing and intensities as numbers, from the training side of the fold alone."""
    chosen = workflow.data
    intensity = _per_channel(workflow, source)
    plain = Preprocessing(
        orientation=chosen.orientation,
        spacing_mm=None,
        intensity=tuple(Intensity(clip=c.clip, normalize="none") for c in intensity),
        select_volume=chosen.select_volume,
        assume_spacing_mm=chosen.assume_spacing_mm,
        allow_missing_slices=chosen.allow_missing_slices,
    )
    with workflow.blamed("data", "spacing_mm"):
        spacing_mm = _spacing(workflow, plain, training)
    if any(c.normalize == "foreground" for c in intensity):
        statistics = foreground_statistics(
            [(case.images, case.label) for case in training], plain, labels=source.labels
        )
    else:
        statistics = ((0.0, 1.0),) * len(intensity)
    with workflow.blamed("data", "intensity"):
        numbers = tuple(
            _numbers(c, n, known, len(intensity))
            for n, (c, known) in enumerate(zip(intensity, statistics, strict=True))
        )
    return replace(plain, spacing_mm=spacing_mm, intensity=numbers)


def _numbers(chosen: IntensityChoice, channel: int, foreground: tuple[float, float], num_channels: int) -> Intensity:
    """What a channel's choice means in numbers."""
    if chosen.normalize == "imagenet":
        if num_channels != len(IMAGENET_RGB):
            raise WorkflowError("E-CHANNELS", f"imagenet is for red, green and blue, not for {num_channels} channels")
        return Intensity(chosen.clip, "foreground", *IMAGENET_RGB[channel])  # as numbers, both are the same
    if chosen.normalize == "foreground":
        return Intensity(chosen.clip, "foreground", *foreground)
    return Intensity(chosen.clip, chosen.normalize)


def _per_channel(workflow: Workflow, source: Manifest) -> tuple[IntensityChoice, ...]:
    chosen = workflow.data.intensity
    if isinstance(chosen, IntensityChoice):
        return (chosen,) * len(source.channels)
    if len(chosen) != len(source.channels):
        raise WorkflowError(
            "E-CHANNELS",
            f"{len(chosen)} entries for {len(source.channels)} channels {list(source.channels)}; give one for each, or one for all",
            where=workflow.where("data", "intensity"),
        )
    return chosen


def _spacing(workflow: Workflow, plain: Preprocessing, training: Sequence[Case]) -> tuple[float, ...] | None:
    chosen = workflow.data.spacing_mm
    if chosen == "native":
        return None
    if chosen != "median":
        return tuple(chosen)
    geometries = [read_geometry(case.images[0], assume_spacing_mm=plain.assume_spacing_mm) for case in training]
    spacings = [plain.geometry(geometry).spacing_mm for geometry in geometries]
    return tuple(float(s) for s in np.median(spacings, axis=0))


def _check_leakage(training: Sequence[Case], held_out: Sequence[Case], hashes: Mapping[Path, str]) -> None:
    """Refuse a scan that is on both sides under two names."""
    known = {tuple(hashes[image] for image in case.images): case.id for case in training}
    for case in held_out:
        same = known.get(tuple(hashes[image] for image in case.images))
        if same:
            raise DataError(
                "E-LEAKAGE",
                f"the scan of case {case.id}, which is held out, is that of training case {same} too; remove one of them",
            )


def _check_dims(workflow: Workflow, cases: Sequence[CachedCase]) -> None:
    """Refuse pictures among volumes, and pictures for what reads volumes."""
    pictures = [case for case in cases if case.geometry.spatial_dims == 2]
    if not pictures:
        return
    if len(pictures) < len(cases):
        raise DataError(
            "E-SPATIAL-DIMS",
            f"{len(pictures)} of {len(cases)} cases are pictures, e.g. {pictures[0].id}, the others volumes; "
            "make a manifest of each kind",
            where=workflow.where("data", "manifest"),
        )
    for wrong, field in (
        (len(workflow.train.patch_size) != 2, ("train", "patch_size")),
        (workflow.data.context_slices > 0, ("data", "context_slices")),
    ):
        if wrong:
            raise WorkflowError(
                "E-SPATIAL-DIMS",
                "the cases are pictures: patch_size needs two entries and context_slices must be 0",
                where=workflow.where(*field),
            )


def _cache_folder(workflow: Workflow) -> Path:
    shared = cache_folder() / "cases"
    if workflow.data.cache != "none":
        return shared
    shared.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(shared.parent)  # of runs that were killed
    own = temporary_path(shared)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _make_phantoms(source: Manifest) -> None:
    assert source.phantom
    with progress_bar() as bar:
        task = bar.add_task("making phantom cases", total=source.phantom.get("cases"))
        phantom.make_cases(source.root, spec=source.phantom, on_case=lambda: bar.advance(task))
