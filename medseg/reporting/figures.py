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
    values: Mapping[str, Sequence[tuple[str, float]]], *, across: str, limits: tuple[float, float] | None
) -> Figure:
    """A box for each organ, and a dot for each case, which links to the case's row.

    Args:
        values: By organ (anchor of the case, value).
        across: What the values are called.
        limits: Of their axis; None: wherever they lie.
    """
    from matplotlib.figure import Figure

    organs = [organ for organ, found in values.items() if any(math.isfinite(value) for _, value in found)]
    figure = Figure(figsize=(1.5 * WIDTH, 0.9 + ROW_HEIGHT * max(1, len(organs))))
    axes = figure.add_subplot()
    scatter = np.random.default_rng(0)  # so that dots of equal value do not hide each other
    for row, organ in enumerate(organs):
        found = [(anchor, value) for anchor, value in values[organ] if math.isfinite(value)]
        numbers = [value for _, value in found]
        color = COLORS[list(values).index(organ) % len(COLORS)]
        axes.boxplot(
            numbers, positions=[row], orientation="horizontal", widths=0.55, showfliers=False, manage_ticks=False,
            medianprops={"color": "black", "linewidth": 1.8}, boxprops={"color": GRID}, whiskerprops={"color": GRID},
            capprops={"color": GRID},
        )  # fmt: skip
        heights = row + scatter.uniform(-0.2, 0.2, len(numbers))
        dots = axes.scatter(numbers, heights, s=22, color=color, alpha=0.85, linewidths=0, zorder=3)
        dots.set_urls([f"#{anchor}" for anchor, _ in found])
    axes.set_yticks(range(len(organs)), organs)
    axes.invert_yaxis()
    axes.set_xlabel(across)
    if limits:
        axes.set_xlim(*limits)
    _calm(axes, grid="x")
    return figure


def _calm(axes: Axes, *, grid: str) -> None:
    """Nothing but the data, thin lines behind it and its names."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.grid(axis="y" if grid == "y" else "x", color=GRID, alpha=0.3, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=LABEL_SIZE)
