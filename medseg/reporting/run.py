"""What a training left in its run folder, read so that a report can be made of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.data.manifest import Manifest
from medseg.errors import DataError, MedsegError
from medseg.labels import Labels
from medseg.metrics.table import PER_CASE, Score, read_table
from medseg.model import ModelSpec, load_spec
from medseg.reporting.figures import Points
from medseg.reporting.scene import CaseFiles

PREDICTIONS = "predictions"
"""Folder of a run folder that holds what its best network found in each held-out scan."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """The training of one fold.

    Args:
        folder: Its run folder.
        losses: (iteration, training loss).
        dice: By organ (iteration, mean Dice of the cases looked at during training).
        spec: Its model; None: there is none here.
        cases: Where the files of each held-out case are, by its id; empty where the manifest is gone.
    """

    folder: Path
    losses: Points
    dice: Mapping[str, Points]
    spec: ModelSpec | None
    cases: Mapping[str, CaseFiles]


@dataclass(frozen=True)
class Run:
    """A run of one fold or of all, or whatever else left a table.

    Args:
        folder: Where it is.
        scores: Rows of its table.
        trainings: One a fold; empty: only a table was left.
        result: What `medseg train` said at its end, as far as that is known.
    """

    folder: Path
    scores: tuple[Score, ...]
    trainings: tuple[Training, ...]
    result: Result

    @property
    def labels(self) -> Labels | None:
        return next((training.spec.labels for training in self.trainings if training.spec), None)

    @property
    def name(self) -> str:
        """As the workflow calls it, or else as its folder is called."""
        for training in self.trainings:
            if training.spec and training.spec.provenance.get("medseg.workflow"):
                return str(training.spec.provenance["medseg.workflow"])
        return self.folder.resolve().name


def read_run(folder: Path, result: Result) -> Run:
    """Read a run folder.

    Args:
        folder: Of one fold, or with those of all folds; a folder that holds a table and nothing else will do.
        result: What `medseg train` said at its end; empty: that is not known.

    Raises:
        DataError: If there is no table, or it cannot be read.
    """
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
    folders = [path for path in sorted(folder.glob("fold_*")) if (path / "model").is_dir()]
    if not folders and (folder / "model").is_dir():
        folders = [folder]
    return Run(folder, tuple(scores), tuple(_training(path) for path in folders), result)


def _training(folder: Path) -> Training:
    try:
        spec = load_spec(folder / "model")
    except MedsegError:
        spec = None
    cases = _cases(folder, spec.provenance.get("fold")) if spec else {}
    return Training(folder, _losses(folder / "log.jsonl"), _dice(folder / "validation.csv"), spec, cases)


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


def _cases(folder: Path, fold: int | None) -> dict[str, CaseFiles]:
    """The held-out ones: the others were not scored here."""
    try:
        manifest = Manifest.load(folder / "manifest.json")
    except MedsegError:
        return {}
    return {
        case.id: CaseFiles(case.id, case.images, case.label, folder / PREDICTIONS / f"{case.id}.nii.gz")
        for case in manifest.training
        if case.fold == fold
    }
