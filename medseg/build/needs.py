"""What a workflow asks of its data and of this machine, told before it trains."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.build.data import preprocessing
from medseg.build.model import network, specification
from medseg.build.training import check_parts
from medseg.data.dataset import VOXELS_PER_CLASS
from medseg.data.lint.case import CaseFacts
from medseg.data.lint.rows import Row, row_of, warnings_kept
from medseg.data.manifest import Case, Manifest, cache_folder
from medseg.errors import MedsegError, Problems
from medseg.geometry import Geometry
from medseg.model import Preprocessing
from medseg.nets.slices import OnSlices
from medseg.workflow import IntensityChoice, Workflow

IMAGE_BYTES = 2  # float16, as the cache has it
MEMORY_SHARE = 0.8  # of the machine's; the rest is the network's and the system's
GB = 1e9


def workflow_rows(workflow: Workflow, source: Manifest, facts: Sequence[CaseFacts]) -> list[Row]:
    """What keeps a workflow from training on its data set.

    Args:
        workflow: The workflow.
        source: Its manifest.
        facts: What the manifest's cases hold.
    """
    rows: list[Row] = []
    with warnings_kept() as warned:
        with _noted(rows):
            check_parts(workflow, source)
        rows += [row_of(message) for message in warned.take()]
    with _noted(rows):
        _resolved(workflow, source, facts)
    with _noted(rows), workflow.blamed("validate", "fold"):
        training, _ = source.split(workflow.validate_.fold)
        rows += _fold_rows(workflow, source, training, facts)
    rows = [row for row in rows if row.error_id != "E-LEAKAGE"]  # told with the data, by case and not by patient
    return [*rows, *_dims_rows(workflow, facts), *_patch_rows(workflow, source, facts)]


def needs(workflow: Workflow, source: Manifest, facts: Sequence[CaseFacts]) -> dict[str, Any]:
    """Memory, disk and work, from the grids of the cases that can be read.

    Hours are not guessed: a rehearsal measures them.

    Returns:
        ``cases, cache_gb, cache_folder, free_disk_gb, ram_gb, machine_ram_gb, batch_gb, patches_gb, iterations,
        hours_from``.
    """
    channels, patch = len(source.channels), _patch(workflow)
    grids = _grids(workflow, source, facts)
    label_bytes = 1 if max(source.labels.names) <= 255 else 2
    index_bytes = VOXELS_PER_CLASS * 3 * 8 * (len(source.labels.names) - 1)
    voxels = sum(math.prod(grid.shape) for grid in grids.values())
    cache = voxels * (channels * IMAGE_BYTES + label_bytes) + len(grids) * index_bytes
    options, folder = workflow.train, cache_folder()
    batch = options.batch_size * math.prod(patch) * (channels * 4 + label_bytes)
    return {
        "cases": len(grids),
        "cache_gb": cache / GB,
        "cache_folder": str(folder),
        "free_disk_gb": _free_disk(folder) / GB,
        "ram_gb": cache / GB if workflow.data.cache == "ram" else 0.0,
        "machine_ram_gb": _machine_memory() / GB,
        "batch_gb": batch / GB,
        "patches_gb": batch * options.iterations * options.accumulate / GB,
        "iterations": options.iterations,
        "hours_from": f"medseg train {workflow.file} --dry-run",
    }


def machine_rows(workflow: Workflow, needed: dict[str, Any]) -> Iterator[Row]:
    """What this machine cannot hold."""
    if needed["cache_gb"] > needed["free_disk_gb"]:
        message = (
            f"the preprocessed cases take {needed['cache_gb']:.1f} GB, but {needed['cache_folder']} has "
            f"{needed['free_disk_gb']:.1f} GB free; set MEDSEG_CACHE to a larger disk, or a coarser spacing_mm"
        )
        yield Row("E-DISK", message, file=workflow.where("data", "cache"))
    if needed["ram_gb"] > MEMORY_SHARE * needed["machine_ram_gb"]:
        message = (
            f"the preprocessed cases take {needed['ram_gb']:.1f} GB of memory, this machine has "
            f"{needed['machine_ram_gb']:.1f} GB; set data.cache to disk"
        )
        yield Row("W-MEMORY", message, file=workflow.where("data", "cache"))


@contextmanager
def _noted(rows: list[Row]) -> Iterator[None]:
    """Turn what is raised inside into rows."""
    try:
        yield
    except MedsegError as error:
        faults = error.errors if isinstance(error, Problems) else (error,)
        rows += [Row(fault.error_id, fault.message, file=fault.where) for fault in faults]


def _fold_rows(
    workflow: Workflow, source: Manifest, training: Sequence[Case], facts: Sequence[CaseFacts]
) -> Iterator[Row]:
    fold, batch = workflow.validate_.fold, workflow.train.batch_size
    if batch > len(training):
        message = f"batch_size {batch} but fold {fold} has {len(training)} training cases; use {len(training)} or fewer"
        yield Row("E-BATCH-SIZE", message, file=workflow.where("train", "batch_size"))
    ids = {case.id for case in training}
    learned = {value for found in facts if found.label and found.case.id in ids for value in found.label.voxels}
    seen = {value for found in facts if found.label and found.is_training for value in found.label.voxels}
    absent = [name for value, name in source.labels.names.items() if value and value in seen and value not in learned]
    if absent:
        message = f"no training case of fold {fold} has {', '.join(map(repr, absent))}; train on another fold"
        yield Row("E-LABEL-ABSENT", message, file=workflow.where("validate", "fold"))


def _dims_rows(workflow: Workflow, facts: Sequence[CaseFacts]) -> Iterator[Row]:
    flat = [found.case.id for found in facts if found.geometry and found.geometry.spatial_dims == 2]
    if flat and len(workflow.train.patch_size) == 3:
        message = f"three sizes, but {len(flat)} of {len(facts)} scans are 2D, e.g. {flat[0]}; give two for pictures"
        yield Row("E-SPATIAL-DIMS", message, file=workflow.where("train", "patch_size"))
    spacing = workflow.data.spacing_mm
    dims = {found.geometry.spatial_dims for found in facts if found.geometry}
    if not isinstance(spacing, str) and dims - {len(spacing)}:
        message = f"{len(spacing)} sizes for {'D and '.join(map(str, sorted(dims)))}D scans; give one for each axis"
        yield Row("E-SPATIAL-DIMS", message, file=workflow.where("data", "spacing_mm"))
    if flat and workflow.data.context_slices:
        message = f"pictures such as {flat[0]} have no slices beside them; set it to 0"
        yield Row("E-SPATIAL-DIMS", message, file=workflow.where("data", "context_slices"))


def _patch_rows(workflow: Workflow, source: Manifest, facts: Sequence[CaseFacts]) -> Iterator[Row]:
    """Patches that hang over most scans, or that the network continues to a size its strides divide."""
    patch = _patch(workflow)
    shapes = [grid.shape for grid in _grids(workflow, source, facts).values() if len(grid.shape) == len(patch)]
    if not shapes:
        return
    try:
        with torch.device("meta"):
            net: Any = network(specification(workflow, source))
    except MedsegError:  # told by `check_parts`
        return
    median = np.median(shapes, axis=0).round().astype(int).tolist()
    axes = [a for a in range(3) if len(workflow.train.patch_size) == 3 or a != workflow.data.slice_axis]
    if isinstance(net, OnSlices):
        net = net.network
    enough = {axis: max(size.padded(median[axis]), size.minimum) for axis, size in zip(axes, net.sizes, strict=True)}
    if any(patch[axis] > enough[axis] for axis in axes):
        better = [min(patch[axis], enough[axis]) for axis in axes]
        message = (
            f"a patch of {_times(patch[axis] for axis in axes)} voxels for scans of {_times(median)} (median at this "
            f"spacing): the rest of it is zeros; {_times(better)} holds as much of the scan and is faster"
        )
        yield Row("W-PATCH-SIZE", message, file=workflow.where("train", "patch_size"))
        return
    given = [patch[axis] for axis in axes]
    computed = [size.padded(n) for size, n in zip(net.sizes, given, strict=True)]
    if computed != given:
        message = (
            f"a patch of {_times(given)} voxels is computed as one of {_times(computed)}, which the network's strides "
            f"divide; {_times(net.efficient_size(given))} needs no padding"
        )
        yield Row("W-PATCH-SIZE", message, file=workflow.where("train", "patch_size"))


def _grids(workflow: Workflow, source: Manifest, facts: Sequence[CaseFacts]) -> dict[str, Geometry]:
    """The network's grid for each training case that can be used."""
    try:
        resolved = _resolved(workflow, source, facts)
    except MedsegError:  # told by `workflow_rows`
        return {}
    if resolved is None:
        return {}
    dims = len(resolved.spacing_mm) if resolved.spacing_mm else None  # a spacing for volumes fits no picture
    return {f.case.id: resolved.geometry(g) for f, g in _usable(facts) if dims in (None, g.spatial_dims)}


def _resolved(workflow: Workflow, source: Manifest, facts: Sequence[CaseFacts]) -> Preprocessing | None:
    """The preprocessing, but for statistics that only reading all voxels again could tell."""

    def plain(choice: IntensityChoice) -> IntensityChoice:
        return choice.model_copy(update={"normalize": "zscore"}) if choice.normalize == "foreground" else choice

    chosen = workflow.data.intensity
    intensity = plain(chosen) if isinstance(chosen, IntensityChoice) else tuple(plain(choice) for choice in chosen)
    data = workflow.data.model_copy(update={"intensity": intensity})
    cases = [found.case for found, _ in _usable(facts)]
    with warnings_kept():  # headers are read again, and have been warned of
        return preprocessing(workflow.model_copy(update={"data": data}), source, cases) if cases else None


def _usable(facts: Sequence[CaseFacts]) -> list[tuple[CaseFacts, Geometry]]:
    """Training cases that can be read, all volumes or all pictures, with their grids."""
    read = [(found, found.geometry) for found in facts if found.is_training and found.geometry and found.is_usable]
    dims = Counter(grid.spatial_dims for _, grid in read).most_common(1)
    return [(found, grid) for found, grid in read if grid.spatial_dims == dims[0][0]]


def _patch(workflow: Workflow) -> tuple[int, ...]:
    """The patch in three axes: a 2D network's slices have a thickness."""
    patch = list(workflow.train.patch_size)
    if len(patch) == 2:
        patch.insert(workflow.data.slice_axis, 1 + 2 * workflow.data.context_slices)
    return tuple(patch)


def _times(size: Iterable[int]) -> str:
    return " × ".join(map(str, size))


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
