"""A comparison of runs as a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.reporting.comparison_table import SIGNIFICANT, p_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
Differences = Sequence[Mapping[str, Mapping[str, float]]]
"""Of each comparison, by organ and case."""

# Okabe and Ito's blue and vermilion, which color-blind people tell apart too.
BETTER, WORSE, INK, QUIET = "#0072B2", "#D55E00", "#1d1d1f", "#6e6e73"
WIDTH, ROW, HEAD = 8.4, 0.52, 1.15  # inches
JITTER = 0.2
DPI = 160
BEYOND = 3.0
"""Dots farther out than this many times the 90th percentile, misses of 300 mm among errors of 3, go to the edge."""


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def comparison_figure(result: Result, differences: Differences) -> Figure:
    """The differences of every case, with each organ's mean and interval.

    Args:
        result: What `medseg.compare.compare` returns.
        differences: Of each of its comparisons, by organ and case.
    """
    from matplotlib.figure import Figure

    comparisons = result["comparisons"]
    heights = [HEAD + ROW * len(comparison["organs"]) for comparison in comparisons]
    figure = Figure(figsize=(WIDTH, sum(heights)), facecolor="white", layout="constrained")
    panels = figure.subplots(len(comparisons), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, comparison, found in zip(panels, comparisons, differences, strict=True):
        _draw_differences(axes, comparison, found, sign=-1 if result["lower_is_better"] else 1)
        title = f"{comparison['label']} compared with {result['baseline_label']}"
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=20, parse_math=False)
    panels[-1].set_xlabel(f"difference in {result['metric']}", color=QUIET, parse_math=False)
    return figure


def ranking_figure(result: Result) -> Figure:
    """The mean of every run with its interval, the best on top.

    Args:
        result: What `medseg.compare.rank_experiment` returns.
    """
    from matplotlib.figure import Figure

    rows = result["ranking"]
    figure = Figure(figsize=(WIDTH, HEAD + 0.28 * len(rows)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        color = BETTER if y == 0 else INK
        axes.plot(row["ci95"], (y, y), color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(row["mean"], y, "o", color=color, markersize=5)
    _tidy(axes, [row["run"] for row in rows])
    axes.set_title(result["experiment"], loc="left", fontsize=11, color=INK, parse_math=False)
    axes.set_xlabel(f"mean {result['metric']}, with its 95 % interval", color=QUIET, parse_math=False)
    return figure


def _draw_differences(
    axes: Axes, comparison: Result, differences: Mapping[str, Mapping[str, float]], *, sign: int
) -> None:
    organs = comparison["organs"]
    limit, clipped = _reach(organs, differences)
    random = np.random.default_rng(0)
    for y, (organ, found) in enumerate(organs.items()):
        values = np.array(list(differences[organ].values()))
        heights = y + random.uniform(-JITTER, JITTER, len(values))
        colors = np.where(values == 0, QUIET, np.where(sign * values > 0, BETTER, WORSE))
        inside = np.abs(values) <= limit
        axes.scatter(values[inside], heights[inside], c=colors[inside], s=14, alpha=0.45, linewidths=0)
        for marker, outside in ((">", values > limit), ("<", values < -limit)):
            edge = np.full(outside.sum(), math.copysign(limit, 1 if marker == ">" else -1))
            axes.scatter(edge, heights[outside], c=colors[outside], s=26, marker=marker, linewidths=0, clip_on=False)
        if not math.isnan(found["difference"]):
            fill = INK if found["p_holm"] < SIGNIFICANT else "white"
            axes.plot(found["ci95"], (y, y), color=INK, linewidth=2.2, solid_capstyle="butt", zorder=3)
            axes.plot(found["difference"], y, "D", color=INK, markerfacecolor=fill, markersize=6.5, zorder=4)
        if found["n"]:
            note = ("" if math.isnan(found["p"]) else "p ") + p_text(found["p_holm"])
            axes.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=QUIET)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    axes.set_xlim(-limit * 1.04, limit * 1.04)
    _tidy(axes, list(organs))
    sides = ("better", "worse") if sign < 0 else ("worse", "better")
    for x, text, color in ((0, f"← {sides[0]}", 0), (1, f"{sides[1]} →", 1)):
        shade = BETTER if sides[color] == "better" else WORSE
        axes.text(
            x, 1.01, text, transform=axes.transAxes, color=shade, ha=("left", "right")[x], va="bottom", fontsize=9
        )
    if clipped:
        axes.text(
            0.5,
            1.01,
            f"{clipped} farther out",
            transform=axes.transAxes,
            color=QUIET,
            ha="center",
            va="bottom",
            fontsize=9,
        )


def _reach(organs: Result, differences: Mapping[str, Mapping[str, float]]) -> tuple[float, int]:
    """How far the axis goes to either side, and how many dots lie beyond."""
    sizes = np.abs([value for found in differences.values() for value in found.values()])
    if not len(sizes) or not sizes.max() > 0:
        return 1.0, 0
    bounds = [abs(b) for found in organs.values() for b in (*found["ci95"], found["difference"]) if not math.isnan(b)]
    usual = max(BEYOND * float(np.percentile(sizes, 90)), *bounds) * 1.05
    limit = min(usual, float(sizes.max())) if usual > 0 else float(sizes.max())
    return limit, int((sizes > limit).sum())


def _tidy(axes: Axes, names: Sequence[str]) -> None:
    """Names down the side, the first on top, and no more lines than needed."""
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(names, color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0, colors=QUIET)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color="#e5e5ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
