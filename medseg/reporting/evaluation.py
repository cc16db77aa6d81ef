"""What `medseg evaluate` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from medseg.wording import counted, listed

Result = Mapping[str, Any]

SCORE = ("mean ± std", "95 % interval", "median", "n")


def evaluation_table(result: Result) -> RenderableType:
    """How well each organ was found by each metric, how well volumes agree, and what was not scored."""
    shown: list[RenderableType] = [Text(f"\n{_cases(result)}"), _Scores(result)]
    if result["volumes"]:
        shown.append(_volumes_table(result["volumes"]))
    files = [f"{result[key]}" for key in ("table", "evaluation", "lesion_table") if result.get(key)]
    shown.append(Text("\n".join(["", _small_print(result["patients"]), *files]), overflow="ignore", no_wrap=True))
    return Group(*shown)


def _cases(result: Result) -> str:
    """How many cases the numbers are of, and which they are not of."""
    failed, absent = [entry["case"] for entry in result["failed"]], result["unmatched"]["references"]
    total = result["cases"] + len(failed) + len(absent)
    told = [f"{result['cases']} of {counted(total, 'case')}" if failed or absent else counted(total, "case")]
    told += [f"failed: {listed(failed)}"] if failed else []
    told += [f"without prediction: {listed(absent)}"] if absent else []
    return ", ".join(told)


@dataclass(frozen=True)
class _Scores:
    """One table if the console is wide enough for it, else a block per organ."""

    result: Result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        flat = _flat(self.result)
        needed = Measurement.get(console, options.update(width=1000), flat).maximum
        if needed <= options.max_width or len(self.result["mean"]) == 1:
            yield flat
        else:
            yield from _blocks(self.result)


def _flat(result: Result) -> Table:
    """A row per organ and metric."""
    table = _table(["organ", "metric"], [*SCORE, "missed", "spurious"])
    for organ, scores in result["per_organ"].items():
        for metric, score in scores.items():
            table.add_row(organ, metric, *_cells(score), str(score["n_missed"]), str(score["n_spurious"]))
    for metric, mean in result["mean"].items():
        table.add_row("mean", metric, _number(mean))
    return table


def _blocks(result: Result) -> Iterator[Table]:
    """A table per organ, with a row per metric."""
    for organ, scores in result["per_organ"].items():
        table = _table(["metric"], SCORE, title=_found(organ, next(iter(scores.values()))))
        for metric, score in scores.items():
            table.add_row(metric, *_cells(score))
        yield table
    table = _table(["metric"], ["mean"], title="mean of the organs")
    for metric, mean in result["mean"].items():
        table.add_row(metric, _number(mean))
    yield table


def _found(organ: str, score: Result) -> str:
    """It is missed or not, whatever the metric."""
    numbers = {"missed": score["n_missed"], "spurious": score["n_spurious"]}
    return ", ".join([organ, *(f"{kind} in {counted(n, 'case')}" for kind, n in numbers.items() if n)])


def _volumes_table(volumes: Mapping[str, Result]) -> Table:
    title = "volumes in ml: prediction against reference (Bland and Altman)"
    table = _table(["organ"], ["reference", "prediction", "bias", "limits of agreement", "n"], title=title)
    for organ, found in volumes.items():
        means = (_number(found[key]) for key in ("mean_reference_ml", "mean_prediction_ml", "bias_ml"))
        table.add_row(organ, *means, _range(found["limits_ml"]), str(found["n"]))
    return table


def _table(names: Sequence[str], numbers: Sequence[str], title: str = "") -> Table:
    """Without lines, so that eight columns fit into 80 characters."""
    return Table(
        *(Column(name, overflow="fold") for name in names),
        *(Column(heading, justify="right", no_wrap=True) for heading in numbers),
        title=f"\n{title}" if title else None,
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )


def _cells(score: Result) -> tuple[str, ...]:
    """Of the columns `SCORE`."""
    spread = f"{_number(score['mean'])} ± {_number(score['std'])}"
    return spread, _range(score["ci95"]), _number(score["median"]), str(score["n"])


def _small_print(patients: int | None) -> str:
    if patients is None:
        return "intervals: bootstrap over cases, each taken for a patient of its own, for none is named"
    return f"intervals: bootstrap over {counted(patients, 'patient')}"


def _range(bounds: Sequence[float]) -> str:
    if not all(map(math.isfinite, bounds)):
        return "–"
    low, high = map(_number, bounds)
    return f"{low} to {high}" if "-" in low + high else f"{low}–{high}"


def _number(value: float) -> str:
    """Three or four digits."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"
