"""`medseg compare`: runs are compared case by case and organ by organ, the first being what the others are held to."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.errors import DataError, ModelError, WorkflowError
from medseg.files import write_atomically
from medseg.metrics.paired import (
    RunTable,
    by_case,
    correct_p_values,
    data_hashes,
    differing_references,
    held_to,
    is_distance,
    lower_is_better,
    num_as_diagonal,
    paired,
    parsed_table,
    ranked,
    side_by_side,
    sign_of,
    with_diagonals,
)
from medseg.metrics.table import MISSED, PER_CASE, SPURIOUS, read_rows
from medseg.reporting.comparison import comparison_page, ranking_page
from medseg.reporting.comparison_figure import Differences, comparison_figure, png, ranking_figure
from medseg.tracking.runs import experiment_runs, log_comparison, tracked_run
from medseg.wording import counted, listed

Result = dict[str, Any]

log = logging.getLogger("medseg")


def compare(
    runs: Sequence[str],
    *,
    metric: str = "dice",
    tracking_uri: str | None = None,
    output: Path | None = None,
    log: bool = True,
) -> Result:
    """Hold every run to the first, on the cases that both have.

    Of distances, an organ that a run missed or invented counts as the scan's diagonal, and one rightly left out as 0
    where another run invents it; in tables without ``diagonal_mm`` such pairs are left out, which `warnings` tell.
    Runs of other data (another data hash) are compared all the same, with a warning: a model trained on more cases
    may well be held to one trained on fewer.

    Args:
        runs: Two or more run folders (of one fold or of all), folders of `medseg evaluate`, CSV tables, or MLflow
            run ids.
        metric: A column of their tables.
        tracking_uri: Where to look for run ids; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        output: Folder for ``comparison.csv`` (a row per run and organ), ``pairs.csv`` (a row per case and organ, the
            values as they were counted), ``comparison.png`` and ``comparison.html``.
        log: Put the same files beside the artifacts of the runs that were named by an MLflow id.

    Returns:
        A dict. Of its ``comparisons``, one for each other run, ``organs`` holds for each organ what the table
        ``comparison.csv`` has: ``difference`` is run − baseline, and ``ci95`` its interval; ``p`` is Wilcoxon's
        signed-rank test, NaN for fewer than six patients, and ``p_holm`` corrected over all organs and runs;
        ``effect_size`` is the matched-pairs rank-biserial correlation, positive where the run is better;
        ``n_unscored`` counts pairs that cannot be compared, as when an organ was missed and has no surface distance.
        ``lost`` lists what the first run has of a case and the other lacks. A run is ``worse`` (and ``why_worse``
        says why) if its mean over the organs of the mean difference is on the wrong side (by more than 1e-6,
        significant or not), or results that the first has are missing: a case, an organ of a case, or a missed
        organ's distance that cannot be counted. ``n_as_diagonal`` counts the organs that a run missed or invented
        and that have the diagonal as distance. ``names_patients``: whether the tables say whose each case is; else
        every case is taken for another patient.

    Raises:
        WorkflowError: If there are fewer than two runs.
        DataError: If a table cannot be read or lacks the metric, or no case is in both.
        ModelError: If a run id is not known.
    """
    if len(runs) < 2:
        raise WorkflowError("E-COMPARE-RUNS", f"{len(runs)} run given; name the one to hold others to, then the others")
    baseline, *others = tables = with_diagonals(_labeled([_table(run, metric, tracking_uri) for run in runs]), metric)
    grids = [paired(baseline, other) for other in others]
    result: Result = {
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "baseline": baseline.name,
        "baseline_label": baseline.label,
        "comparisons": [
            held_to(baseline, other, grid, sign_of(metric)) for other, grid in zip(others, grids, strict=True)
        ],
        "n_as_diagonal": num_as_diagonal(baseline, metric, set().union(*(grid.counted for grid in grids)))
        + sum(num_as_diagonal(other, metric, grid.counted) for other, grid in zip(others, grids, strict=True)),
        "names_patients": any(table.patients for table in tables),
        "warnings": [],
        "page": str(output / "comparison.html") if output else None,
    }
    correct_p_values(result["comparisons"])
    result["warnings"] = [
        text
        for comparison, other in zip(result["comparisons"], others, strict=True)
        for text in _warnings(baseline, other, comparison, metric)
    ]
    run_ids = list(dict.fromkeys(table.run_id for table in tables if table.run_id)) if log else []
    if output or run_ids:
        files = _files(result, tables, [by_case(grid) for grid in grids])
        if output:
            _write(output, files)
        shared = files | {"pairs.csv": _csv(_pair_rows(tables, name_patients=False))}  # a store has other readers
        result["warnings"] += _logged(run_ids, shared, result, tracking_uri)
    return result


def rank_experiment(
    experiment: str, *, metric: str = "dice", tracking_uri: str | None = None, output: Path | None = None
) -> Result:
    """Rank the finished runs of an MLflow experiment on the cases that all of them have.

    What a run lacks of the others' cases and organs is left out in all of them, and told in ``warnings``. Where no
    result is common to all, those runs are ranked that have what most runs have; ``warnings`` name the others. Organs
    missed or invented are counted as `compare` does. The runs are not changed in MLflow.

    Args:
        experiment: Its name.
        metric: A column of the runs' tables.
        tracking_uri: The store; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        output: Folder for ``ranking.csv``, ``ranking.png`` and ``ranking.html``.

    Returns:
        ``metric, lower_is_better, experiment, n_cases, n_patients, organs, ranking, n_as_diagonal, names_patients,
        warnings, page``. ``ranking`` has
        for each run, the best first, ``run, run_id, mean, ci95, difference, difference_ci95, p, p_holm, missed,
        spurious``: the mean over the organs of the mean over the cases, and its difference from the best run's. ``p``
        is of the patients' means over the organs, corrected over the runs; NaN for the best.

    Raises:
        DataError: If fewer than two runs can be ranked.
        ModelError: If there is no such experiment, or its store does not answer.
    """
    tables, warnings = _ranked_tables(experiment, metric, tracking_uri)
    tables = with_diagonals(tables, metric)
    keys = [key for key in tables[0].values if all(key in table.values for table in tables)]
    grid = side_by_side(tables, keys)
    left_out = len(keys) - len(grid.counted)
    if left_out:
        warnings.append(f"{left_out} of {len(keys)} results are left out, as not every run has a {metric} there")
    if hashes := data_hashes(tables):
        warnings.append(f"the runs were made from {len(hashes)} different data: {'; '.join(hashes)}")
    result: Result = {
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "experiment": experiment,
        "n_cases": len(grid.cases),
        "n_patients": len(set(grid.patients)),
        "organs": grid.organs,
        "ranking": ranked(tables, grid, keys, sign_of(metric)),
        "n_as_diagonal": sum(num_as_diagonal(table, metric, grid.counted) for table in tables),
        "names_patients": any(table.patients for table in tables),
        "warnings": warnings,
        "page": str(output / "ranking.html") if output else None,
    }
    if output:
        figure = ranking_figure(result)
        _write(
            output,
            {
                "ranking.csv": _csv(_flat(row) for row in result["ranking"]),
                "ranking.png": png(figure),
                "ranking.html": ranking_page(result).encode(),
            },
        )
    return result


def _table(run: str, metric: str, tracking_uri: str | None) -> RunTable:
    path = Path(run)
    if path.is_dir():
        tags = _provenance(path)
        path = path / PER_CASE
        if not path.exists():
            message = f"holds no {PER_CASE}; finish its training, or run medseg evaluate, and name that folder"
            raise DataError("E-COMPARE-TABLE", message, where=run)
        return parsed_table(run, read_rows(path), metric, tags=tags)
    if path.exists():
        return parsed_table(run, read_rows(path), metric)
    tracked = tracked_run(run, tracking_uri)
    label = f"{tracked.name} ({tracked.run_id[:8]})"
    return parsed_table(run, tracked.rows, metric, label=label, tags=tracked.tags, run_id=tracked.run_id)


def _provenance(run: Path) -> Mapping[str, str]:
    """What a run folder's model says of its making; of a cross-validation the first fold's."""
    for path in (run / "model" / "model.json", *sorted(run.glob("fold_*/model/model.json"))):
        if path.exists():
            try:
                provenance = json.loads(path.read_text()).get("provenance", {})
                return {name: str(value) for name, value in provenance.items()}
            except (ValueError, AttributeError):
                log.warning("W-COMPARE-MODEL %s: is damaged, so it is not known which data the run was made from", path)
                return {}
    return {}


def _labeled(tables: Sequence[RunTable]) -> list[RunTable]:
    """Folders and files by the part of their path that tells them apart."""
    paths = [Path(table.name).parts for table in tables if not table.label]
    common = 0
    while paths and all(len(path) > common + 1 and path[: common + 1] == paths[0][: common + 1] for path in paths):
        common += 1
    return [replace(table, label=table.label or str(Path(*Path(table.name).parts[common:]))) for table in tables]


def _ranked_tables(experiment: str, metric: str, uri: str | None) -> tuple[list[RunTable], list[str]]:
    """The runs to rank, all of which have some result in common, and what is left out."""
    tables, warnings = [], []
    for run in experiment_runs(experiment, uri):
        label = f"{run.name} ({run.run_id[:8]})"
        if run.rows and metric not in run.rows[0]:
            warnings.append(f"{label} is not ranked: its table has no {metric}")
        else:
            tables.append(parsed_table(label, run.rows, metric, label=label, tags=run.tags, run_id=run.run_id))
    if tables and not set.intersection(*(set(table.values) for table in tables)):
        usual, _ = Counter(frozenset(table.values) for table in tables).most_common(1)[0]
        others = [table.label for table in tables if not usual <= table.values.keys()]
        tables = [table for table in tables if usual <= table.values.keys()]
        warnings.append(f"not ranked, as they do not have the cases and organs that most runs have: {listed(others)}")
    warnings += _not_in_all(tables)
    if len(tables) < 2:
        told = "".join(f"; {warning}" for warning in warnings)
        message = f"{len(tables)} of its finished runs can be ranked by {metric}, and two are needed{told}"
        raise DataError("E-COMPARE-RUNS", message, where=f"experiment {experiment}")
    return tables, warnings


def _not_in_all(tables: Sequence[RunTable]) -> list[str]:
    """What some runs have and others lack, so that none is ranked by it."""
    organs = list(dict.fromkeys(organ for table in tables for organ in table.organs))
    lacking = {table.label: [organ for organ in organs if organ not in table.organs] for table in tables}
    found = [
        f"left out, as {label} does not have them: organs {listed(lacks)}" for label, lacks in lacking.items() if lacks
    ]
    if len({frozenset(table.cases) for table in tables}) > 1:
        found.append("the runs do not have the same cases: those that all have are ranked by")
    elif not found and len({frozenset(table.values) for table in tables}) > 1:
        found.append("the runs do not have the same organs of each case: those that all have are ranked by")
    return found


def _warnings(baseline: RunTable, other: RunTable, comparison: Result, metric: str) -> list[str]:
    """What a reader must know before believing a comparison."""
    found = []
    unpaired = comparison["unpaired"]
    if cases := sorted(unpaired["baseline"] + unpaired["run"]):
        found.append(f"{other.label}: left out, as only one of the two runs has them: cases {listed(cases)}")
    if lost := [f"{organ} of {case}" for case, organ in comparison["lost"]]:
        found.append(f"{other.label} has no result, which counts as worse, for: {listed(lost)}")
    more = sorted({organ for case, organ in other.values if case in baseline.cases} - set(comparison["organs"]))
    if more:
        found.append(f"{other.label}: left out, as {baseline.label} does not have them: organs {listed(more)}")
    if unscored := sum(organ["n_unscored"] for organ in comparison["organs"].values()):
        text = f"{other.label}: {counted(unscored, 'pair')} left out, as not both runs have a {metric} there"
        tables = (baseline, other)
        if is_distance(metric) and any(
            t.says(k, MISSED, SPURIOUS) and v != v for t in tables for k, v in t.values.items()
        ):
            text += (
                "; a missed or invented organ counts as the scan's diagonal where the tables have a column diagonal_mm"
            )
        found.append(text)
    if differing := [f"{organ} of {case}" for case, organ in differing_references(baseline, other)]:
        found.append(f"{other.label}: scored against other references, one of the two being empty: {listed(differing)}")
    if hashes := data_hashes([baseline, other]):
        found.append(f"the runs were made from different data, which may be why they differ: {'; '.join(hashes)}")
    return found


def _files(result: Result, tables: Sequence[RunTable], differences: Differences) -> dict[str, bytes]:
    return {
        "comparison.csv": _csv(_summary_rows(result)),
        "pairs.csv": _csv(_pair_rows(tables)),
        "comparison.png": png(comparison_figure(result, differences)),
        "comparison.html": comparison_page(result, differences).encode(),
    }


def _summary_rows(result: Result) -> Iterable[Mapping[str, Any]]:
    for comparison in result["comparisons"]:
        for organ, found in comparison["organs"].items():
            yield _flat(
                {"baseline_run": result["baseline"], "compared_run": comparison["run"], "organ": organ, **found}
            )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """An interval as two columns, what is not a number as an empty field."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, tuple):
            flat |= {f"{name}_low": value[0], f"{name}_high": value[1]}
        else:
            flat[name] = value
    return {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in flat.items()}


def _pair_rows(tables: Sequence[RunTable], *, name_patients: bool = True) -> Iterable[Mapping[str, Any]]:
    """Patients who are not to be named are numbered."""
    numbers: dict[str, int] = {}
    for case, organ in dict.fromkeys(key for table in tables for key in table.values):
        patient: str | int = next((table.patients[case] for table in tables if case in table.patients), "")
        if patient and not name_patients:
            patient = numbers.setdefault(str(patient), len(numbers) + 1)
        values = {table.name: table.values.get((case, organ), math.nan) for table in tables}
        yield _flat({"case": case, "organ": organ, "patient": patient, **values})


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def _logged(run_ids: Sequence[str], files: Mapping[str, bytes], result: Result, uri: str | None) -> list[str]:
    """Put the files beside the runs' artifacts, in a folder that the same comparison made again overwrites."""
    compared = "\n".join([result["baseline"], *(comparison["run"] for comparison in result["comparisons"])])
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', result['metric'])}-{hashlib.sha256(compared.encode()).hexdigest()[:8]}"
    warnings = []
    with tempfile.TemporaryDirectory(prefix="medseg-") as temporary:
        folder = Path(temporary, name)
        _write(folder, files)
        for run_id in run_ids:
            try:
                log_comparison(run_id, folder, uri)
            except ModelError as error:
                warnings.append(f"W-COMPARE-LOG the comparison is not in MLflow: {error}")
    return warnings
