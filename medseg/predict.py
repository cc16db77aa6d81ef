"""`medseg predict`: a model and scans become segmentations on the scans' own grids."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medseg.build.model import predictor
from medseg.data.inputs import PROBABILITIES, check_unique, find_cases
from medseg.data.manifest import Case
from medseg.data.transforms import Prepared
from medseg.data.volume_io import WRITABLE_SUFFIXES, write_volume
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems, WorkflowError
from medseg.files import remove_leftovers
from medseg.inference.predictor import Predictor

Result = dict[str, Any]


def predict(
    model: str,
    inputs: Sequence[Path],
    *,
    output: Path,
    format: str = "nii.gz",
    split: str | None = None,
    overlap: float | None = None,
    tta: bool = False,
    probabilities: bool = False,
    device: str = "auto",
    workers: int = 0,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    tracking_uri: str | None = None,
) -> Result:
    """Segment scans. A scan that cannot be segmented is listed and does not stop the others.

    Args:
        model: A model folder, a run folder, or an MLflow run id.
        inputs: Files, folders (searched recursively) and manifests.
        output: Folder for the segmentations, made if need be; each is called after its case.
        format: ``nii.gz``, ``nii``, ``nrrd`` or ``mha``; for pictures ``png`` too.
        split: Part of a manifest: ``training``, ``test`` or ``fold_N``; None: its test cases, or all
            where it has none.
        overlap: Share of a window that the next one covers again, instead of the model's.
        tta: Average over mirrored copies along all axes.
        probabilities: Write the network's probabilities too.
        device: ``auto``, ``cpu`` or ``cuda``.
        workers: Threads that read scans ahead.
        resume: Pass over cases whose segmentation is there.
        force: Overwrite segmentations that are there.
        dry_run: Load the model, say what would be segmented, and stop.
        tracking_uri: Where to look for run ids.

    Returns:
        ``done`` (each with case, input, output, seconds), ``failed`` (case, input, error_id, message),
        ``skipped`` (ids that `resume` passed over) and ``seconds``; of a dry run ``planned`` too.

    Raises:
        MedsegError: If work cannot begin.
    """
    started = time.monotonic()
    _check_arguments(format, overlap, resume=resume, force=force, probabilities=probabilities)
    cases = find_cases(inputs, split=split)
    check_unique(cases)
    suffix = f".{format}"
    kinds = ("", PROBABILITIES) if probabilities else ("",)
    files = {case.id: tuple(output / f"{case.id}{kind}{suffix}" for kind in kinds) for case in cases}
    _check_inputs_safe(cases, files)
    complete = {name for name, wanted in files.items() if all(path.exists() for path in wanted)}
    if not (resume or force):
        _check_nothing_there(files)
    todo = [case for case in cases if force or case.id not in complete]
    segmenter = predictor(model, device=device, overlap=overlap, tta=tta, tracking_uri=tracking_uri)
    if format == "png" and segmenter.spec.spatial_dims == 3:
        raise WorkflowError("E-ARGUMENT", "a PNG holds no volume, which this model predicts", where="--format")
    result: Result = {"done": [], "failed": [], "skipped": [case.id for case in cases if case not in todo]}
    if dry_run:
        result["planned"] = [_entry(case) | {"output": str(files[case.id][0])} for case in todo]
    else:
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        _segment_all(segmenter, todo, files, workers, result)
    return {**result, "seconds": round(time.monotonic() - started, 2)}


def _segment_all(
    segmenter: Predictor, cases: Sequence[Case], files: dict[str, tuple[Path, ...]], workers: int, result: Result
) -> None:
    """Segment case after case; what becomes of each is added to the result."""
    for case, prepare in track(_read_ahead(segmenter, cases, workers), "segmenting", total=len(cases)):
        begun = time.monotonic()
        try:
            _segment(segmenter, prepare(), files[case.id])
        except Exception as error:  # whatever is wrong with this scan, the others are still to be done
            result["failed"].append(_entry(case) | _described(error, case))
            continue
        seconds = round(time.monotonic() - begun, 2)
        result["done"].append(_entry(case) | {"output": str(files[case.id][0]), "seconds": seconds})


def _segment(segmenter: Predictor, prepared: Prepared, files: Sequence[Path]) -> None:
    found = segmenter.segment_prepared(prepared, with_probabilities=len(files) > 1)
    if found.probabilities:
        write_volume(files[1], found.probabilities)
    write_volume(files[0], found.label)  # last, as the sign that the case is complete


def _read_ahead(
    segmenter: Predictor, cases: Sequence[Case], workers: int
) -> Iterator[tuple[Case, Callable[[], Prepared]]]:
    """Each case with a function that returns it prepared; up to `workers` are prepared in advance."""
    if not workers:
        for case in cases:
            yield case, lambda case=case: segmenter.prepare(case.images)  # type: ignore[misc]
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Case, Callable[[], Prepared]]] = deque()
        for case in cases:
            waiting.append((case, pool.submit(segmenter.prepare, case.images).result))
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting


def _entry(case: Case) -> dict[str, str]:
    return {"case": case.id, "input": str(case.images[0])}


def _described(error: Exception, case: Case) -> dict[str, str]:
    if isinstance(error, MedsegError):
        return {"error_id": error.error_id, "message": str(error)}
    logging.getLogger("medseg").debug("case %s", case.id, exc_info=error)
    return {"error_id": "E-INTERNAL", "message": f"{type(error).__name__}: {error}"}


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
    sources = {path.resolve() for case in cases for path in case.files}
    lost = [path for wanted in files.values() for path in wanted if path.resolve() in sources]
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
