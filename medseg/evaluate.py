"""`medseg evaluate`: segmentations against references, per case and organ."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from scipy import ndimage

from medseg.batch.isolated import Killed
from medseg.batch.parallel import parallel
from medseg.data.checks import check_label_values
from medseg.data.foreign_labels import LabelTranslation
from medseg.data.inputs import MANIFEST_SUFFIX, PROBABILITIES, check_unique, find_cases, manifest_cases
from medseg.data.manifest import Manifest, read_json
from medseg.data.volume_io import READABLE_SUFFIXES, read_label, read_volume
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems, WorkerError, WorkflowError
from medseg.files import write_atomically
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.lesions import by_size
from medseg.metrics.statistics import bland_altman
from medseg.metrics.table import (
    ALL_CLASSES,
    PER_CASE,
    PER_LESION,
    Score,
    Summary,
    check_same_grid,
    score_organs,
    summarize,
    write_lesions,
    write_table,
)
from medseg.model import load_spec
from medseg.outcome import json_text
from medseg.registry import did_you_mean

Result = dict[str, Any]
T = TypeVar("T")

EVALUATION = "evaluation.json"
"""What the result is called in the output folder, with the rows of `PER_CASE` in it."""

VOLUMES = ("reference_volume_ml", "volume_ml")
"""Metrics behind the agreement of volumes, whatever else is asked for."""

RESAMPLED = "prediction resampled"
NO_PREDICTION = "no prediction"
"""Notes, see `medseg.metrics.table`."""

METRIC_GROUPS = {
    "overlap": ("dice", "iou", "precision", "recall", "specificity"),
    "surface": ("hd", "hd95", "assd", "nsd"),
    "volume": tuple(name for name in METRICS if "volume" in name),
    "lesion": tuple(name for name in METRICS if name.startswith("lesion")),
    "image": tuple(name for name, metric in METRICS.items() if metric.scope == "image"),
    "all": tuple(name for name, metric in METRICS.items() if not metric.needs_probabilities),
}
"""Names that stand for several metrics."""

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Pair:
    """A segmentation and what it should be.

    Args:
        case: Their id.
        reference: Label map that an expert drew.
        prediction: Label map to score, or a folder with a file for each organ; None: nothing was predicted.
        image: The scan that the reference was drawn on, where that is known.
        patient: Whose it is, where somebody said.
        probabilities: Those of the prediction, where they stand beside it.
    """

    case: str
    reference: Path
    prediction: Path | None = None
    image: Path | None = None
    patient: str = ""
    probabilities: Path | None = None


@dataclass(frozen=True)
class Rules:
    """How every pair is scored.

    Args:
        organs: Label values that make up each organ.
        labels: Of the references, where they are described.
        translation: From the predictions' label values or files to those of the references.
        metrics: Names in METRICS.
        resample: Whether a prediction on another grid is brought to its reference's.
        with_lesions: Whether each lesion is told of.
    """

    organs: Mapping[str, Sequence[int]]
    labels: Labels | None
    translation: LabelTranslation | None
    metrics: Sequence[str]
    resample: bool
    with_lesions: bool


@dataclass(frozen=True)
class Scored:
    """What became of a pair.

    Args:
        case: Its id.
        rows: One an organ.
        unmapped: Label values of the prediction that stand for no label; background here.
    """

    case: str
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
        metrics: Names in METRICS or `METRIC_GROUPS`.
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
        organ; ``lesions``: by organ and size, if a metric asks for lesions; ``table``, ``evaluation`` and
        ``lesion_table``: the files; ``unmatched``: what was not scored for want of its counterpart; ``resampled`` and
        ``no_prediction``: the cases so scored; ``failed``: those that could not be.

    Raises:
        MedsegError: If a file cannot be used or nothing matches; all cases at once.
    """
    chosen = chosen_metrics(metrics)
    expected, manifest = _references(references, split)
    described = _read_labels(labels) if labels else manifest.labels if manifest else None
    translation = _read_map(label_map, described) if label_map else None
    pairs, unmatched = _pairs(predictions, references, expected, translation, is_manifest=manifest is not None)
    if missing_as_empty:
        pairs += [expected[name] for name in unmatched["references"]]
    if missing_as_empty or (manifest and split is None):  # nobody said that all of them should have been predicted
        if unmatched["references"] and not missing_as_empty:
            message = "W-PART %d of the manifest's %d cases are predicted and scored; --missing-as-empty counts all"
            log.warning(message, len(pairs), len(expected))
        unmatched["references"] = []
    _warn_of(unmatched)
    _check_probabilities(chosen, pairs, described if not translation else None)
    failed: dict[str, MedsegError] = {}
    organs = _organs(described, translation) if described else _values_present(pairs, workers, failed)
    with_lesions = any(name.startswith("lesion") for name in chosen)
    rules = Rules(organs, described, translation, list(dict.fromkeys([*chosen, *VOLUMES])), resample, with_lesions)
    scores = _score_all([pair for pair in pairs if pair.case not in failed], rules, workers, failed)
    if failed and not (
        skip_failed and len(failed) < len(pairs)
    ):  # a mean over the others would be a mean over the easy ones
        raise Problems([failed[pair.case] for pair in pairs if pair.case in failed])
    result = {"cases": len(pairs) - len(failed), **_result(scores, chosen, with_lesions=with_lesions)}
    result |= {
        "unmatched": unmatched,
        "failed": [{"case": name, "error_id": e.error_id, "message": str(e)} for name, e in failed.items()],
    }
    tables = _write(output, scores, chosen, result) if output else {"table": None, "evaluation": None}
    return result | tables


def chosen_metrics(names: Sequence[str]) -> list[str]:
    """The metrics that names of metrics and of `METRIC_GROUPS` mean, each once.

    Raises:
        WorkflowError: If a name is unknown, or there is none.
    """
    chosen = list(dict.fromkeys(metric for name in names for metric in METRIC_GROUPS.get(name, (name,))))
    for name in chosen:
        base = name.partition(":")[0]
        if base not in METRICS:
            hint = did_you_mean(base, [*METRICS, *METRIC_GROUPS])
            raise WorkflowError("E-UNKNOWN-NAME", f"no metric is called {name!r}{hint}", where="--metrics")
        METRICS[name]  # which knows whether it takes a number
    if not chosen:
        raise WorkflowError("E-METRICS", "names no metric; see `medseg metrics`", where="--metrics")
    return chosen


def _references(path: Path, split: str | None) -> tuple[dict[str, Pair], Manifest | None]:
    """Each case, yet without its prediction, and the manifest they come from."""
    if path.suffix != MANIFEST_SUFFIX:
        cases = find_cases([path], split=split)
        check_unique(cases)
        return {case.id: Pair(case.id, case.images[0]) for case in cases}, None
    manifest = Manifest.load(path)
    parts = [split] if split else [name for name in ("training", "test") if getattr(manifest, name)]
    cases = [case for part in parts for case in manifest_cases(manifest, part)]
    return {
        case.id: Pair(
            case.id, case.label, image=case.images[0], patient=case.patient if case.patient != case.id else ""
        )
        for case in cases
        if case.label
    }, manifest


def _read_labels(path: Path) -> Labels:
    if path.suffix == MANIFEST_SUFFIX:
        return Manifest.from_dict({"training": [], **read_json(path)}, path).labels  # nnU-Net's lists no cases
    run = path / "model"
    return load_spec(run if run.is_dir() else path).labels


def _read_map(path: Path, labels: Labels | None) -> LabelTranslation:
    if labels is None:
        message = "nothing names the labels of the references; add --labels MANIFEST, or evaluate against a manifest"
        raise WorkflowError("E-MAP-LABELS", message, where=str(path))
    return LabelTranslation.load(path, labels)


def _pairs(
    predictions: Path,
    references: Path,
    expected: Mapping[str, Pair],
    translation: LabelTranslation | None,
    *,
    is_manifest: bool,
) -> tuple[list[Pair], dict[str, list[str]]]:
    """What has a counterpart, and what has none."""
    has_files = bool(translation and translation.files)
    predicted = translation.find(predictions) if translation and has_files else _label_maps(predictions)
    if references.is_file() and not is_manifest and len(predicted) == 1 and (has_files or predictions.is_file()):
        predicted = dict(zip(expected, predicted.values(), strict=True))  # two files need no common name
    pairs = [
        replace(pair, prediction=predicted[name], probabilities=_beside(predicted[name]))
        for name, pair in expected.items()
        if name in predicted
    ]
    unmatched = {
        "predictions": [name for name in predicted if name not in expected],
        "references": [name for name in expected if name not in predicted],
    }
    if not pairs:
        found, wanted = (", ".join(names[:3]) for names in unmatched.values())
        raise DataError(
            "E-NO-PAIRS", f"no prediction ({found} …) is called like a reference ({wanted} …)", where=str(references)
        )
    return pairs, unmatched


def _label_maps(path: Path) -> dict[str, Path]:
    """Label map of each case; probabilities that stand beside them are none."""
    cases = find_cases([path])
    check_unique(cases)
    return {case.id: case.images[0] for case in cases if not case.id.endswith(PROBABILITIES)}


def _beside(prediction: Path) -> Path | None:
    """Its probabilities, as `medseg predict --probabilities` writes them."""
    name = prediction.name
    for suffix in READABLE_SUFFIXES:
        path = prediction.with_name(f"{name.removesuffix(suffix)}{PROBABILITIES}{suffix}")
        if name.endswith(suffix) and path.exists():
            return path
    return None


def _warn_of(unmatched: Mapping[str, Sequence[str]]) -> None:
    for what, names in unmatched.items():
        if names:
            hint = "; --missing-as-empty counts them as missed" if what == "references" else ""
            log.warning(
                "W-UNMATCHED %d %s without counterpart are not scored: %s%s",
                len(names), what, ", ".join(names[:5]), hint,
            )  # fmt: skip


def _check_probabilities(metrics: Sequence[str], pairs: Sequence[Pair], labels: Labels | None) -> None:
    """Before any work, and once rather than for each case."""
    needy = [name for name in metrics if METRICS[name].needs_probabilities]
    without = [pair.case for pair in pairs if not pair.probabilities]
    if not needy or (labels and not without):
        return
    if without:
        lack = (
            f"{len(without)} cases have none, e.g. {without[0]}; write {without[0]}{PROBABILITIES} beside the label map"
        )
        message = f"{lack} by medseg predict --probabilities"
    else:
        message = "nothing says which channel is which organ; add --labels, and no --map"
    raise WorkflowError(
        "E-METRIC-PROBABILITIES", f"{', '.join(needy)} needs probabilities: {message}", where="--metrics"
    )


def _organs(labels: Labels, translation: LabelTranslation | None) -> dict[str, tuple[int, ...]]:
    """Those that are scored; a map names all label values of each."""
    organs = labels.organ_values
    if translation is None:
        return organs
    mapped = {organ: values for organ, values in organs.items() if {*values} <= translation.mapped}
    if left := [organ for organ in organs if organ not in mapped]:
        log.warning("W-MAP-ORGANS the map does not name %s: not scored", ", ".join(left))
    if not mapped:
        raise WorkflowError("E-MAP", "names no organ whole, so none can be scored", where="--map")
    return mapped


def _values_present(pairs: Sequence[Pair], workers: int, failed: dict[str, MedsegError]) -> dict[str, tuple[int, ...]]:
    """Every label value that any file holds, as an organ of its own."""
    found: set[int] = set()
    for values in _each(pairs, _values, "looking for labels", workers, failed):
        found |= values
    return {f"label {value}": (value,) for value in sorted(found - {0})}


def _values(pair: Pair) -> set[int]:
    paths = [pair.reference, *([pair.prediction] if pair.prediction else [])]
    return {int(value) for path in paths for value in np.unique(read_label(path).array)}


def _score_all(pairs: Sequence[Pair], rules: Rules, workers: int, failed: dict[str, MedsegError]) -> list[Score]:
    """The rows of all pairs, in their order."""
    rows: dict[str, Sequence[Score]] = {}
    unmapped: set[int] = set()
    for scored in _each(pairs, partial(_score, rules=rules), "scoring", workers, failed):
        rows[scored.case] = scored.rows
        unmapped |= scored.unmapped
    if unmapped:
        some = ", ".join(map(str, sorted(unmapped)[:10])) + (" …" if len(unmapped) > 10 else "")
        log.warning("W-MAP-VALUES %d label values that the map does not name are background: %s", len(unmapped), some)
    return [row for pair in pairs for row in rows.get(pair.case, ())]


def _each(
    pairs: Sequence[Pair],
    function: Callable[[Pair], T],
    doing: str,
    workers: int,
    failed: dict[str, MedsegError],
) -> Iterator[T]:
    """A function's values of the pairs as they come; what fails is added to `failed`, by case."""
    found = parallel(partial(_attempt, function), pairs, num_processes=workers, preload=["medseg.cli", __name__])
    for number, outcome in track(found, doing, total=len(pairs)):
        case = pairs[number].case
        if isinstance(outcome, Killed):
            failed[case] = WorkerError("E-KILLED", f"{outcome}; have fewer --workers", where=f"case {case}")
        elif isinstance(outcome, MedsegError):
            failed[case] = outcome
        else:
            yield outcome


def _attempt(function: Callable[[Pair], T], pair: Pair) -> T | MedsegError:
    try:
        return function(pair)
    except MedsegError as error:
        return error
    except OSError as error:
        where = str(error.filename or f"case {pair.case}")
        return DataError("E-FILE", f"cannot be read ({error.strerror or error})", where=where)


def _score(pair: Pair, rules: Rules) -> Scored:
    """Score a pair.

    Raises:
        MedsegError: If it cannot be scored.
    """
    labels = rules.labels
    reference = read_label(pair.reference, image=pair.image, labels=labels)
    prediction, unmapped = _read_prediction(pair, rules, reference)
    if labels:
        check_label_values(reference.array, labels, str(pair.reference))
        check_label_values(prediction.array, labels, str(pair.prediction))
    notes = [] if pair.prediction else [NO_PREDICTION]
    wanted, found = reference.geometry, prediction.geometry
    if rules.resample and not found.matches(wanted) and found.spatial_dims == wanted.spatial_dims:
        prediction = _nearest(prediction, wanted)
        notes = [RESAMPLED]
    rows = score_organs(
        pair.case, reference, prediction, rules.organs,
        ignore_label=labels.ignore_label if labels else None, metrics=rules.metrics, patient=pair.patient,
        probabilities=_read_probabilities(pair, rules, reference), with_lesions=rules.with_lesions,
    )  # fmt: skip
    return Scored(pair.case, [replace(row, note="; ".join(filter(None, [row.note, *notes]))) for row in rows], unmapped)


def _read_prediction(pair: Pair, rules: Rules, reference: Volume) -> tuple[Volume, set[int]]:
    """The label map in the references' values, and the values that were in it and stand for no label."""
    if pair.prediction is None:
        return Volume(np.zeros_like(reference.array, np.uint8), reference.geometry), set()
    if rules.translation:
        return rules.translation.read(pair.prediction)
    return read_label(pair.prediction), set()


def _read_probabilities(pair: Pair, rules: Rules, reference: Volume) -> dict[str, Any] | None:
    """Of each organ, (I, J[, K]), if a metric needs them."""
    labels = rules.labels
    if not (labels and pair.probabilities and any(METRICS[name].needs_probabilities for name in rules.metrics)):
        return None
    found = read_volume(pair.probabilities)
    check_same_grid(pair.case, reference, found)
    if len(found.array) != labels.num_outputs:
        message = f"{len(found.array)} channels; expected {labels.num_outputs}, as the labels have it"
        raise DataError("E-PROBABILITIES", message, where=str(pair.probabilities))
    first = 0 if labels.regions else 1  # without regions the background comes first
    return dict(zip(labels.organs, found.array[first:], strict=True))


def _nearest(label: Volume, target: Geometry) -> Volume:
    """A label map on another grid, by nearest neighbor; background outside."""
    n = target.spatial_dims
    between = np.linalg.inv(label.geometry.affine) @ target.affine
    array = ndimage.affine_transform(
        label.array[0], between[:n, :n], between[:n, 3], output_shape=target.shape, order=0, mode="constant", cval=0
    )
    return Volume(array[None], target)


def _result(scores: Sequence[Score], metrics: Sequence[str], *, with_lesions: bool) -> Result:
    summary = summarize(_only(scores, metrics))
    return {
        "mean": {metric: _mean_of_organs(summary, metric) for metric in metrics},
        "per_organ": {organ: values for organ, values in summary.items() if values},
        "volumes": _volume_agreement(scores),
        **({"lesions": _lesions_by_size(scores)} if with_lesions else {}),
        "resampled": _noted(scores, RESAMPLED),
        "no_prediction": _noted(scores, NO_PREDICTION),
    }


def _only(scores: Sequence[Score], metrics: Sequence[str]) -> list[Score]:
    """Without the volumes, where nobody asked for them."""
    return [
        replace(score, values={name: score.values[name] for name in metrics if name in score.values})
        for score in scores
    ]


def _noted(scores: Sequence[Score], note: str) -> list[str]:
    return list(dict.fromkeys(score.case for score in scores if note in score.note.split("; ")))


def _mean_of_organs(summary: Summary, metric: str) -> float:
    means = [values[metric]["mean"] for values in summary.values() if metric in values]
    known = [mean for mean in means if not math.isnan(mean)]
    return sum(known) / len(known) if known else math.nan


def _volume_agreement(scores: Sequence[Score]) -> dict[str, Result]:
    """Bland and Altman's numbers in ml by organ, of the cases where either has it; none for pictures."""
    pairs: dict[str, list[list[float]]] = {}
    for score in scores:
        volumes = [score.values.get(name, math.nan) for name in VOLUMES]
        if any(volumes) and not any(map(math.isnan, volumes)):
            pairs.setdefault(score.organ, []).append(volumes)
    agreement = {}
    for organ, volumes_of in pairs.items():
        reference, prediction = np.transpose(volumes_of)
        bias, limits = bland_altman(reference, prediction)
        agreement[organ] = {
            "n": len(reference),
            "mean_reference_ml": float(reference.mean()),
            "mean_prediction_ml": float(prediction.mean()),
            "bias_ml": bias,
            "limits_ml": list(limits),
        }
    return agreement


def _lesions_by_size(scores: Sequence[Score]) -> dict[str, list[Result]]:
    organs = dict.fromkeys(score.organ for score in scores if score.organ != ALL_CLASSES)
    return {
        organ: [
            asdict(size) for size in by_size([n for score in scores if score.organ == organ for n in score.lesions])
        ]
        for organ in organs
    }


def _write(output: Path, scores: Sequence[Score], metrics: Sequence[str], result: Result) -> Result:
    """Write the tables, and say where they are."""
    output.mkdir(parents=True, exist_ok=True)
    rows = _only(scores, metrics)
    tables = {"table": str(output / PER_CASE), "evaluation": str(output / EVALUATION)}
    write_table(output / PER_CASE, rows)
    if "lesions" in result:
        write_lesions(output / PER_LESION, rows)
        tables["lesion_table"] = str(output / PER_LESION)
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
    write_atomically(output / EVALUATION, json_text({**result, **tables, "per_case": per_case}, indent=1).encode())
    return tables


def evaluation_table(result: Mapping[str, Any]) -> RenderableType:
    """A row per organ and metric, how well volumes agree, and what was not scored."""
    table = _table("organ", "metric", title=f"{result['cases']} cases")
    for heading in ("mean ± std", "95 % interval", "median", "n", "missed", "spurious"):
        table.add_column(heading, justify="right", no_wrap=True)
    for organ, scores in result["per_organ"].items():
        for metric, score in scores.items():
            spread = f"{_number(score['mean'])} ± {_number(score['std'])}"
            counts = (str(score[key]) for key in ("n", "n_missed", "n_spurious"))
            table.add_row(organ, metric, spread, _range(score["ci95"]), _number(score["median"]), *counts)
    for metric, mean in result["mean"].items():
        table.add_row("mean", metric, _number(mean))
    shown: list[RenderableType] = [table]
    if result["volumes"]:
        shown.append(_volumes_table(result["volumes"]))
    lines = ["", *(f"failed  {entry['message']}" for entry in result["failed"])]
    lines += [f"{result[key]}" for key in ("table", "evaluation", "lesion_table") if result.get(key)]
    return Group(*shown, Text("\n".join(lines), overflow="ignore", no_wrap=True))


def _volumes_table(volumes: Mapping[str, Result]) -> Table:
    table = _table("organ", title="volumes in ml: prediction against reference (Bland and Altman)")
    for heading in ("reference", "prediction", "bias", "limits of agreement", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for organ, found in volumes.items():
        means = (_number(found[key]) for key in ("mean_reference_ml", "mean_prediction_ml", "bias_ml"))
        table.add_row(organ, *means, _range(found["limits_ml"]), str(found["n"]))
    return table


def _table(*columns: str, title: str) -> Table:
    """Without lines, so that eight columns fit into 80 characters."""
    first, *others = columns
    return Table(
        Column(first, overflow="fold"),
        *others,
        title=f"\n{title}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )


def _range(bounds: Sequence[float]) -> str:
    low, high = map(_number, bounds)
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"


def _number(value: float) -> str:
    """Three or four digits."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"
