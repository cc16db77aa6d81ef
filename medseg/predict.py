"""`medseg predict`: a model and scans become segmentations on the scans' own grids."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.batch.isolated import Killed, isolated
from medseg.data.inputs import PROBABILITIES, check_unique, find_cases
from medseg.data.manifest import Case
from medseg.data.volume_io import WRITABLE_SUFFIXES, write_volume
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems, WorkflowError
from medseg.files import NO_ROOM, remove_leftovers
from medseg.memory import asked_for, is_out_of_memory
from medseg.model import Crop
from medseg.tracking.models import is_registered, model_folder

if TYPE_CHECKING:
    from medseg.data.transforms import Prepared
    from medseg.inference.predictor import Predictor

Result = dict[str, Any]

log = logging.getLogger("medseg")


def predict(
    model: str,
    inputs: Sequence[Path],
    *,
    output: Path,
    format: str = "nii.gz",
    split: str | None = None,
    overlap: float | None = None,
    crop: Crop | None = None,
    tta: bool = False,
    prune: int | None = None,
    probabilities: bool = False,
    device: str = "auto",
    workers: int = 0,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    tracking_uri: str | None = None,
    isolate: bool = False,
) -> Result:
    """Segment scans. A scan that cannot be segmented is listed and does not stop the others.

    Args:
        model: A model folder, a run folder, an MLflow run id, or a registered model as ``models:/name@alias``.
        inputs: Files, folders (searched recursively) and manifests.
        output: Folder for the segmentations, made if need be; each is called after its case.
        format: ``nii.gz``, ``nii``, ``nrrd`` or ``mha``; for pictures ``png`` too.
        split: Part of a manifest: ``training``, ``test`` or ``fold_N``; None: its test cases, or all
            where it has none.
        overlap: Share of a window that the next one covers again, instead of the model's.
        crop: Which windows are spared, see `medseg.model.Window`; instead of the model's.
        tta: Average over mirrored copies along all axes.
        prune: Stop a UNet++ that was trained with deep supervision at this level, which is faster.
        probabilities: Write the network's probabilities too.
        device: ``auto``, ``cpu`` or ``cuda``.
        workers: Threads that read scans ahead.
        resume: Pass over cases whose segmentation is there.
        force: Overwrite segmentations that are there, and segment scans of another modality than the model's.
        dry_run: Load the model, say what would be segmented, and stop.
        tracking_uri: Where to look for run ids.
        isolate: Work in a process of its own, so that a scan that kills it is one failure among the others.

    Returns:
        ``done`` (each with case, input, output, seconds, windows, windows_in_air), ``failed`` (case, input, error_id, message),
        ``skipped`` (ids that `resume` passed over) and ``seconds``; of a dry run ``planned`` too.

    Raises:
        MedsegError: If work cannot begin.
    """
    started = time.monotonic()
    _check_arguments(format, overlap, resume=resume, force=force, probabilities=probabilities)
    cases = find_cases(inputs, split=split)
    check_unique(cases)
    if is_registered(model):  # found once: the alias may be given to another version while scans are segmented
        model = str(model_folder(model, tracking_uri))
    suffix = f".{format}"
    kinds = ("", PROBABILITIES) if probabilities else ("",)
    files = {case.id: tuple(output / f"{case.id}{kind}{suffix}" for kind in kinds) for case in cases}
    _check_inputs_safe(cases, files)
    complete = {name for name, wanted in files.items() if all(path.exists() for path in wanted)}
    if not (resume or force):
        _check_nothing_there(files)
    todo = [case for case in cases if force or case.id not in complete]
    jobs = [_Job(case, files[case.id]) for case in todo]
    segmenting = _Segmenting(
        model, device, overlap, crop, tta, prune, tracking_uri, format, workers, any_modality=force
    )
    result: Result = {"done": [], "failed": [], "skipped": [case.id for case in cases if case not in todo]}
    if dry_run:
        segmenting.segmenter()
        result["planned"] = [job.entry | {"output": str(job.files[0])} for job in jobs]
    else:
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        numbered = (
            isolated(segmenting, jobs, preload=["medseg.build.model"])
            if isolate
            else segmenting(dict(enumerate(jobs)), begun=lambda _: None)
        )
        for number, found in track(numbered, "segmenting", total=len(jobs)):
            entry = _killed(jobs[number], found) if isinstance(found, Killed) else found
            result["failed" if "error_id" in entry else "done"].append(entry)
    return {**result, "seconds": round(time.monotonic() - started, 2)}


@dataclass(frozen=True)
class _Job:
    """A case, and the files that its segmentation, and its probabilities if they are wanted, are written to."""

    case: Case
    files: tuple[Path, ...]

    @property
    def entry(self) -> dict[str, Any]:
        return {"case": self.case.id, "input": str(self.case.images[0])}


@dataclass(frozen=True)
class _Segmenting:
    """Segments case after case, wherever it is called; what becomes of each is an entry of the result.

    Args:
        model: See `predict`, as for all the others.
        any_modality: Segment scans of another modality than the model's, with a warning.
    """

    model: str
    device: str
    overlap: float | None
    crop: Crop | None
    tta: bool
    prune: int | None
    tracking_uri: str | None
    format: str
    workers: int
    any_modality: bool

    def segmenter(self) -> Predictor:
        """The model, loaded.

        Raises:
            MedsegError: If it cannot be used, or its segmentations cannot be written in this format.
        """
        from medseg.build.model import predictor  # torch takes a while to import, and the work may be another process's

        made = predictor(
            self.model,
            device=self.device,
            overlap=self.overlap,
            crop=self.crop,
            tta=self.tta,
            pruned_at=self.prune,
            tracking_uri=self.tracking_uri,
        )
        if self.format == "png" and made.spec.spatial_dims == 3:
            raise WorkflowError("E-ARGUMENT", "a PNG holds no volume, which this model predicts", where="--format")
        return made

    def __call__(self, jobs: Mapping[int, _Job], begun: Callable[[int], None]) -> Iterator[tuple[int, Result]]:
        segmenter = self.segmenter()

        def prepare(number: int) -> Prepared:
            begun(number)
            return segmenter.prepare(jobs[number].case.images, any_modality=self.any_modality)

        for number, prepared in _read_ahead(prepare, jobs, self.workers):
            started = time.monotonic()
            job = jobs[number]
            try:
                told = _segment(segmenter, prepared(), job.files)
            except Exception as error:  # whatever is wrong with this scan, the others are still to be done
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise  # but there is no room for them either
                yield number, job.entry | _described(error, job.case)
                continue
            seconds = round(time.monotonic() - started, 2)
            yield number, job.entry | {"output": str(job.files[0]), "seconds": seconds} | told


def _segment(segmenter: Predictor, prepared: Prepared, files: Sequence[Path]) -> Result:
    found = segmenter.segment_prepared(prepared, with_probabilities=len(files) > 1)
    if found.probabilities:
        write_volume(files[1], found.probabilities)
    write_volume(files[0], found.label)  # last, as the sign that the case is complete
    return {"windows": found.num_windows, "windows_in_air": found.num_in_air}


def _read_ahead(
    prepare: Callable[[int], Prepared], numbers: Iterable[int], workers: int
) -> Iterator[tuple[int, Callable[[], Prepared]]]:
    """Each number with a function that returns its case prepared; up to `workers` are prepared in advance."""
    if not workers:
        for number in numbers:
            yield number, partial(prepare, number)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[int, Callable[[], Prepared]]] = deque()
        for number in numbers:
            waiting.append((number, pool.submit(prepare, number).result))
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting


def _described(error: Exception, case: Case) -> dict[str, str]:
    if isinstance(error, MedsegError):
        return {"error_id": error.error_id, "message": str(error)}
    if is_out_of_memory(error):
        fault = DataError(
            "E-MEMORY", f"the memory is not enough{asked_for(error)}; crop it, or use more", where=str(case.images[0])
        )
        return {"error_id": fault.error_id, "message": str(fault)}
    log.debug("case %s", case.id, exc_info=error)
    return {"error_id": "E-INTERNAL", "message": f"{type(error).__name__}: {error}"}


def _killed(job: _Job, killed: Killed) -> dict[str, str]:
    error = DataError(
        "E-WORKER", f"{killed}; look at this scan, or give the job more memory", where=str(job.case.images[0])
    )
    return job.entry | {"error_id": error.error_id, "message": str(error)}


def _check_arguments(format: str, overlap: float | None, *, resume: bool, force: bool, probabilities: bool) -> None:
    if f".{format}" not in WRITABLE_SUFFIXES:
        known = ", ".join(suffix.removeprefix(".") for suffix in WRITABLE_SUFFIXES)
        raise WorkflowError("E-SUFFIX", f"{format!r} is not written; known: {known}", where="--format")
    if format == "png" and probabilities:
        raise WorkflowError("E-ARGUMENT", "a PNG holds no probabilities; use nii.gz", where="--format")
    if overlap is not None and not 0 <= overlap < 1:
        raise WorkflowError("E-ARGUMENT", f"{overlap} must be at least 0 and less than 1", where="--overlap")
    if resume and force:
        raise WorkflowError("E-ARGUMENT", "--resume keeps what is there, --force overwrites it; give one of them")


def _check_inputs_safe(cases: Sequence[Case], files: dict[str, tuple[Path, ...]]) -> None:
    """No segmentation takes the place of a scan or of a label, even with --force."""
    sources = {os.path.realpath(path) for case in cases for path in case.files}
    lost = [path for wanted in files.values() for path in wanted if os.path.realpath(path) in sources]
    if lost:
        raise Problems(
            [DataError("E-OUTPUT-NAME", "is an input; choose another --output", where=str(path)) for path in lost]
        )


def _check_nothing_there(files: dict[str, tuple[Path, ...]]) -> None:
    there = [path for wanted in files.values() for path in wanted if path.exists()]
    if there:
        more = f", and so do {len(there) - 1} more" if len(there) > 1 else ""
        raise WorkflowError(
            "E-OUTPUT-EXISTS",
            f"exists{more}; add --resume to keep or --force to overwrite",
            where=str(there[0]),
        )
