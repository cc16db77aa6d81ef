"""`medseg evaluate`: segmentations against references, per case and organ."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medseg.batch.attempts import attempted
from medseg.data.checks import check_label_values
from medseg.data.foreign_labels import LabelTranslation
from medseg.data.inputs import MANIFEST_SUFFIX, PROBABILITIES
from medseg.data.manifest import Manifest, read_json
from medseg.data.pairs import Pair, References, find_pairs, nearest
from medseg.data.volume_io import read_label
from medseg.errors import MedsegError, Problems, WorkflowError
from medseg.files import write_atomically
from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.groups import asks_for_lesions, chosen_metrics
from medseg.metrics.overview import VOLUMES, only, overview
from medseg.metrics.table import (
    EVALUATION,
    PER_CASE,
    PER_LESION,
    Score,
    check_same_grid,
    score_organs,
    write_lesions,
    write_table,
)
from medseg.model import load_spec
from medseg.outcome import json_text
from medseg.wording import counted, listed

Result = dict[str, Any]
T = TypeVar("T")

RESAMPLED = "prediction resampled"
NO_PREDICTION = "no prediction"
"""Notes, see `medseg.metrics.table`."""

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Rules:
    """How every pair is scored.

    Args:
        organs: Label values that make up each organ.
        labels: Of the references, where they are described.
        translation: From the predictions' label values or files to those of the references.
        metrics: Names in METRICS.
        resample: Whether a prediction on another grid is brought to its reference's.
    """

    organs: Mapping[str, Sequence[int]]
    labels: Labels | None
    translation: LabelTranslation | None
    metrics: Sequence[str]
    resample: bool


@dataclass(frozen=True)
class Scored:
    """What became of a pair.

    Args:
        pair: What was scored.
        rows: One an organ.
        unmapped: Label values of the prediction that stand for no label; background here.
    """

    pair: Pair
    rows: Sequence[Score]
    unmapped: set[int]


def evaluate(
    predictions: Path,
    references: Path,
    *,
    labels: Path | None = None,
    label_map: Path | None = None,
    metrics: Sequence[str] = ("dice", "iou"),
    resample: bool = False,
    missing_as_empty: bool = False,
    skip_failed: bool = False,
    output: Path | None = None,
    split: str | None = None,
    workers: int = 0,
) -> Result:
    """Score segmentations; files belong together that are called the same, or after the same case.

    Args:
        predictions: A file, or a folder; whatever else stands in it is left alone.
        references: A file, a folder, or a manifest, whose labelled cases are the references.
        labels: A manifest, nnU-Net's dataset.json, or a model that names the labels; None: the references' manifest,
            or else the values that occur.
        label_map: Says which label values or files of the predictions stand for each label, see `LabelTranslation`;
            only organs that it names are scored. None: the predictions have the references' values.
        metrics: Names in METRICS or `METRIC_GROUPS`; ``all`` leaves out what needs probabilities where there are none.
        resample: Bring a prediction that stands on another grid to its reference's, by nearest neighbor,
            and say so in its note.
        missing_as_empty: Count a reference without prediction as if an empty one had been predicted.
        skip_failed: Score the others where cases cannot be scored, and list these.
        output: Folder for the tables, made if need be; None: none is written.
        split: Part of a manifest: ``training``, ``test`` or ``fold_N``; None: whatever is predicted.
        workers: Processes that score at once; 0: this one alone. Scripts that ask for more need the usual
            ``if __name__ == "__main__":``.

    Returns:
        ``cases``, ``mean`` (of the organs' means) and ``per_organ`` for each metric; ``volumes``: their agreement by
        organ; ``lesions``: by organ and size, if a metric asks for lesions; ``patients``: how many, None: nobody named
        them, and each case counts as one; ``table``, ``evaluation`` and ``lesion_table``: the files; ``unmatched``:
        what was not scored for want of its counterpart; ``resampled`` and ``no_prediction``: the cases so scored;
        ``failed``: those that could not be.

    Raises:
        MedsegError: If a file cannot be used or nothing matches; all cases at once.
    """
    asked = chosen_metrics(metrics)
    expected = References.find(references, split)
    described = _read_labels(labels) if labels else expected.manifest.labels if expected.manifest else None
    if not described and (named := predictions / "dataset.json").exists():
        log.warning("W-LABELS the labels are called after their numbers; --labels %s gives them names", named)
    translation = LabelTranslation.load(label_map, described) if label_map else None
    pairs, unmatched = find_pairs(predictions, expected, translation=translation, missing_as_empty=missing_as_empty)
    unmatched.warn()
    chosen = _possible(asked, metrics, pairs, described if not translation else None)

    failed: dict[str, MedsegError] = {}
    if described:
        organs = translation.organs(described) if translation else described.organ_values
    else:
        organs = _values_present(pairs, workers, failed)
    rules = Rules(organs, described, translation, list(dict.fromkeys([*chosen, *VOLUMES])), resample)
    scored = _score_all(pairs, rules, workers, failed)
    failed = {pair.case: failed[pair.case] for pair in pairs if pair.case in failed}
    _refuse_unless_skipped(failed, len(pairs), skip_failed=skip_failed)

    scores = [row for one in scored for row in one.rows]
    result = {
        "cases": len(scored),
        **overview(scores, chosen),
        "resampled": _noted(scores, RESAMPLED),
        "no_prediction": _noted(scores, NO_PREDICTION),
        "unmatched": asdict(unmatched),
        "failed": [{"case": name, "error_id": e.error_id, "message": str(e)} for name, e in failed.items()],
    }
    tables = _write(output, scored, chosen, rules, result) if output else {"table": None, "evaluation": None}
    return result | tables


def _read_labels(path: Path) -> Labels:
    if path.suffix == MANIFEST_SUFFIX:
        return Manifest.from_dict({"training": [], **read_json(path)}, path).labels  # nnU-Net's lists no cases
    run = path / "model"
    return load_spec(run if run.is_dir() else path).labels


def _possible(metrics: Sequence[str], names: Sequence[str], pairs: Sequence[Pair], labels: Labels | None) -> list[str]:
    """The metrics that can be told, before any work: some need probabilities.

    Args:
        metrics: That `names` stand for.
        names: As they were asked for, groups among them.
        pairs: To score.
        labels: Say which channel is which organ.

    Raises:
        WorkflowError: If one that was asked for by its name cannot.
    """
    needy = [name for name in metrics if METRICS[name].needs_probabilities]
    without = [pair.case for pair in pairs if not pair.probabilities]
    if not needy or (labels and not without):
        return list(metrics)
    lack = "nothing says which channel is which organ; add --labels, and no --map"
    if without:
        file = f"{without[0]}{PROBABILITIES}"
        lack = f"none beside {listed(without, 3)}; medseg predict --probabilities writes them, as {file}"
    message = f"{', '.join(needy)} needs probabilities: {lack}"
    if not {*needy}.isdisjoint(names):
        raise WorkflowError("E-METRIC-PROBABILITIES", message, where="--metrics")
    log.warning("W-METRIC-PROBABILITIES left out: %s", message)
    return [name for name in metrics if name not in needy]


def _values_present(pairs: Sequence[Pair], workers: int, failed: dict[str, MedsegError]) -> dict[str, tuple[int, ...]]:
    """Every label value that any file holds, as an organ of its own."""
    found = set().union(*_each(pairs, _values, "looking for labels", workers, failed))
    return {f"label {value}": (value,) for value in sorted(found - {0})}


def _values(pair: Pair) -> set[int]:
    paths = [pair.reference, *([pair.prediction] if pair.prediction else [])]
    return {int(value) for path in paths for value in np.unique(read_label(path).array)}


def _score_all(pairs: Sequence[Pair], rules: Rules, workers: int, failed: dict[str, MedsegError]) -> list[Scored]:
    """What became of the pairs that can be scored, in their order."""
    left = [pair for pair in pairs if pair.case not in failed]
    scored = {one.pair.case: one for one in _each(left, partial(_score, rules=rules), "scoring", workers, failed)}
    unmapped = sorted(set().union(*(one.unmapped for one in scored.values())))
    if unmapped:
        log.warning("W-MAP-VALUES taken for background, as the map does not name them: %s", listed(unmapped, 10))
    return [scored[pair.case] for pair in left if pair.case in scored]


def _each(
    pairs: Sequence[Pair], function: Callable[[Pair], T], doing: str, workers: int, failed: dict[str, MedsegError]
) -> Iterator[T]:
    jobs = {pair.case: pair for pair in pairs}
    yield from attempted(function, jobs, failed, doing=doing, num_processes=workers, preload=["medseg.cli", __name__])


def _refuse_unless_skipped(failed: Mapping[str, MedsegError], num_pairs: int, *, skip_failed: bool) -> None:
    """A mean over the cases that do not fail would be one over the easy ones."""
    if not failed:
        return
    problems = Problems(list(failed.values()))
    if not skip_failed or len(failed) == num_pairs:
        raise problems
    log.warning("W-FAILED %d of %s cannot be scored:\n%s", len(failed), counted(num_pairs, "case"), problems)


def _score(pair: Pair, rules: Rules) -> Scored:
    """Score a pair.

    Raises:
        MedsegError: If it cannot be scored.
    """
    labels = rules.labels
    reference = read_label(pair.reference, image=pair.image, labels=labels)
    prediction, unmapped = pair.read_prediction(reference, rules.translation)
    if labels:
        check_label_values(reference.array, labels, str(pair.reference))
        remedy = "say with --map which of them stand for which label, or give the --labels that it was made with"
        check_label_values(prediction.array, labels, str(pair.prediction), remedy=remedy)
    notes = [] if pair.prediction else [NO_PREDICTION]
    wanted, found = reference.geometry, prediction.geometry
    if rules.resample and not found.matches(wanted) and found.spatial_dims == wanted.spatial_dims:
        prediction = nearest(prediction, wanted)
        notes = [RESAMPLED]
    rows = score_organs(
        pair.case, reference, prediction, rules.organs,
        ignore_label=labels.ignore_label if labels else None, metrics=rules.metrics, patient=pair.patient,
        probabilities=_probabilities(pair, rules, reference), with_lesions=asks_for_lesions(rules.metrics),
    )  # fmt: skip
    return Scored(pair, [replace(row, note="; ".join(filter(None, [row.note, *notes]))) for row in rows], unmapped)


def _probabilities(pair: Pair, rules: Rules, reference: Volume) -> dict[str, Any] | None:
    """Of each organ, (I, J[, K]), if a metric needs them."""
    if not (rules.labels and any(METRICS[name].needs_probabilities for name in rules.metrics)):
        return None
    found = pair.read_probabilities(rules.labels)
    check_same_grid(pair.case, reference, found)
    first = 0 if rules.labels.regions else 1  # without regions the background comes first
    return dict(zip(rules.labels.organs, found.array[first:], strict=True))


def _noted(scores: Sequence[Score], note: str) -> list[str]:
    return list(dict.fromkeys(score.case for score in scores if note in score.note.split("; ")))


def _write(output: Path, scored: Sequence[Scored], metrics: Sequence[str], rules: Rules, result: Result) -> Result:
    """Write the tables, and say where they are."""
    output.mkdir(parents=True, exist_ok=True)
    rows = only([row for one in scored for row in one.rows], metrics)
    tables = {"table": str(output / PER_CASE), "evaluation": str(output / EVALUATION)}
    write_table(output / PER_CASE, rows)
    if "lesions" in result:
        write_lesions(output / PER_LESION, rows)
        tables["lesion_table"] = str(output / PER_LESION)
    how = {  # whoever draws the cases needs to know what their files and values are
        "labels": rules.labels.to_dict() if rules.labels else None,
        "map": asdict(rules.translation) if rules.translation else None,
        "files": {one.pair.case: one.pair.files for one in scored},
    }
    per_case = [
        {
            "case": row.case,
            "organ": row.organ,
            "patient": row.patient,
            **row.values,
            "diagonal_mm": row.diagonal_mm,
            "note": row.note,
        }
        for row in rows
    ]
    write_atomically(
        output / EVALUATION, json_text({**result, **tables, **how, "per_case": per_case}, indent=1).encode()
    )
    return tables
