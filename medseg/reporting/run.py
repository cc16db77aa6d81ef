"""What a training left in its run folder, read so that a report can be made of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.data.manifest import Case, Manifest, read_json
from medseg.errors import DataError, MedsegError
from medseg.labels import Labels
from medseg.metrics.table import EVALUATION, PER_CASE, Score, read_table
from medseg.model import ModelSpec, Preprocessing, load_spec
from medseg.reporting.figures import Points
from medseg.reporting.scene import CaseFiles

PREDICTIONS = "predictions"
"""Folder of a run folder that holds what its best network found in each held-out scan."""

NO_FILES = "it is not known where their files are"
MAPPED = "the numbers in their files are others than those of the references (--map)"
NO_SCANS = "it is not known which scans belong to them; name these with --scans"

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """The training of one fold.

    Args:
        folder: Its run folder.
        losses: (iteration, training loss).
        dice: By organ (iteration, mean Dice of the cases looked at during training).
        spec: Its model; None: there is none here.
    """

    folder: Path
    losses: Points
    dice: Mapping[str, Points]
    spec: ModelSpec | None


@dataclass(frozen=True)
class Run:
    """A run of one fold or of all, or whatever else left a table.

    Args:
        folder: Where it is.
        scores: Rows of its table.
        trainings: One a fold; empty: only a table was left.
        result: What `medseg train` or `medseg evaluate` said at its end, as far as that is known.
        cases: Where the files of each case are, by its id; those that are not known are not in it.
        labels: What is drawn; None: nothing says it.
        preprocessing: Says how to read the scans.
        unknown: Why a case has no files.
    """

    folder: Path
    scores: tuple[Score, ...]
    trainings: tuple[Training, ...]
    result: Result
    cases: Mapping[str, CaseFiles]
    labels: Labels | None
    preprocessing: Preprocessing
    unknown: str = NO_FILES

    @property
    def name(self) -> str:
        """As the workflow calls it, or else as its folder is called."""
        for training in self.trainings:
            if training.spec and training.spec.provenance.get("medseg.workflow"):
                return str(training.spec.provenance["medseg.workflow"])
        return self.folder.resolve().name


def read_run(
    folder: Path,
    result: Result,
    *,
    scans: Mapping[str, Case] | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
) -> Run:
    """Read a run folder.

    Args:
        folder: Of one fold, or with those of all folds; a folder that holds a table and nothing else will do.
        result: What `medseg train` said at its end; empty: that is not known.
        scans: Of an evaluation: by case the scans, where it does not know them itself.
        labels: Of an evaluation: what the values mean; None: what it says itself, or else nothing.
        preprocessing: Of an evaluation: says how to read the scans.

    Raises:
        DataError: If there is no table, or it cannot be read.
    """
    scores = _scores(folder)
    folders = [path for path in sorted(folder.glob("fold_*")) if (path / "model").is_dir()]
    if not folders and (folder / "model").is_dir():
        folders = [folder]
    if not folders and (folder / EVALUATION).exists():
        found = read_json(folder / EVALUATION)
        cases = {} if found.get("map") else _evaluated(found, scans or {})
        unknown = MAPPED if found.get("map") else NO_SCANS if found.get("files") else NO_FILES
        described = labels or (Labels.from_dict(found["labels"]) if found.get("labels") else None)
        return Run(folder, scores, (), found, cases, described, preprocessing or Preprocessing(), unknown)
    trainings = tuple(_training(path) for path in folders)
    cases = {case: files for training in trainings for case, files in _held_out(training).items()}
    spec = next((training.spec for training in trainings if training.spec), None)
    described = spec.labels if spec else None
    return Run(folder, scores, trainings, result, cases, described, spec.preprocessing if spec else Preprocessing())


def _scores(folder: Path) -> tuple[Score, ...]:
    table = folder / PER_CASE
    if not table.exists():
        message = f"holds no {PER_CASE}; finish its training (medseg train … --resume), or name another run"
        raise DataError("E-REPORT-RUN", message, where=str(folder))
    try:
        scores = read_table(table)
    except (KeyError, ValueError) as error:
        message = f"is no table of case, organ and metrics ({type(error).__name__}: {error}); make it again"
        raise DataError("E-REPORT-TABLE", message, where=str(table)) from None
    if not scores:
        raise DataError("E-REPORT-TABLE", "has no rows; make it again", where=str(table))
    return tuple(scores)


def _training(folder: Path) -> Training:
    try:
        spec = load_spec(folder / "model")
    except MedsegError:
        spec = None
    return Training(folder, _losses(folder / "log.jsonl"), _dice(folder / "validation.csv"), spec)


def _losses(log: Path) -> Points:
    points = []
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        if "train/loss" in entry:
            points.append((float(entry["step"]), float(entry["train/loss"])))
    return points


def _dice(table: Path) -> dict[str, Points]:
    """By organ the mean over the cases that have it, at each validation."""
    if not table.exists():
        return {}
    found: dict[str, dict[int, list[float]]] = {}
    with table.open(newline="") as stream:
        for row in csv.DictReader(stream):
            value = float(row["dice"] or "nan")
            if value == value:  # an organ absent in both is no failure
                found.setdefault(row["organ"], {}).setdefault(int(row["step"]), []).append(value)
    return {
        organ: [(float(step), sum(values) / len(values)) for step, values in sorted(steps.items())]
        for organ, steps in found.items()
    }


def _held_out(training: Training) -> dict[str, CaseFiles]:
    """The cases of its fold: the others were not scored here. None where the manifest or the model is gone."""
    folder, spec = training.folder, training.spec
    try:
        manifest = Manifest.load(folder / "manifest.json")
    except MedsegError:
        return {}
    return {
        case.id: CaseFiles(case.id, case.images, case.label, folder / PREDICTIONS / f"{case.id}.nii.gz")
        for case in manifest.training
        if spec and case.fold == spec.provenance.get("fold")
    }


def _evaluated(found: Result, scans: Mapping[str, Case]) -> dict[str, CaseFiles]:
    """The cases of an evaluation whose segmentation and scan are known."""
    cases = {}
    for case, files in (found.get("files") or {}).items():
        known = (Path(files["image"]),) if files.get("image") else ()
        images = scans[case].images if case in scans else known
        if images and files.get("prediction"):
            cases[case] = CaseFiles(case, images, Path(files["reference"]), Path(files["prediction"]))
    return cases
