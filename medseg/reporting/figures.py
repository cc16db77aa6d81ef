"""The figures of a report: how training went, and how well each organ was found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medseg.reporting.overlay import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 6.0, 3.4
"""Inches."""

ROW_HEIGHT = 0.46
GRID = "#8a939a"
MAX_LEGEND = 12
MAX_DOTS = 3000
"""In one figure: a browser draws them at once, and they take half a megabyte."""

LOG_FROM = 20.0
"""Organs whose medians differ by this factor stand on a logarithmic axis: on another, the boxes of the small are lines."""

LABEL_SIZE = 10


def curves_figure(
    lines: Mapping[str, Sequence[Points]], *, across: str, up: str, limits: tuple[float, float] | None
) -> Figure:
    """Values over iterations.

    Args:
        lines: By name, such as an organ's, one line or several (one a fold) of (iteration, value).
        across: What the horizontal axis is called.
        up: What the vertical axis is called.
        limits: Of the vertical axis; None: wherever the values lie.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_subplot()
    for n, (name, parts) in enumerate(lines.items()):
        color = COLORS[n % len(COLORS)] if len(lines) > 1 else "#2b8cbe"
        for part, points in enumerate(parts):
            x, y = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) < 25 else ""
            label = name if part == 0 and len(lines) > 1 else None
            axes.plot(
                x, y, color=color, linewidth=1.6, alpha=1 if len(parts) == 1 else 0.6, marker=marker, markersize=3.5, label=label
            )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if limits:
        axes.set_ylim(*limits)
    if len(lines) > 1:
        axes.legend(frameon=False, loc="best", fontsize=LABEL_SIZE - 1, ncols=1 + (min(len(lines), MAX_LEGEND) > 5))
    _calm(axes, grid="y")
    return figure


def organs_figure(
    values: Mapping[str, Sequence[tuple[str, float]]],
    *,
    across: str,
    limits: tuple[float, float] | None,
    is_log: bool = False,
) -> Figure:
    """A box for each organ, and a dot for each case, which links to the case's row.

    Args:
        values: By organ (anchor of the case, value). Where they are too many, the lowest and the highest are dots, see
            `num_dots`.
        across: What the values are called.
        limits: Of their axis; None: wherever they lie.
        is_log: Whether the axis is logarithmic, with a place for 0; the values must be 0 or more.
    """
    from matplotlib.figure import Figure

    organs = [organ for organ, found in values.items() if any(math.isfinite(value) for _, value in found)]
    figure = Figure(figsize=(1.5 * WIDTH, 0.9 + ROW_HEIGHT * max(1, len(organs))))
    axes = figure.add_subplot()
    if is_log:
        _log_axis(axes, [value for found in values.values() for _, value in found if math.isfinite(value)])
    scatter = np.random.default_rng(0)  # so that dots of equal value do not hide each other
    for row, organ in enumerate(organs):
        found = [(anchor, value) for anchor, value in values[organ] if math.isfinite(value)]
        numbers = [value for _, value in found]
        color = COLORS[list(values).index(organ) % len(COLORS)]
        axes.boxplot(
            numbers, positions=[row], orientation="horizontal", widths=0.55, showfliers=False, manage_ticks=False,
            medianprops={"color": "black", "linewidth": 1.8}, boxprops={"color": GRID}, whiskerprops={"color": GRID},
            capprops={"color": GRID}, zorder=4,
        )  # fmt: skip
        if len(found) > (most := num_dots(len(organs))):
            found.sort(key=lambda entry: entry[1])
            found = found[: most // 2] + found[-(most // 2) :]
        heights = row + scatter.uniform(-0.2, 0.2, len(found))
        dots = axes.scatter([v for _, v in found], heights, s=22, color=color, alpha=0.85, linewidths=0, zorder=3)
        dots.set_urls([f"#{anchor}" for anchor, _ in found])
    axes.set_yticks(range(len(organs)), organs)
    axes.invert_yaxis()
    axes.set_xlabel(across)
    if limits:
        axes.set_xlim(*limits)
    _calm(axes, grid="x")
    return figure


def num_dots(num_organs: int) -> int:
    """How many cases of an organ are dots at most."""
    return max(2, MAX_DOTS // max(1, num_organs))


def wants_log(values: Mapping[str, Sequence[float]]) -> bool:
    """Whether the organs' values differ so much that only a logarithmic axis shows them all.

    Args:
        values: By organ, 0 or more.
    """
    found = [[value for value in numbers if value > 0] for numbers in values.values()]
    medians = [float(np.median(numbers)) for numbers in found if numbers]
    return bool(medians) and max(medians) >= LOG_FROM * min(medians)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Powers of ten as far as there are values, and 0 at a decade's distance from the smallest."""
    known = [value for value in values if value > 0]
    low, high = (math.floor(math.log10(of(known))) for of in (min, max))
    axes.set_xscale("symlog", linthresh=10.0**low, linscale=1)
    ticks = [10.0**n for n in range(low, high + 1)]
    axes.set_xticks([0.0, *ticks], ["0", *(f"{tick:,.10g}" for tick in ticks)])
    axes.minorticks_off()


def _calm(axes: Axes, *, grid: str) -> None:
    """Nothing but the data, thin lines behind it and its names."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.grid(axis="y" if grid == "y" else "x", color=GRID, alpha=0.3, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=LABEL_SIZE)
