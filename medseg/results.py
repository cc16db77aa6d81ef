"""A verb's result on stdout: one JSON object for programs, or what people like to read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

Result = Mapping[str, Any]


def print_result(result: Result, as_json: bool, table: Callable[[Result], RenderableType] | None = None) -> None:
    """Print a result on stdout: one JSON object, or what people like to read."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(result), allow_nan=False) + "\n")
    else:
        Console(highlight=False).print((table or _listing)(result), markup=False, soft_wrap=table is None)


def _plain(value: Any) -> Any:
    """The same in JSON's types; numbers that JSON does not know become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): NumPy's float64 is one too
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _listing(result: Result, indent: str = "") -> str:
    """A line each, nested things indented."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", _listing(value, indent + "  ")]
        elif isinstance(value, list | tuple):
            lines += [f"{indent}{key} ({len(value)})", *(f"{indent}  {_one_line(item)}" for item in value)]
        else:
            lines.append(f"{indent}{key}  {_one_line(value)}")
    return "\n".join(line for line in lines if line.strip())


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(_one_line(inner) for inner in value.values())
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def evaluation_table(result: Result) -> Table:
    """Organs down, metrics across."""
    table = Table(title=f"{result['cases']} cases", caption=str(result.get("table") or ""))
    names = list(result["mean"])
    table.add_column("organ")
    for name in names:
        table.add_column(f"{name}: mean ± std [95 % interval]", justify="right")
    for organ, scores in result["per_organ"].items():
        table.add_row(organ, *(_score(scores[name]) for name in names))
    table.add_section()
    table.add_row("mean", *(_one_line(result["mean"][name]) for name in names))
    return table


def _score(score: Result) -> str:
    low, high = (_one_line(bound) for bound in score["ci95"])
    missing = f", {score['n_missing']} missing" if score["n_missing"] else ""
    return f"{_one_line(score['mean'])} ± {_one_line(score['std'])} [{low}, {high}]{missing}"


def described(entries: Mapping[str, Any]) -> Result:
    """What people and programs learn of the entries of a registry."""
    return {
        name: {"title": entry.title, "paper": entry.paper, "good_for": entry.good_for}
        for name, entry in entries.items()
    }


def parts_table(result: Result) -> Table:
    """What a registry holds: a row an entry."""
    table = Table("name", "title", "paper", "good for")
    for name, entry in result.items():
        table.add_row(name, *entry.values())
    return table
