"""A comparison of runs as rows of text, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from medseg.metrics.statistics import MIN_PATIENTS
from medseg.wording import counted, listed

Result = Mapping[str, Any]
Row = tuple[str, ...]

SIGNIFICANT = 0.05

COMPARED = (
    "organ", "cases", "before", "now", "difference [95 % interval]", "p (Holm)", "effect", "better / equal / worse",
    "missed", "invented",
)  # fmt: skip
RANKED = ("", "run", "mean [95 % interval]", "difference to the best", "p (Holm)", "missed organs", "invented organs")

_COMPARED_NARROW = (
    "organ", "n", "before", "now", "difference [95 % interval]", "p (Holm)", "effect", "win/tie\n/loss", "missed",
    "invented",
)  # fmt: skip
_RANKED_NARROW = ("", "run", "mean [95 % interval]", "difference\nto the best", "p\n(Holm)", "missed", "invented")
_BELOW = ("now", "effect", "invented")
"""Headings that stand below the one before, so that names have room in a narrow terminal."""


def p_text(p: float) -> str:
    """A p value for people; NaN is one that too few patients allow no test for."""
    if math.isnan(p):
        return "too few"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def with_interval(value: float, ci95: tuple[float, float], *, signed: bool = False) -> str:
    """``+0.012 [0.004, 0.020]``."""
    told = _number(value, "+" if signed else "")
    if math.isnan(value) or math.isnan(ci95[0]):
        return told
    return f"{told} [{_number(ci95[0])}, {_number(ci95[1])}]"


def compared_rows(comparison: Result) -> list[Row]:
    """A row an organ, under `COMPARED`."""
    return [
        (
            organ,
            str(found["n"]),
            _number(found["baseline"]),
            _number(found["run"]),
            with_interval(found["difference"], found["ci95"], signed=True),
            p_text(found["p_holm"]),
            "–" if math.isnan(found["effect_size"]) else f"{found['effect_size']:+.2f}",
            f"{found['wins']}/{found['ties']}/{found['losses']}",
            f"{found['missed_baseline']}→{found['missed_run']}",
            f"{found['spurious_baseline']}→{found['spurious_run']}",
        )
        for organ, found in comparison["organs"].items()
    ]


def mean_row(comparison: Result) -> Row:
    """The organs' mean, under `COMPARED`."""
    mean = with_interval(comparison["mean_difference"], comparison["mean_ci95"], signed=True)
    return ("mean", "", "", "", mean, "", "", "", "", "")


def ranked_rows(result: Result) -> list[Row]:
    """A row a run, under `RANKED`."""
    return [
        (
            str(place),
            row["run"],
            with_interval(row["mean"], row["ci95"]),
            with_interval(row["difference"], row["difference_ci95"], signed=True) if place > 1 else "",
            p_text(row["p_holm"]) if place > 1 else "",
            str(row["missed"]),
            str(row["spurious"]),
        )
        for place, row in enumerate(result["ranking"], start=1)
    ]


def comparison_table(result: Result) -> RenderableType:
    """What `medseg.compare.compare` found, for a terminal of 80 columns."""
    shown: list[RenderableType] = []
    for comparison in result["comparisons"]:
        title = f"{result['metric']}: {comparison['label']} compared with {result['baseline_label']}"
        rows = compared_rows(comparison)
        shown.append(_table(title, _COMPARED_NARROW, rows, "0→0", left="organ", last=mean_row(comparison)))
    return Group(*shown, Text("\n".join([*result["warnings"], *_small_print(result), *_page(result)])))


def ranking_table(result: Result) -> RenderableType:
    """What `medseg.compare.rank_experiment` found, for a terminal of 80 columns."""
    runs, cases = counted(len(result["ranking"]), "run"), counted(result["n_cases"], "case")
    title = f"{result['metric']} of {result['experiment']}: {runs}, {cases}; {listed(result['organs'])}"
    table = _table(title, _RANKED_NARROW, ranked_rows(result), "0", left="run")
    return Group(table, Text("\n".join([*result["warnings"], *_counting(result), *_page(result)])))


def _table(title: str, headings: Row, rows: Sequence[Row], none: str, *, left: str, last: Row | None = None) -> Table:
    """Two lines a row; without the column of missed and invented organs if there are none."""
    columns = _stacked(headings, headings)
    columns = columns[: len(columns) - all({*row[-2:]} == {none} for row in rows)]
    table = Table(
        *(Column(h, overflow="fold") if h == left else Column(h, justify="right", no_wrap=True) for h in columns),
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for row in rows:
        table.add_row(*_stacked(row, headings)[: len(columns)])
    if last:
        table.add_section()
        table.add_row(*_stacked(last, headings)[: len(columns)])
    return table


def _stacked(row: Row, headings: Row) -> list[str]:
    """Intervals, and the cells `_BELOW` others, on a second line."""
    cells: list[str] = []
    for heading, cell in zip(headings, row, strict=True):
        if heading in _BELOW:
            cells[-1] = f"{cells[-1]}\n{cell}".rstrip()
        else:
            cells.append(cell.replace(" [", "\n["))
    return cells


def _number(value: float, sign: str = "") -> str:
    """Three digits or four, in few places."""
    return "–" if math.isnan(value) else f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def _small_print(result: Result) -> list[str]:
    """What the figures of the table are."""
    lines = [
        "effect: matched-pairs rank-biserial correlation, +1 where every case is better, −1 where every one is worse"
    ]
    tested = [found for comparison in result["comparisons"] for found in comparison["organs"].values()]
    if any(math.isnan(found["p"]) for found in tested):
        lines.append(f"too few: with fewer than {MIN_PATIENTS} patients no p can be below 0.05")
    return lines + _counting(result)


def _counting(result: Result) -> list[str]:
    """How organs that are not there were counted, and what was taken for a patient."""
    lines = []
    if result["n_as_diagonal"]:
        lines.append("missed and invented organs count as the diagonal of their scan")
    if not result["names_patients"]:
        lines.append("the tables name no patients: each case is taken for another one")
    return lines


def _page(result: Result) -> list[str]:
    return [f"page: {result['page']}"] if result["page"] else []
