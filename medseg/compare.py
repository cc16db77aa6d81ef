"""`medseg compare`: runs are compared case by case and organ by organ, the first being what the others are held to."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from medseg.errors import DataError, WorkflowError
from medseg.files import write_atomically
from medseg.metrics.table import PER_CASE
from medseg.registry import did_you_mean
from medseg.tracking.runs import per_case_table

NOT_METRICS = ("case", "organ", "note")
LOWER_IS_BETTER = frozenset({"hd", "hd95", "assd", "asd", "masd", "volume_error"})
"""Distances and errors; of every other metric more is better."""

TIE = 1e-6
"""Values closer than this are equal: the tables have six decimals."""

MAX_NAMED = 5

Result = dict[str, Any]
Key = tuple[str, str]


@dataclass(frozen=True)
class RunTable:
    """One metric of one run.

    Args:
        name: As the run was named.
        values: (case, organ) to value, NaN where it is not defined.
    """

    name: str
    values: Mapping[Key, float]

    @property
    def cases(self) -> set[str]:
        return {case for case, _ in self.values}


def compare(
    runs: Sequence[str],
    *,
    metric: str = "dice",
    tracking_uri: str | None = None,
    output: Path | None = None,
    fail_if_worse: bool = False,
) -> Result:
    """Hold every run to the first, on the cases that both have.

    Args:
        runs: Two or more run folders (of one fold or of all), folders of `medseg evaluate`, CSV tables, or MLflow
            run ids.
        metric: A column of their tables.
        tracking_uri: Where to look for run ids; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        output: Folder for ``comparison.csv`` (a row per run and organ) and ``pairs.csv`` (a row per case).
        fail_if_worse: Raise if a run's mean over the organs is worse than the first's, or cases are missing.

    Returns:
        ``metric, baseline, comparisons``: for each other run ``run, organs {organ: {n, baseline, run, difference,
        wins, ties, losses, n_unscored}}, mean_difference, worse, lost, unpaired {baseline, run}``; ``lost`` lists the
        organs that the first run has of a case and the other lacks, which makes it worse. ``n_unscored`` counts
        pairs of which only one has a value, as when an organ was missed and has no surface distance.

    Raises:
        WorkflowError: If there are fewer than two runs.
        DataError: If a table cannot be read or lacks the metric, no case is in both, or a run is worse.
        ModelError: If a run id is not known.
    """
    if len(runs) < 2:
        raise WorkflowError("E-COMPARE-RUNS", f"{len(runs)} run given; name the one to hold others to, then the others")
    baseline, *others = (_table(run, metric, tracking_uri) for run in runs)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    result: Result = {
        "metric": metric,
        "baseline": baseline.name,
        "comparisons": [_comparison(baseline, other, sign) for other in others],
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "comparison.csv", _summary_rows(result))
        _write(output / "pairs.csv", _pair_rows([baseline, *others]))
    worse = [c["run"] for c in result["comparisons"] if c["worse"] or c["unpaired"]["baseline"]]
    if fail_if_worse and worse:
        raise DataError(
            "E-COMPARE-WORSE",
            f"mean {metric} is worse than that of {baseline.name}, or cases are missing: {', '.join(worse)}",
        )
    return result


def comparison_table(result: Mapping[str, Any]) -> Table:
    """What `compare` found, for people."""
    metric = result["metric"]
    table = Table(
        Column("run", overflow="fold"),
        "organ",
        title=f"{metric}, compared with {result['baseline']}",
        title_justify="left",
    )
    for heading in ("cases", "before", "now", "difference", "better / equal / worse"):
        table.add_column(heading, justify="right")
    for comparison in result["comparisons"]:
        for organ, found in comparison["organs"].items():
            table.add_row(
                comparison["run"], organ, str(found["n"]), f"{found['baseline']:.3f}", f"{found['run']:.3f}",
                f"{found['difference']:+.3f}", f"{found['wins']} / {found['ties']} / {found['losses']}",
            )  # fmt: skip
        table.add_section()
        table.add_row(comparison["run"], "mean", "", "", "", f"{comparison['mean_difference']:+.3f}", "")
        table.add_section()
    unpaired = sorted({case for c in result["comparisons"] for cases in c["unpaired"].values() for case in cases})
    lost = [f"{organ} of {case}" for c in result["comparisons"] for case, organ in c["lost"]]
    captions = [f"not in a later run, though the case is: {_named(lost)}"] if lost else []
    if unpaired:
        captions.append(f"left out, as only one of two runs has them: {_named(unpaired)}")
    table.caption = "\n".join(captions) or None
    return table


def _table(run: str, metric: str, tracking_uri: str | None) -> RunTable:
    path = Path(run)
    if path.is_dir():
        path = path / PER_CASE
        if not path.exists():
            message = f"holds no {PER_CASE}; finish its training, or run medseg evaluate, and name that folder"
            raise DataError("E-COMPARE-TABLE", message, where=run)
    if path.exists():
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    else:
        rows = per_case_table(run, tracking_uri)
    columns = set(rows[0]) if rows else set()
    if not {"case", "organ"} <= columns:
        raise DataError("E-COMPARE-TABLE", "needs rows with the columns case, organ and a metric", where=run)
    if metric not in columns:
        hint = did_you_mean(metric, columns.difference(NOT_METRICS))
        raise DataError("E-COMPARE-METRIC", f"has no column {metric!r}{hint}", where=run)
    values: dict[Key, float] = {}
    for number, row in enumerate(rows, start=2):  # as an editor counts, the header being line 1
        key = (row["case"], row["organ"])
        if key in values:
            raise DataError("E-COMPARE-TABLE", f"case {key[0]}, organ {key[1]} is there twice", where=f"{run}:{number}")
        try:
            values[key] = float(row[metric] or math.nan)
        except ValueError:
            message = f"{metric} is {row[metric]!r}; it must be a number, or empty where it is not defined"
            raise DataError("E-COMPARE-TABLE", message, where=f"{run}:{number}") from None
    return RunTable(run, values)


def _comparison(baseline: RunTable, other: RunTable, sign: int) -> Result:
    """One run against the baseline; `sign` is 1 where more is better, else -1."""
    keys = [key for key in baseline.values if key in other.values]
    if not keys:
        raise DataError(
            "E-COMPARE-CASES",
            f"no case and organ is in both {baseline.name} (cases {_named(sorted(baseline.cases))}) and {other.name} "
            f"(cases {_named(sorted(other.cases))}); compare runs of the same fold and data",
        )
    organs = {}
    for organ in dict.fromkeys(organ for _, organ in keys):
        pairs = np.array([(baseline.values[key], other.values[key]) for key in keys if key[1] == organ])
        organs[organ] = _organ(pairs, sign)
    lost = sorted(key for key in baseline.values if key not in other.values and key[0] in other.cases)
    differences = [found["difference"] for found in organs.values() if found["n"]]
    mean = float(np.mean(differences)) if differences else math.nan
    return {
        "run": other.name,
        "organs": organs,
        "mean_difference": mean,
        "worse": bool(lost) or math.isnan(mean) or sign * mean < -TIE,
        "lost": [list(key) for key in lost],
        "unpaired": {
            "baseline": sorted(baseline.cases - other.cases),
            "run": sorted(other.cases - baseline.cases),
        },
    }


def _organ(pairs: np.ndarray, sign: int) -> Result:
    """Counts and means of one organ's (n, 2) values."""
    known = ~np.isnan(pairs)
    scored = pairs[known.all(axis=1)]
    gains = sign * (scored[:, 1] - scored[:, 0])
    means = scored.mean(axis=0) if len(scored) else np.full(2, np.nan)
    return {
        "n": len(scored),
        "baseline": float(means[0]),
        "run": float(means[1]),
        "difference": float(means[1] - means[0]),
        "wins": int((gains > TIE).sum()),
        "ties": int((np.abs(gains) <= TIE).sum()),
        "losses": int((gains < -TIE).sum()),
        "n_unscored": int((known.sum(axis=1) == 1).sum()),
    }


def _summary_rows(result: Result) -> Iterable[Mapping[str, Any]]:
    for comparison in result["comparisons"]:
        for organ, found in comparison["organs"].items():
            yield {"baseline_run": result["baseline"], "compared_run": comparison["run"], "organ": organ, **found}


def _pair_rows(tables: Sequence[RunTable]) -> Iterable[Mapping[str, Any]]:
    for case, organ in dict.fromkeys(key for table in tables for key in table.values):
        values = {table.name: table.values.get((case, organ), math.nan) for table in tables}
        yield {"case": case, "organ": organ, **{name: "" if math.isnan(v) else v for name, v in values.items()}}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _named(cases: Sequence[str]) -> str:
    more = f" and {len(cases) - MAX_NAMED} more" if len(cases) > MAX_NAMED else ""
    return ", ".join(cases[:MAX_NAMED]) + more
