"""`medseg report`: a run, or a folder of segmentations, becomes one HTML page that people look at."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from medseg.batch.ledger import LEDGER, Ledger
from medseg.data.inputs import BESIDE, MANIFEST_SUFFIX, check_unique, find_cases, manifest_cases
from medseg.data.manifest import Case, Manifest
from medseg.data.volume_io import READABLE_SUFFIXES
from medseg.errors import DataError, MedsegError, WorkflowError
from medseg.labels import Labels
from medseg.metrics.table import EVALUATION, PER_CASE
from medseg.model import Preprocessing, load_spec
from medseg.reporting.batch_page import write_batch_page
from medseg.reporting.page import REPORT
from medseg.reporting.prediction import summary_row
from medseg.reporting.run_page import write_run_page
from medseg.tracking.runs import run_folder
from medseg.training.run_folder import RESULT
from medseg.wording import counted

Result = dict[str, Any]

log = logging.getLogger("medseg")


def report(
    run: str,
    *,
    output: Path | None = None,
    scans: Path | None = None,
    labels: Path | None = None,
    split: str | None = None,
    tracking_uri: str | None = None,
) -> Result:
    """Make the page of a run, or of segmentations without references.

    Args:
        run: A run folder (of one fold or of all), a folder of `medseg evaluate`, an MLflow run id, or a folder of
            segmentations, or one of them.
        output: The file to write, or a folder for ``report.html``; None: the folder of the run itself.
        scans: The scans that segmentations were made from, as files, a folder or a manifest, by the same names; a run
            knows its own, and so does what `medseg predict` has written.
        labels: A model, a run folder or a manifest that names the labels of segmentations; None: the manifest of the
            scans, the model that `medseg predict` was given, or else numbers.
        split: Part of the manifest of scans; None: all of it.
        tracking_uri: Where to look for run ids; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.

    Returns:
        ``page``, ``megabytes``, ``seconds``, and how many ``cases``, ``pictures`` and ``viewer_cases`` are in it; of
        segmentations also ``outliers``, ``mostly_absent``, ``failed`` and ``refused``, see `write_batch_page`. ``hint`` says how to
        have pictures where there are none as nobody named the scans; else it is None.

    Raises:
        MedsegError: If there is nothing to report of.
    """
    started = time.monotonic()
    folder = Path(run) if Path(run).exists() else run_folder(run, tracking_uri)
    page = output or (folder if folder.is_dir() else folder.parent)
    page = page / REPORT if page.is_dir() else page
    page.parent.mkdir(parents=True, exist_ok=True)
    knows_scans = _is_run(folder) and not (folder / EVALUATION).exists()
    if not _is_run(folder):
        found = _report_segmentations(folder, page, scans, labels, split, tracking_uri)
    elif (folder / EVALUATION).exists():
        found = write_run_page(folder, page, {}, **_known(scans, labels, split))
    elif scans or labels or split:
        message = "is for segmentations, scored or not; this is a run, which knows its own scans"
        raise WorkflowError("E-ARGUMENT", message, where="--scans, --labels, --split")
    else:
        found = write_run_page(folder, page, _result(folder))
    return {
        "page": str(page),
        **found,
        "megabytes": round(page.stat().st_size / 1e6, 1),
        "seconds": round(time.monotonic() - started, 1),
        "hint": None if found["pictures"] or scans or knows_scans else "no pictures: name the scans with --scans",
    }


def report_summary(result: Mapping[str, Any]) -> Text:
    """Where the page is and what is in it."""
    outliers = f", {result['outliers']} of them with a volume that stands out" if "outliers" in result else ""
    shown = f"{result['pictures']} in pictures, {result['viewer_cases']} in the viewer"
    lines = [f"{counted(result['cases'], 'case')}{outliers}; {shown}; {result['megabytes']} MB"]
    lines += [result["hint"]] if result.get("hint") else []
    absent = result.get("mostly_absent", {})
    lines += [f"{organ} was found in {result['cases'] - n} of {result['cases']}" for organ, n in absent.items()]
    lines += [f"{counted(refused, 'scan')} could not be segmented"] if (refused := result.get("refused")) else []
    lines += [f"not readable  {entry['message']}" for entry in result.get("failed", ())]
    lines.append(f"open in a browser: {result['page']}")
    return Text("\n".join(lines), overflow="ignore", no_wrap=True)


def _is_run(folder: Path) -> bool:
    """Whether it is of a training, finished or not, or holds a table."""
    return any((folder / name).exists() for name in (PER_CASE, RESULT, "checkpoints", "folds.json"))


def _result(folder: Path) -> Result:
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else {}


def _report_segmentations(
    folder: Path, page: Path, scans: Path | None, labels: Path | None, split: str | None, tracking_uri: str | None
) -> Result:
    if folder.is_file() and not folder.name.lower().endswith(READABLE_SUFFIXES):
        raise DataError("E-REPORT-RUN", "is no segmentation; name one, a folder of them, or a run", where=str(folder))
    told, known = _of_batch(folder, tracking_uri) if (folder / LEDGER).is_file() else ({}, {})
    known |= {name: value for name, value in _known(scans, labels, split).items() if value or name not in known}
    done = [case for case, row in told.items() if row["state"] == "done"]
    try:
        predictions = [case for case in find_cases([folder]) if not case.id.endswith(BESIDE)]
    except DataError:
        if not told or done:
            raise
        predictions = []  # of a batch in which all scans failed
    check_unique(predictions)
    there = {case.id for case in predictions}
    predictions += [Case(case, (Path(told[case]["output"]),), None, case) for case in done if case not in there]
    return write_batch_page(predictions, page, name=folder.resolve().name, told=told, **known)


def _of_batch(folder: Path, tracking_uri: str | None) -> tuple[dict[str, Result], Result]:
    """What the list of a batch says of its cases, and, as `_known`, of their scans and of their model, if that is there.

    Volumes are not believed, for somebody may have corrected segmentations since.
    """
    ledger = Ledger.found(folder / LEDGER)
    jobs = ledger.jobs
    told = {
        job.id: summary_row(job.id, job.images[0], folder / job.files[0].name, row) | {"volumes": None}
        for job, row in zip(jobs, ledger.rows(jobs), strict=True)
    }
    known: Result = {"scans": {job.id: Case(job.id, job.images, None, job.id) for job in jobs}}
    if models := ledger.options.get("models"):
        from medseg.build.model import find_models  # torch takes a while to import

        try:
            spec = load_spec(find_models(models[0], tracking_uri)[0])
        except MedsegError as error:
            log.warning("W-MODEL labels are numbers, as their model is not there; name it with --labels (%s)", error)
        else:
            known |= {"labels": spec.labels, "preprocessing": spec.preprocessing}
    return told, known


def _known(scans: Path | None, labels: Path | None, split: str | None) -> Result:
    """What somebody says of segmentations: their scans by case, what labels are called, and how scans are read."""
    named = labels or (scans if scans and scans.suffix == MANIFEST_SUFFIX else None)
    described, preprocessing = _described(named) if named else (None, Preprocessing())
    return {"scans": _scans(scans, split) if scans else {}, "labels": described, "preprocessing": preprocessing}


def _scans(path: Path, split: str | None) -> dict[str, Case]:
    if split or path.suffix != MANIFEST_SUFFIX:
        found = find_cases([path], split=split)
    else:
        manifest = Manifest.load(path)
        found = [c for part in ("training", "test") if getattr(manifest, part) for c in manifest_cases(manifest, part)]
    return {case.id: case for case in found}


def _described(path: Path) -> tuple[Labels, Preprocessing]:
    """What the labels are called, and how scans are read."""
    if path.suffix == MANIFEST_SUFFIX:
        manifest = Manifest.load(path)
        intensity = Preprocessing().intensity * len(manifest.channels)
        return manifest.labels, Preprocessing(intensity=intensity)
    spec = load_spec(path / "model" if (path / "model").is_dir() else path)
    return spec.labels, spec.preprocessing
