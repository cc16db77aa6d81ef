"""Networks for people: a table of all, a page of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table

from medseg.parts import arguments_table, page_head

Result = Mapping[str, Any]


def nets_table(result: Mapping[str, Result]) -> Table:
    """What `describe` says of several networks: a row each."""
    dims = list(dict.fromkeys(key for entry in result.values() for key in entry["parameters"]))
    table = Table(
        Column("name", no_wrap=True, style="bold"),
        "network",
        Column(f"parameters\n{', '.join(dims).upper()}", justify="right"),
        Column("least\ninput"),
        "good for",
        box=None,
        pad_edge=False,
        caption="medseg nets NAME tells paper, arguments and structure; parameters are those of the defaults",
        caption_justify="left",
    )
    for name, entry in result.items():
        authors, year = entry["paper"].split(",")[0].rsplit(" ", 1)
        parameters, least = entry["parameters"], {max(size) for size in entry["min_size"].values()}
        table.add_row(
            name,
            f"{entry['title']}, {authors.split()[0]} {year}",
            "\n".join(millions(parameters[key]) if key in parameters else "–" for key in dims),
            ", ".join(map(str, sorted(least))),
            entry["good_for"],
        )
    return table


def net_page(result: Result) -> RenderableType:
    """What `explain` says of one network."""
    parts = Table(
        "part", "kind", Column("parameters", justify="right"), Column("gives", no_wrap=True), box=None, pad_edge=False
    )
    for part in result["structure"]:
        parts.add_row(part["part"], part["kind"], f"{part['parameters']:,}", _times(part["shape"]))
    counted = ", ".join(f"{number:,} in {key.upper()}" for key, number in result["parameters"].items())
    least = ", ".join(f"{_times(size)} in {key.upper()}" for key, size in result["min_size"].items())
    return Group(
        *page_head(result),
        f"parameters   {counted} (one channel in, two classes out)",
        f"least input  {least}",
        *arguments_table(result),
        parts,
        *([f"drawn: {result['picture']}"] if "picture" in result else []),
    )


def millions(number: int) -> str:
    """``5.7 M``."""
    return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} G"


def _times(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))
