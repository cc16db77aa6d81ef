"""Tables of several runs side by side: paired by case and organ, tested by patient, ranked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError
from medseg.metrics import METRICS
from medseg.metrics.statistics import (
    TIE,
    bootstrap_ci,
    holm,
    interval,
    mean_of_known,
    rank_biserial,
    resampled_means,
    wilcoxon,
)
from medseg.metrics.table import ABSENT, ALL_CLASSES, MISSED, SPURIOUS, belongs
from medseg.registry import did_you_mean
from medseg.wording import counted, listed

NOT_METRICS = ("case", "organ", "patient", "diagonal_mm", "note")

DISTANCES = frozenset({"hd", "hd95", "assd", "asd", "masd"})
LOWER_IS_BETTER = DISTANCES | {"volume_error"}
"""Columns of tables made elsewhere, whose names METRICS may not have; of every other one more is better."""

DATA_HASHES = ("medseg.data_hash", "medseg.manifest_sha256")
"""Tags that tell data apart; the first that both runs have decides."""

Result = dict[str, Any]
Key = tuple[str, str]
Array = npt.NDArray[np.float64]


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

    @property
    def organs(self) -> list[str]:
        return list(dict.fromkeys(organ for _, organ in self.values))

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

    @property
    def counted(self) -> set[Key]:
        """The results that every run has a value of."""
        known = ~np.isnan(self.values).any(axis=2)
        return {(self.cases[row], self.organs[column]) for row, column in np.argwhere(known)}


def lower_is_better(metric: str) -> bool:
    """Whether less of a table's column is better."""
    return METRICS[metric].lower_is_better if metric in METRICS else metric in LOWER_IS_BETTER


def is_distance(metric: str) -> bool:
    """Whether a table's column is in mm, and not defined where an organ was missed."""
    return METRICS[metric].is_distance if metric in METRICS else metric in DISTANCES


def sign_of(metric: str) -> int:
    """1 where more is better, else -1."""
    return -1 if lower_is_better(metric) else 1


def parsed_table(name: str, rows: Sequence[Mapping[str, str]], metric: str, **known: Any) -> RunTable:
    """One metric of a table's rows; of those that have no such value, as all classes have no Dice, nothing.

    Args:
        name: What the run is called in messages.
        rows: As `csv.DictReader` gives them.
        metric: A column.
        known: What else `RunTable` has.

    Raises:
        DataError: If a column is missing, a value is no number, or a row is there twice.
    """
    columns = set(rows[0]) if rows else set()
    if not {"case", "organ"} <= columns:
        raise DataError("E-COMPARE-TABLE", "needs rows with the columns case, organ and a metric", where=name)
    if metric in METRICS and not METRICS[metric].is_ranked:
        message = f"{metric!r} has no better and worse; compare by absolute_volume_difference_ml or another error"
        raise DataError("E-COMPARE-METRIC", message, where=name)
    if metric not in columns or metric in NOT_METRICS:
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
        if not belongs(metric, row["organ"]):
            continue
        values[key] = _number(row, metric, where)
        notes[key] = row.get("note") or ""
        if row.get("patient"):
            patients[row["case"]] = row["patient"]
        if row.get("diagonal_mm"):
            diagonals[row["case"]] = _number(row, "diagonal_mm", where)
    if not values:
        message = f"has no row that {metric} belongs in" + f" ({ALL_CLASSES!r})" * (not belongs(metric, ""))
        raise DataError("E-COMPARE-METRIC", message, where=name)
    return RunTable(name, values, notes=notes, patients=patients, diagonals=diagonals, **known)


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column] or math.nan)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        message = f"{column} is {row[column]!r}; it must be a number, or empty where it is not defined"
        raise DataError("E-COMPARE-TABLE", message, where=where)
    return value


def with_diagonals(tables: Sequence[RunTable], metric: str) -> list[RunTable]:
    """A distance that is not defined gets the value it counts as, where the scan's diagonal is known."""
    if not is_distance(metric):
        return list(tables)
    diagonals = {case: mm for table in tables for case, mm in table.diagonals.items()}
    invented = {key for table in tables for key in table.values if table.says(key, SPURIOUS)}

    def value_of(table: RunTable, key: Key) -> float:
        value, diagonal = table.values[key], diagonals.get(key[0], math.nan)
        if not math.isnan(value) or math.isnan(diagonal):
            return value
        if table.says(key, MISSED, SPURIOUS):
            return diagonal
        return 0.0 if table.says(key, ABSENT) and key in invented else math.nan

    return [replace(table, values={key: value_of(table, key) for key in table.values}) for table in tables]


def num_as_diagonal(table: RunTable, metric: str, keys: Collection[Key]) -> int:
    """How many of these organs, all with a value, have the diagonal of their scan from `with_diagonals`."""
    return sum(table.says(key, MISSED, SPURIOUS) for key in keys) if is_distance(metric) else 0


def paired(baseline: RunTable, other: RunTable) -> Grid:
    """Two runs on the cases and organs that both have.

    Raises:
        DataError: If there is none.
    """
    keys = [key for key in baseline.values if key in other.values]
    if keys:
        return side_by_side([baseline, other], keys)
    tables = (baseline, other)
    if baseline.cases & other.cases:
        told = [f"{table.name} (organs {listed(table.organs)})" for table in tables]
        advice = "call them alike: medseg evaluate --labels takes their names from a manifest or a model"
    else:
        told = [f"{table.name} (cases {listed(sorted(table.cases))})" for table in tables]
        advice = "compare runs of the same fold and data"
    raise DataError("E-COMPARE-CASES", f"no case and organ is in both {told[0]} and {told[1]}; {advice}")


def side_by_side(tables: Sequence[RunTable], keys: Sequence[Key]) -> Grid:
    """Runs on these cases and organs."""
    cases = {case: n for n, case in enumerate(dict.fromkeys(case for case, _ in keys))}
    organs = {organ: n for n, organ in enumerate(dict.fromkeys(organ for _, organ in keys))}
    values = np.full((len(cases), len(organs), len(tables)), np.nan)
    for case, organ in keys:
        values[cases[case], organs[organ]] = [table.values[case, organ] for table in tables]
    values[np.isnan(values).any(axis=2)] = np.nan
    patients = [next((t.patients[case] for t in tables if case in t.patients), case) for case in cases]
    return Grid(list(cases), list(organs), patients, values)


def by_case(grid: Grid) -> Mapping[str, Mapping[str, float]]:
    """By organ and case."""
    found = grid.values[..., 1] - grid.values[..., 0]
    return {
        organ: {case: float(d) for case, d in zip(grid.cases, found[:, n], strict=True) if not math.isnan(d)}
        for n, organ in enumerate(grid.organs)
    }


def held_to(baseline: RunTable, other: RunTable, grid: Grid, sign: int) -> Result:
    """One run against the baseline; `sign` is 1 where more is better, else -1."""
    organs = {organ: _organ(grid.values[:, n], grid.patients, sign) for n, organ in enumerate(grid.organs)}
    for organ, found in organs.items():
        keys = [(case, organ) for case in grid.cases if (case, organ) in other.values]
        found["n_unscored"] = sum(_is_unscored(baseline, other, key) for key in keys)
        for table, which in ((baseline, "baseline"), (other, "run")):
            found[f"missed_{which}"] = sum(table.says(key, MISSED) for key in keys)
            found[f"spurious_{which}"] = sum(table.says(key, SPURIOUS) for key in keys)
    lost = sorted(key for key in baseline.values if key[0] in other.cases and _is_lost(baseline, other, key))
    gone = sorted(baseline.cases - other.cases)
    differences = grid.values[..., 1] - grid.values[..., 0]
    means = [found["difference"] for found in organs.values() if found["n"]]
    mean = float(np.mean(means)) if means else math.nan
    why_worse = [f"{counted(len(lost), 'result')} missing"] if lost else []
    why_worse += [f"cases are missing: {listed(gone)}"] if gone else []
    why_worse += [] if sign * mean >= -TIE else [f"mean difference {mean:+.4f}"]  # NaN is worse
    return {
        "run": other.name,
        "label": other.label,
        "organs": organs,
        "n_cases": len(grid.cases),
        "mean_difference": mean,
        "mean_ci95": bootstrap_ci(differences, patients=grid.patients),
        "worse": bool(why_worse),
        "why_worse": why_worse,
        "lost": [list(key) for key in lost],
        "unpaired": {"baseline": gone, "run": sorted(other.cases - baseline.cases)},
    }


def _organ(values: Array, patients: Sequence[str], sign: int) -> Result:
    """One organ's (cases, 2) values, tested and counted."""
    differences = values[:, 1] - values[:, 0]
    known = ~np.isnan(differences)
    gains = sign * differences[known]
    before, now = values[known].mean(axis=0) if known.any() else (math.nan, math.nan)
    drawn, num_patients = resampled_means(values, patients=patients)
    return {
        "n": int(known.sum()),
        "n_patients": num_patients,
        "baseline": float(before),
        "baseline_ci95": interval(drawn[:, 0], num_patients),
        "run": float(now),
        "run_ci95": interval(drawn[:, 1], num_patients),
        "difference": float(now - before),
        "ci95": interval(drawn[:, 1] - drawn[:, 0], num_patients),
        "p": wilcoxon(differences, patients=patients),
        "p_holm": math.nan,
        "effect_size": rank_biserial(sign * differences, patients=patients),
        "wins": int((gains > TIE).sum()),
        "ties": int((np.abs(gains) <= TIE).sum()),
        "losses": int((gains < -TIE).sum()),
    }


def correct_p_values(comparisons: Sequence[Result]) -> None:
    """Fill in the p values corrected over all organs and runs."""
    tested = [found for comparison in comparisons for found in comparison["organs"].values()]
    for found, p in zip(tested, holm([found["p"] for found in tested]), strict=True):
        found["p_holm"] = float(p)


def _is_unscored(baseline: RunTable, other: RunTable, key: Key) -> bool:
    """Whether a pair says something that its values do not: only one has a value, or neither as an organ was missed."""
    unknown = [math.isnan(table.values[key]) for table in (baseline, other)]
    return any(unknown) and (not all(unknown) or any(t.says(key, MISSED, SPURIOUS) for t in (baseline, other)))


def _is_lost(baseline: RunTable, other: RunTable, key: Key) -> bool:
    is_known = not math.isnan(baseline.values[key])
    if key not in other.values:
        return is_known or baseline.says(key, MISSED, SPURIOUS)
    # An organ absent in both is no fault: there the first run invented it.
    return is_known and math.isnan(other.values[key]) and not other.says(key, ABSENT)


def ranked(tables: Sequence[RunTable], grid: Grid, keys: Sequence[Key], sign: int) -> list[Result]:
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


def differing_references(baseline: RunTable, other: RunTable) -> list[Key]:
    """What only one of two runs was scored against: there the other's reference is empty, by the notes of both."""
    if not (any(baseline.notes.values()) or any(other.notes.values())):
        return []
    empty = [{key for key in table.notes if table.says(key, ABSENT, SPURIOUS)} for table in (baseline, other)]
    return sorted(key for key in empty[0] ^ empty[1] if key in baseline.values and key in other.values)


def data_hashes(tables: Sequence[RunTable]) -> list[str]:
    """Each hash with the runs that have it, if there is more than one."""
    for tag in DATA_HASHES:
        groups: dict[str, list[str]] = {}
        for table in tables:
            if value := table.tags.get(tag):
                groups.setdefault(value, []).append(table.label)
        if sum(map(len, groups.values())) > 1:
            return [f"{value[:16]} ({listed(labels)})" for value, labels in groups.items()] if len(groups) > 1 else []
    return []
