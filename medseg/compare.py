"""`medseg compare`: runs are compared case by case and organ by organ, the first being what the others are held to."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from medseg.errors import DataError, ModelError, WorkflowError
from medseg.files import write_atomically
from medseg.metrics import METRICS
from medseg.metrics.statistics import (
    MIN_PATIENTS,
    TIE,
    bootstrap_ci,
    holm,
    interval,
    mean_of_known,
    rank_biserial,
    resampled_means,
    wilcoxon,
)
from medseg.metrics.table import ABSENT, MISSED, PER_CASE, SPURIOUS
from medseg.registry import did_you_mean
from medseg.reporting.comparison import (
    comparison_figure,
    comparison_page,
    p_text,
    png,
    ranking_figure,
    ranking_page,
    with_interval,
)
from medseg.tracking.runs import experiment_runs, log_comparison, tracked_run

NOT_METRICS = ("case", "organ", "patient", "diagonal_mm", "note")

DISTANCES = frozenset({"hd", "hd95", "assd", "asd", "masd"})
LOWER_IS_BETTER = DISTANCES | {"volume_error"}
"""Columns of tables made elsewhere, whose names METRICS may not have; of every other one more is better."""

DATA_HASHES = ("medseg.data_hash", "medseg.manifest_sha256")
"""Tags that tell data apart; the first that both runs have decides."""

MAX_NAMED = 5

Result = dict[str, Any]
Key = tuple[str, str]
Array = npt.NDArray[np.float64]
Differences = Sequence[Mapping[str, Mapping[str, float]]]
"""Of each comparison, by organ and case."""


@dataclass(frozen=True)
class RunTable:
    """One metric of one run.

    Args:
        name: As the run was named.
        values: (case, organ) to value, NaN where it is not defined.
        label: What people call it.
        notes: (case, organ) to what `medseg.metrics.table` says of it.
        patients: Case to patient, where the table names them.
        diagonals: Case to the length of its scan's diagonal in mm, where the table has it.
        tags: What is known of the run's data and making.
        run_id: In MLflow, if it was read from there.
    """

    name: str
    values: Mapping[Key, float]
    label: str = ""
    notes: Mapping[Key, str] = field(default_factory=dict)
    patients: Mapping[str, str] = field(default_factory=dict)
    diagonals: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""

    @property
    def cases(self) -> set[str]:
        return {case for case, _ in self.values}

    def says(self, key: Key, *notes: str) -> bool:
        """Whether the row's note has one of these."""
        return not set(notes).isdisjoint(self.notes.get(key, "").split("; "))


@dataclass(frozen=True)
class Grid:
    """Runs side by side: what any of them has no value of is NaN in all.

    Args:
        cases: Rows.
        organs: Columns.
        patients: Whose each case is.
        values: (cases, organs, runs).
    """

    cases: list[str]
    organs: list[str]
    patients: list[str]
    values: Array


def compare(
    runs: Sequence[str],
    *,
    metric: str = "dice",
    tracking_uri: str | None = None,
    output: Path | None = None,
    fail_if_worse: bool = False,
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
        fail_if_worse: Raise if a run is worse than the first: if its mean over the organs of the mean difference is on
            the wrong side (by more than 1e-6, significant or not), or results that the first has are missing: a case,
            an organ of a case, or a missed organ's distance that cannot be counted.
        log: Put the same files beside the artifacts of the runs that were named by an MLflow id.

    Returns:
        ``metric, lower_is_better, baseline, comparisons, warnings, page``. ``comparisons`` has for each other run
        ``run, organs, n_cases, mean_difference, mean_ci95, worse, lost, unpaired {baseline, run}``, and for each organ
        ``n, n_patients, baseline, run, difference, ci95, p, p_holm, effect_size, wins, ties, losses, n_unscored,
        missed_baseline, missed_run, spurious_baseline, spurious_run``. ``difference`` is run − baseline;
        ``effect_size`` is the matched-pairs rank-biserial correlation, positive where the run is better. ``p`` is
        Wilcoxon's signed-rank test, NaN for fewer than six patients; ``p_holm`` is corrected over all organs and runs.
        ``lost`` lists what the first run has of a case and the other lacks; ``n_unscored`` counts pairs that cannot
        be compared, as when an organ was missed and has no surface distance.

    Raises:
        WorkflowError: If there are fewer than two runs.
        DataError: If a table cannot be read or lacks the metric, no case is in both, or a run is worse.
        ModelError: If a run id is not known.
    """
    if len(runs) < 2:
        raise WorkflowError("E-COMPARE-RUNS", f"{len(runs)} run given; name the one to hold others to, then the others")
    baseline, *others = tables = _counted(_labeled([_table(run, metric, tracking_uri) for run in runs]), metric)
    grids = [_pairs(baseline, other) for other in others]
    result: Result = {
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "baseline": baseline.name,
        "baseline_label": baseline.label,
        "comparisons": [
            _comparison(baseline, other, grid, _sign(metric)) for other, grid in zip(others, grids, strict=True)
        ],
        "warnings": [],
        "page": str(output / "comparison.html") if output else None,
    }
    _correct(result["comparisons"])
    result["warnings"] = [
        text for c, other in zip(result["comparisons"], others, strict=True) for text in _warnings(baseline, other, c)
    ]
    run_ids = list(dict.fromkeys(table.run_id for table in tables if table.run_id)) if log else []
    if output or run_ids:
        files = _files(result, tables, [_differences(grid) for grid in grids])
        if output:
            _write(output, files)
        result["warnings"] += _logged(run_ids, files, result, tracking_uri)
    worse = [c["run"] for c in result["comparisons"] if c["worse"] or c["unpaired"]["baseline"]]
    if fail_if_worse and worse:
        raise DataError(
            "E-COMPARE-WORSE",
            f"mean {metric} is worse than that of {baseline.name}, or cases are missing: {', '.join(worse)}",
        )
    return result


def rank_experiment(
    experiment: str, *, metric: str = "dice", tracking_uri: str | None = None, output: Path | None = None
) -> Result:
    """Rank the finished runs of an MLflow experiment on the cases that all of them have.

    Where no case is common to all, those runs are ranked that have the cases most runs have; the others are named in
    ``warnings``. Organs missed or invented are counted as `compare` does. The runs are not changed in MLflow.

    Args:
        experiment: Its name.
        metric: A column of the runs' tables.
        tracking_uri: The store; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        output: Folder for ``ranking.csv``, ``ranking.png`` and ``ranking.html``.

    Returns:
        ``metric, lower_is_better, experiment, n_cases, n_patients, organs, ranking, warnings, page``. ``ranking`` has
        for each run, the best first, ``run, run_id, mean, ci95, difference, difference_ci95, p, p_holm, missed,
        spurious``: the mean over the organs of the mean over the cases, and its difference from the best run's. ``p``
        is of the patients' means over the organs, corrected over the runs; NaN for the best.

    Raises:
        DataError: If fewer than two runs can be ranked.
        ModelError: If there is no such experiment, or its store does not answer.
    """
    tables, warnings = _ranked_tables(experiment, metric, tracking_uri)
    tables = _counted(tables, metric)
    keys = [key for key in tables[0].values if all(key in table.values for table in tables)]
    grid = _grid(tables, keys)
    left_out = len(keys) - int((~np.isnan(grid.values[..., 0])).sum())
    if left_out:
        warnings.append(f"{left_out} of {len(keys)} results are left out, as not every run has a {metric} there")
    if hashes := _data_hashes(tables):
        warnings.append(f"the runs were made from {len(hashes)} different data: {'; '.join(hashes)}")
    result: Result = {
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "experiment": experiment,
        "n_cases": len(grid.cases),
        "n_patients": len(set(grid.patients)),
        "organs": grid.organs,
        "ranking": _ranking(tables, grid, keys, _sign(metric)),
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


def lower_is_better(metric: str) -> bool:
    """Whether less of a table's column is better."""
    return METRICS[metric].lower_is_better if metric in METRICS else metric in LOWER_IS_BETTER


def is_distance(metric: str) -> bool:
    """Whether a table's column is in mm, and not defined where an organ was missed."""
    return METRICS[metric].is_distance if metric in METRICS else metric in DISTANCES


def comparison_table(result: Mapping[str, Any]) -> RenderableType:
    """What `compare` found, for people."""
    shown: list[RenderableType] = []
    for comparison in result["comparisons"]:
        table = Table(
            Column("organ", overflow="fold", min_width=9, vertical="bottom"),
            *(Column(heading, justify="right", no_wrap=True, vertical="bottom") for heading in _HEADINGS),
            title=f"{result['metric']}: {comparison['label']} compared with {result['baseline_label']}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for organ, found in comparison["organs"].items():
            table.add_row(organ, *_cells(found))
        table.add_section()
        mean = with_interval(comparison["mean_difference"], comparison["mean_ci95"], signed=True)
        table.add_row("mean", "", "", "", mean)
        shown.append(table)
    lines = [*result["warnings"], *_small_print(result)]
    lines += [f"page: {result['page']}"] if result["page"] else []
    return Group(*shown, Text("\n".join(lines)))


_HEADINGS = (
    "n", "before", "now", "difference\n[95 % interval]", "p\n(Holm)", "effect", "win/tie\n/loss", "missed",
)  # fmt: skip


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(found["n"]),
        f"{found['baseline']:.3f}",
        f"{found['run']:.3f}",
        with_interval(found["difference"], found["ci95"], signed=True),
        p_text(found["p_holm"]),
        "–" if math.isnan(found["effect_size"]) else f"{found['effect_size']:+.2f}",
        f"{found['wins']}/{found['ties']}/{found['losses']}",
        f"{found['missed_baseline']}→{found['missed_run']}",
    )


def _small_print(result: Mapping[str, Any]) -> list[str]:
    """What the figures of the table are."""
    tested = [found for c in result["comparisons"] for found in c["organs"].values()]
    lines = [
        "effect: matched-pairs rank-biserial correlation, +1 where every case is better, −1 where every one is worse"
    ]
    if any(math.isnan(found["p"]) for found in tested):
        lines.append(f"too few: with fewer than {MIN_PATIENTS} patients no p can be below 0.05")
    return lines


def ranking_table(result: Mapping[str, Any]) -> RenderableType:
    """What `rank_experiment` found, for people."""
    headings = ("mean\n[95 % interval]", "difference\nto the best", "p\n(Holm)", "missed")
    table = Table(
        Column("", justify="right"),
        Column("run", overflow="fold", min_width=9, vertical="bottom"),
        *(Column(heading, justify="right", no_wrap=True, vertical="bottom") for heading in headings),
        title=f"{result['metric']} of {result['experiment']}: {len(result['ranking'])} runs, {result['n_cases']} cases",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for place, row in enumerate(result["ranking"], start=1):
        difference = with_interval(row["difference"], row["difference_ci95"], signed=True) if place > 1 else ""
        p = p_text(row["p_holm"]) if place > 1 else ""
        table.add_row(
            str(place), row["run"], with_interval(row["mean"], row["ci95"]), difference, p, str(row["missed"])
        )
    lines = [*result["warnings"], *([f"page: {result['page']}"] if result["page"] else [])]
    return Group(table, Text("\n".join(lines)))


def _sign(metric: str) -> int:
    """1 where more is better, else -1."""
    return -1 if lower_is_better(metric) else 1


def _table(run: str, metric: str, tracking_uri: str | None) -> RunTable:
    path = Path(run)
    if path.is_dir():
        tags = _provenance(path)
        path = path / PER_CASE
        if not path.exists():
            message = f"holds no {PER_CASE}; finish its training, or run medseg evaluate, and name that folder"
            raise DataError("E-COMPARE-TABLE", message, where=run)
        return _parsed(run, _rows(path), metric, tags=tags)
    if path.exists():
        return _parsed(run, _rows(path), metric)
    tracked = tracked_run(run, tracking_uri)
    label = f"{tracked.name} ({tracked.run_id[:8]})"
    return _parsed(run, tracked.rows, metric, label=label, tags=tracked.tags, run_id=tracked.run_id)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _provenance(run: Path) -> Mapping[str, str]:
    """What a run folder's model says of its making; of a cross-validation the first fold's."""
    for path in (run / "model" / "model.json", *sorted(run.glob("fold_*/model/model.json"))):
        if path.exists():
            provenance = json.loads(path.read_text()).get("provenance", {})
            return {name: str(value) for name, value in provenance.items()}
    return {}


def _parsed(name: str, rows: Sequence[Mapping[str, str]], metric: str, **known: Any) -> RunTable:
    columns = set(rows[0]) if rows else set()
    if not {"case", "organ"} <= columns:
        raise DataError("E-COMPARE-TABLE", "needs rows with the columns case, organ and a metric", where=name)
    if metric not in columns:
        hint = did_you_mean(metric, columns.difference(NOT_METRICS))
        raise DataError("E-COMPARE-METRIC", f"has no column {metric!r}{hint}", where=name)
    values: dict[Key, float] = {}
    notes: dict[Key, str] = {}
    patients: dict[str, str] = {}
    diagonals: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):  # as an editor counts, the header being line 1
        key, where = (row["case"], row["organ"]), f"{name}:{number}"
        if key in values:
            raise DataError("E-COMPARE-TABLE", f"case {key[0]}, organ {key[1]} is there twice", where=where)
        values[key] = _number(row, metric, where)
        notes[key] = row.get("note") or ""
        if row.get("patient"):
            patients[row["case"]] = row["patient"]
        if row.get("diagonal_mm"):
            diagonals[row["case"]] = _number(row, "diagonal_mm", where)
    return RunTable(name, values, notes=notes, patients=patients, diagonals=diagonals, **known)


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        return float(row[column] or math.nan)
    except ValueError:
        message = f"{column} is {row[column]!r}; it must be a number, or empty where it is not defined"
        raise DataError("E-COMPARE-TABLE", message, where=where) from None


def _labeled(tables: Sequence[RunTable]) -> list[RunTable]:
    """Folders and files by the part of their path that tells them apart."""
    paths = [Path(table.name).parts for table in tables if not table.label]
    common = 0
    while paths and all(len(path) > common + 1 and path[: common + 1] == paths[0][: common + 1] for path in paths):
        common += 1
    return [replace(table, label=table.label or str(Path(*Path(table.name).parts[common:]))) for table in tables]


def _ranked_tables(experiment: str, metric: str, uri: str | None) -> tuple[list[RunTable], list[str]]:
    """The runs to rank, all of which have some case in common, and why others are not among them."""
    tables, warnings = [], []
    for run in experiment_runs(experiment, uri):
        label = f"{run.name} ({run.run_id[:8]})"
        if run.rows and metric not in run.rows[0]:
            warnings.append(f"{label} is not ranked: its table has no {metric}")
        else:
            tables.append(_parsed(label, run.rows, metric, label=label, tags=run.tags, run_id=run.run_id))
    if tables and not set.intersection(*(table.cases for table in tables)):
        usual, _ = Counter(frozenset(table.cases) for table in tables).most_common(1)[0]
        others = [table.label for table in tables if not usual <= table.cases]
        tables = [table for table in tables if usual <= table.cases]
        warnings.append(f"not ranked, as they do not have the cases that most runs have: {_named(others)}")
    elif tables and len({frozenset(table.cases) for table in tables}) > 1:
        warnings.append("the runs do not have the same cases: those that all have are ranked by")
    if len(tables) < 2:
        told = "".join(f"; {warning}" for warning in warnings)
        message = f"{len(tables)} of its finished runs can be ranked by {metric}, and two are needed{told}"
        raise DataError("E-COMPARE-RUNS", message, where=f"experiment {experiment}")
    return tables, warnings


def _counted(tables: Sequence[RunTable], metric: str) -> list[RunTable]:
    """A distance that is not defined gets the value it counts as, where the scan's diagonal is known."""
    if not is_distance(metric):
        return list(tables)
    diagonals = {case: mm for table in tables for case, mm in table.diagonals.items()}
    invented = {key for table in tables for key in table.values if table.says(key, SPURIOUS)}

    def counted(table: RunTable, key: Key) -> float:
        value, diagonal = table.values[key], diagonals.get(key[0], math.nan)
        if not math.isnan(value) or math.isnan(diagonal):
            return value
        if table.says(key, MISSED, SPURIOUS):
            return diagonal
        return 0.0 if table.says(key, ABSENT) and key in invented else math.nan

    return [replace(table, values={key: counted(table, key) for key in table.values}) for table in tables]


def _pairs(baseline: RunTable, other: RunTable) -> Grid:
    keys = [key for key in baseline.values if key in other.values]
    if not keys:
        raise DataError(
            "E-COMPARE-CASES",
            f"no case and organ is in both {baseline.name} (cases {_named(sorted(baseline.cases))}) and {other.name} "
            f"(cases {_named(sorted(other.cases))}); compare runs of the same fold and data",
        )
    return _grid([baseline, other], keys)


def _grid(tables: Sequence[RunTable], keys: Sequence[Key]) -> Grid:
    cases = {case: n for n, case in enumerate(dict.fromkeys(case for case, _ in keys))}
    organs = {organ: n for n, organ in enumerate(dict.fromkeys(organ for _, organ in keys))}
    values = np.full((len(cases), len(organs), len(tables)), np.nan)
    for case, organ in keys:
        values[cases[case], organs[organ]] = [table.values[case, organ] for table in tables]
    values[np.isnan(values).any(axis=2)] = np.nan
    patients = [next((t.patients[case] for t in tables if case in t.patients), case) for case in cases]
    return Grid(list(cases), list(organs), patients, values)


def _differences(grid: Grid) -> Mapping[str, Mapping[str, float]]:
    """By organ and case."""
    found = grid.values[..., 1] - grid.values[..., 0]
    return {
        organ: {case: float(d) for case, d in zip(grid.cases, found[:, n], strict=True) if not math.isnan(d)}
        for n, organ in enumerate(grid.organs)
    }


def _comparison(baseline: RunTable, other: RunTable, grid: Grid, sign: int) -> Result:
    """One run against the baseline; `sign` is 1 where more is better, else -1."""
    organs = {organ: _organ(grid.values[:, n], grid.patients, sign) for n, organ in enumerate(grid.organs)}
    for organ, found in organs.items():
        keys = [(case, organ) for case in grid.cases if (case, organ) in other.values]
        found["n_unscored"] = sum(_is_unscored(baseline, other, key) for key in keys)
        for table, which in ((baseline, "baseline"), (other, "run")):
            found[f"missed_{which}"] = sum(table.says(key, MISSED) for key in keys)
            found[f"spurious_{which}"] = sum(table.says(key, SPURIOUS) for key in keys)
    lost = sorted(key for key in baseline.values if key[0] in other.cases and _is_lost(baseline, other, key))
    differences = grid.values[..., 1] - grid.values[..., 0]
    means = [found["difference"] for found in organs.values() if found["n"]]
    mean = float(np.mean(means)) if means else math.nan
    return {
        "run": other.name,
        "label": other.label,
        "organs": organs,
        "n_cases": len(grid.cases),
        "mean_difference": mean,
        "mean_ci95": bootstrap_ci(differences, patients=grid.patients),
        "worse": bool(lost) or math.isnan(mean) or sign * mean < -TIE,
        "lost": [list(key) for key in lost],
        "unpaired": {
            "baseline": sorted(baseline.cases - other.cases),
            "run": sorted(other.cases - baseline.cases),
        },
    }


def _organ(values: Array, patients: Sequence[str], sign: int) -> Result:
    """One organ's (cases, 2) values, tested and counted."""
    differences = values[:, 1] - values[:, 0]
    known = ~np.isnan(differences)
    gains = sign * differences[known]
    before, now = values[known].mean(axis=0) if known.any() else (math.nan, math.nan)
    return {
        "n": int(known.sum()),
        "n_patients": len({patient for patient, has in zip(patients, known, strict=True) if has}),
        "baseline": float(before),
        "run": float(now),
        "difference": float(now - before),
        "ci95": bootstrap_ci(differences, patients=patients),
        "p": wilcoxon(differences, patients=patients),
        "p_holm": math.nan,
        "effect_size": rank_biserial(sign * differences, patients=patients),
        "wins": int((gains > TIE).sum()),
        "ties": int((np.abs(gains) <= TIE).sum()),
        "losses": int((gains < -TIE).sum()),
    }


def _correct(comparisons: Sequence[Result]) -> None:
    """Fill in the p values corrected over all organs and runs."""
    tested = [found for comparison in comparisons for found in comparison["organs"].values()]
    for found, p in zip(tested, holm([found["p"] for found in tested]), strict=True):
        found["p_holm"] = float(p)


def _is_unscored(baseline: RunTable, other: RunTable, key: Key) -> bool:
    """Whether a pair says something that its values do not: only one has a value, or neither as an organ was missed."""
    unknown = [math.isnan(table.values[key]) for table in (baseline, other)]
    return any(unknown) and (not all(unknown) or any(t.says(key, MISSED, SPURIOUS) for t in (baseline, other)))


def _is_lost(baseline: RunTable, other: RunTable, key: Key) -> bool:
    if key not in other.values:
        return True
    return other.says(key, MISSED) and math.isnan(other.values[key]) and not math.isnan(baseline.values[key])


def _warnings(baseline: RunTable, other: RunTable, comparison: Result) -> list[str]:
    """What a reader must know before believing a comparison."""
    found = []
    unpaired = comparison["unpaired"]
    if cases := sorted(unpaired["baseline"] + unpaired["run"]):
        found.append(f"{other.label}: left out, as only one of the two runs has them: cases {_named(cases)}")
    if lost := [f"{organ} of {case}" for case, organ in comparison["lost"]]:
        found.append(f"{other.label} has no result, which counts as worse, for: {_named(lost)}")
    more = sorted({organ for case, organ in other.values if case in baseline.cases} - set(comparison["organs"]))
    if more:
        found.append(f"{other.label}: left out, as {baseline.label} does not have them: organs {_named(more)}")
    if unscored := sum(organ["n_unscored"] for organ in comparison["organs"].values()):
        found.append(
            f"{other.label}: {unscored} pairs are left out, as a value is not defined where an organ was missed or invented"
            " (distances count as the scan's diagonal where the tables have a column diagonal_mm)"
        )
    if hashes := _data_hashes([baseline, other]):
        found.append(f"the runs were made from different data, which may be why they differ: {'; '.join(hashes)}")
    return found


def _data_hashes(tables: Sequence[RunTable]) -> list[str]:
    """Each hash with the runs that have it, if there is more than one."""
    for tag in DATA_HASHES:
        groups: dict[str, list[str]] = {}
        for table in tables:
            if value := table.tags.get(tag):
                groups.setdefault(value, []).append(table.label)
        if sum(map(len, groups.values())) > 1:
            return [f"{value[:16]} ({_named(labels)})" for value, labels in groups.items()] if len(groups) > 1 else []
    return []


def _ranking(tables: Sequence[RunTable], grid: Grid, keys: Sequence[Key], sign: int) -> list[Result]:
    """The best run first."""
    shape = grid.values.shape  # (cases, organs, runs)
    means = mean_of_known(mean_of_known(grid.values, 0), 0)
    per_case = mean_of_known(grid.values, 1)  # (cases, runs)
    order = np.argsort(-sign * means, kind="stable")
    best = order[0]
    drawn, num_patients = resampled_means(grid.values.reshape(shape[0], -1), patients=grid.patients)
    resampled = mean_of_known(drawn.reshape(-1, *shape[1:]), 1)  # (resamples, runs)
    p = np.array([wilcoxon(per_case[:, n] - per_case[:, best], patients=grid.patients) for n in range(shape[2])])
    p[best] = math.nan
    p_holm = holm(p)
    return [
        {
            "run": tables[n].label,
            "run_id": tables[n].run_id,
            "mean": float(means[n]),
            "ci95": interval(resampled[:, n], num_patients),
            "difference": float(means[n] - means[best]),
            "difference_ci95": interval(resampled[:, n] - resampled[:, best], num_patients),
            "p": float(p[n]),
            "p_holm": float(p_holm[n]),
            "missed": sum(tables[n].says(key, MISSED) for key in keys),
            "spurious": sum(tables[n].says(key, SPURIOUS) for key in keys),
        }
        for n in order
    ]


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


def _pair_rows(tables: Sequence[RunTable]) -> Iterable[Mapping[str, Any]]:
    for case, organ in dict.fromkeys(key for table in tables for key in table.values):
        patient = next((table.patients[case] for table in tables if case in table.patients), "")
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


def _named(cases: Sequence[str]) -> str:
    more = f" and {len(cases) - MAX_NAMED} more" if len(cases) > MAX_NAMED else ""
    return ", ".join(cases[:MAX_NAMED]) + more
