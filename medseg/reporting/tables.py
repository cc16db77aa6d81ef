"""The table of cases, worst first, and what ranks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from medseg.metrics import METRICS
from medseg.metrics.paired import is_distance, sign_of
from medseg.metrics.statistics import mean_of_known
from medseg.metrics.table import Score
from medseg.reporting.words import digits_for, short_name

MAX_ORGAN_COLUMNS = 12
MIN_FILTERED = 20
"""A table of so many rows can be filtered."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: Plain text.
        cells: A number or a text for each row; NaN is shown as a dash.
        digits: Behind the point.
        hint: What the heading means.
    """

    heading: str
    cells: Sequence[float | str]
    digits: int = 3
    hint: str = ""


@dataclass(frozen=True)
class Row:
    """A case.

    Args:
        case: Its id.
        anchor: Its row's id in the page.
        organs: By organ the scores of it.
        rank: Mean over the organs of the metric that ranks, see `rank_cases`; NaN: none has a value.
    """

    case: str
    anchor: str
    organs: Mapping[str, Score]
    rank: float

    def mean(self, metric: str) -> float:
        """Over the organs that have a value."""
        return float(mean_of_known([score.values.get(metric, math.nan) for score in self.organs.values()]))

    @property
    def notes(self) -> str:
        return "; ".join(f"{organ}: {score.note}" for organ, score in self.organs.items() if score.note)


def rank_cases(scores: Sequence[Score], metric: str) -> list[Row]:
    """The cases, worst first; those without a value come last.

    A missed organ's distance ranks as the scan's diagonal, as does an invented one's; if that is not known, and with any
    other metric that a miss leaves without a value, a case with a miss is worse than all without.

    Args:
        scores: Of any number of cases.
        metric: What ranks them.
    """
    by_case: dict[str, dict[str, Score]] = {}
    for score in scores:
        by_case.setdefault(score.case, {})[score.organ] = score
    rows = [
        Row(case, f"case-{n}", organs, float(mean_of_known([_ranks_as(score, metric) for score in organs.values()])))
        for n, (case, organs) in enumerate(by_case.items())
    ]
    sign = sign_of(metric)
    return sorted(rows, key=lambda row: (math.isnan(row.rank), 0 if math.isnan(row.rank) else sign * row.rank))


def _ranks_as(score: Score, metric: str) -> float:
    value = score.values.get(metric, math.nan)
    is_failure = score.is_missed or (score.is_spurious and is_distance(metric))
    if metric not in score.values or not math.isnan(value) or not is_failure:
        return value
    is_known = is_distance(metric) and not math.isnan(score.diagonal_mm)
    return score.diagonal_mm if is_known else -sign_of(metric) * math.inf


def values_of(rows: Sequence[Row], organ: str, metric: str) -> list[float]:
    """Of each case; NaN where it has none."""
    return [row.organs[organ].values.get(metric, math.nan) if organ in row.organs else math.nan for row in rows]


def cases_table(rows: Sequence[Row], metrics: Sequence[str], pictured: Mapping[str, str]) -> str:
    """The table of cases.

    Args:
        rows: Worst first.
        metrics: The one that ranks first.
        pictured: Anchor of the picture of each case that has one, by case.
    """
    columns = [column for n, metric in enumerate(metrics) for column in _columns(rows, metric, is_main=n == 0)]
    if any(row.notes for row in rows):
        columns.append(Column("note", [row.notes for row in rows]))
    return sortable_table([(row.case, row.anchor) for row in rows], columns, pictured)


def _columns(rows: Sequence[Row], metric: str, *, is_main: bool) -> list[Column]:
    """The mean over the organs, and each of them where it is the metric that ranks, or has no mean worth telling."""
    name = short_name(metric)
    organs = list(dict.fromkeys(o for row in rows for o, score in row.organs.items() if metric in score.values))
    by_organ = {organ: values_of(rows, organ, metric) for organ in organs}
    digits = digits_for(metric, [value for values in by_organ.values() for value in values])
    if len(organs) == 1:
        return [Column(name, by_organ[organs[0]], digits)]
    has_mean = metric not in METRICS or METRICS[metric].is_ranked  # too much here and too little there make no zero
    columns = [Column(f"mean {name}", [row.mean(metric) for row in rows], digits)] if has_mean else []
    if (is_main or not has_mean) and len(organs) <= MAX_ORGAN_COLUMNS:
        heading = "{}" if has_mean else f"{{}}: {name}"
        columns += [Column(heading.format(o), by_organ[o], digits, hint=f"{name} of {o}") for o in organs]
    return columns


def sortable_table(
    rows: Sequence[tuple[str, str]], columns: Sequence[Column], pictured: Mapping[str, str], *, caption: str = "Cases"
) -> str:
    """A table whose headings sort it; a long one has a field above it that filters its rows.

    Args:
        rows: Case and anchor of each.
        columns: What is told of them.
        pictured: Anchor of the picture of each case that has one, by case.
        caption: Plain text, for those who hear the page.
    """
    headings = "".join(
        f'<th scope="col"{_kind(column)}><button type="button" title="{escape(column.hint)}">'
        f"{escape(column.heading)}</button></th>"
        for column in [Column("case", [""]), *columns]
    )
    body = []
    for n, (case, anchor) in enumerate(rows):
        name = escape(case)
        shown = f'<a href="#{pictured[case]}">{name}</a>' if case in pictured else name
        cells = "".join(_cell(column, column.cells[n]) for column in columns)
        body.append(f'<tr id="{anchor}"><th scope="row" data-value="{name}">{shown}</th>{cells}</tr>')
    filtered = (
        '<input type="search" class="filter" aria-label="Filter" placeholder="show only rows with …">'
        if len(rows) >= MIN_FILTERED
        else ""
    )
    return (
        f'{filtered}<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="sortable">'
        f"<thead><tr>{headings}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def number(value: float, digits: int = 3) -> str:
    """For people; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _kind(column: Column) -> str:
    return ' class="text"' if any(isinstance(cell, str) for cell in column.cells) else ""


def _cell(column: Column, value: float | str) -> str:
    if isinstance(value, str):
        return f'<td class="text">{escape(value)}</td>'
    sorted_by = f"{value:.6g}" if math.isfinite(value) else ""
    return f'<td data-value="{sorted_by}">{number(value, column.digits)}</td>'
