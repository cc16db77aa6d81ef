"""Networks for people: a table of all, a page of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

Result = Mapping[str, Any]


def nets_table(result: Mapping[str, Result]) -> Table:
    """What `describe` says of several networks: a row each."""
    table = Table(
        Column("name", no_wrap=True, style="bold"),
        Column("network, paper", overflow="fold"),
        Column("parameters\n2D", justify="right", no_wrap=True),
        Column("\n3D", justify="right", no_wrap=True),
        Column("least input\n2D, 3D", no_wrap=True),
        Column("good for", overflow="fold"),
        box=None,
        pad_edge=False,
        caption="medseg nets NAME tells arguments and structure; parameters are those of the defaults",
        caption_justify="left",
    )
    for name, entry in result.items():
        parameters, least = entry["parameters"], entry["min_size"]
        table.add_row(
            name,
            f"{entry['title']}, {entry['paper'].split(',')[0]}",
            *(millions(parameters[key]) if key in parameters else "–" for key in ("2d", "3d")),
            "\n".join(_times(size) for size in least.values()),
            entry["good_for"],
        )
    return table


def net_page(result: Result) -> RenderableType:
    """What `explain` says of one network."""
    arguments = Table("argument", "default", Column("", overflow="fold"), box=None, pad_edge=False)
    for argument in result["arguments"]:
        arguments.add_row(argument["name"], _default(argument["default"]), argument["meaning"])
    parts = Table(
        "part", "kind", Column("parameters", justify="right"), Column("gives", no_wrap=True), box=None, pad_edge=False
    )
    for part in result["structure"]:
        parts.add_row(part["part"], part["kind"], f"{part['parameters']:,}", _times(part["shape"]))
    counted = ", ".join(f"{number:,} in {key.upper()}" for key, number in result["parameters"].items())
    least = ", ".join(f"{_times(size)} in {key.upper()}" for key, size in result["min_size"].items())
    return Group(
        Text(f"{result['title']}: {result['paper']}", style="bold"),
        Padding(result["about"], (1, 0)),
        f"parameters   {counted} (one channel in, two classes out)",
        f"least input  {least}",
        Padding(arguments, (1, 0)),
        parts,
    )


def millions(number: int) -> str:
    """``5.7 M``."""
    return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} G"


def _times(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _default(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
