"""A scan with the contours of its reference and prediction, as one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medseg.labels import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

# Okabe and Ito's colors, which color-blind people tell apart too.
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
BACKGROUND, TEXT = "#101010", "#EDEDED"
PREDICTION_WIDTH, REFERENCE_WIDTH = 2.4, 0.9

MAX_WIDTH, MAX_HEIGHT = 1200, 460
"""Room for the panels together, in pixels."""

GAP, TITLE_HEIGHT, LEGEND_HEIGHT = 8, 30, 26
DPI = 100
MAX_LEGEND = 10
WINDOW_PERCENTILES = (0.5, 99.5)
WINDOW_VOXELS = 100_000


@dataclass(frozen=True)
class Plane:
    """A way to cut a RAS volume, and which axes run where in the picture.

    Args:
        axis: Normal to the slices.
        across: Axis along the picture's rows, reversed: the patient's right, or front, is at the left.
        up: Axis that runs upwards.
        marks: What is at the left and at the right edge.
    """

    axis: int
    across: int
    up: int
    marks: tuple[str, str]


# Axial, coronal, sagittal as radiologists look: from the feet, from the front, and at the patient's left side.
PLANES = (Plane(2, 0, 1, ("R", "L")), Plane(1, 0, 2, ("R", "L")), Plane(0, 1, 2, ("A", "P")))


@dataclass(frozen=True)
class Panel:
    """A slice, the first row on top.

    Args:
        image: Gray values.
        masks: For each label map the slice of it, or None.
        size_mm: Width and height.
        marks: What is at the left and at the right edge.
    """

    image: Array
    masks: tuple[Array | None, ...]
    size_mm: tuple[float, float]
    marks: tuple[str, str]


def contour_picture(
    image: Array,
    reference: Array | None,
    prediction: Array | None,
    *,
    labels: Labels,
    spacing_mm: Sequence[float],
    title: str = "",
    window: tuple[float, float] | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw a scan in three planes with contours: the prediction's broad and colored, the reference's thin and white.

    The planes go through the slices that show most of every organ. All panels have one scale.

    Args:
        image: (I, J, K) in RAS; or of a picture (I, J), drawn as one panel with J downwards.
        reference: Label map of the same shape; None: there is none.
        prediction: Label map of the same shape; None: there is none.
        labels: What the values mean. An organ keeps its color from picture to picture.
        spacing_mm: Voxel size along each axis; the picture has the true proportions.
        title: E.g. the case and its Dice.
        window: Values shown black and white; None: between the 0.5th and 99.5th percentile.

    Returns:
        RGB, (H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = (prediction, reference)
    assert all(m is None or m.shape == image.shape for m in maps), "label maps must be on the image's grid"
    panels = _panels(image, maps, labels, spacing_mm)
    figure = Figure(dpi=DPI, facecolor=BACKGROUND)
    window = window or _window(image)
    for panel, axes in zip(panels, _arrange(figure, [panel.size_mm for panel in panels]), strict=True):
        _draw(axes, panel, labels, window)
    shown = {int(value) for panel in panels for m in panel.masks if m is not None for value in np.unique(m)}
    present = [n for n, values in enumerate(labels.organ_values.values()) if shown.intersection(values)]
    _write(figure, title, labels, present, has_reference=reference is not None)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def informative_slices(maps: Sequence[Array], labels: Labels) -> tuple[int, ...] | None:
    """Along each axis the slice that shows most of every organ, a small organ counting as much as a large one.

    Args:
        maps: Label maps (I, J, K).
        labels: What their values mean.

    Returns:
        An index for each axis; None if there is no organ.
    """
    shares = [np.zeros(n) for n in maps[0].shape] if maps else []
    for label_map in maps:
        where = np.nonzero(label_map)  # once: few voxels are organ
        found = label_map[where]
        for values in labels.organ_values.values():
            chosen = np.isin(found, values)
            for share, index in zip(shares, where, strict=True):
                area = np.bincount(index[chosen], minlength=len(share))
                share += area / max(area.max(), 1)
    return tuple(int(share.argmax()) for share in shares) if shares and shares[0].any() else None


def _panels(image: Array, maps: Sequence[Array | None], labels: Labels, spacing_mm: Sequence[float]) -> list[Panel]:
    if image.ndim == 2:
        size = (image.shape[0] * spacing_mm[0], image.shape[1] * spacing_mm[1])
        return [Panel(image.T, tuple(None if m is None else m.T for m in maps), size, ("", ""))]
    indices = informative_slices([m for m in maps if m is not None], labels) or tuple(n // 2 for n in image.shape)
    panels = []
    for plane in PLANES:
        masks = tuple(None if m is None else _cut(m, plane, indices) for m in maps)
        size = (image.shape[plane.across] * spacing_mm[plane.across], image.shape[plane.up] * spacing_mm[plane.up])
        panels.append(Panel(_cut(image, plane, indices), masks, size, plane.marks))
    return panels


def _cut(array: Array, plane: Plane, indices: Sequence[int]) -> Array:
    return np.moveaxis(array, plane.axis, 0)[indices[plane.axis]].T[::-1, ::-1]  # (across, up) → rows from the top


def _arrange(figure: Figure, sizes_mm: Sequence[tuple[float, float]]) -> Iterator[Axes]:
    """Axes side by side at one scale, centered between title and legend; sets the figure's size."""
    room = MAX_WIDTH - GAP * (len(sizes_mm) + 1)
    scale = min(room / sum(width for width, _ in sizes_mm), MAX_HEIGHT / max(height for _, height in sizes_mm))
    pixels = [(width * scale, height * scale) for width, height in sizes_mm]
    tallest = max(height for _, height in pixels)
    total = max(sum(width + GAP for width, _ in pixels) + GAP, MAX_WIDTH / 2)  # room for title and legend
    full = tallest + TITLE_HEIGHT + LEGEND_HEIGHT
    figure.set_size_inches(round(total) / DPI, round(full) / DPI)
    x = (total - sum(width + GAP for width, _ in pixels) + GAP) / 2
    for width, height in pixels:
        y = LEGEND_HEIGHT + (tallest - height) / 2
        axes = figure.add_axes((x / total, y / full, width / total, height / full))
        axes.set_axis_off()
        yield axes
        x += width + GAP


def _draw(axes: Axes, panel: Panel, labels: Labels, window: tuple[float, float]) -> None:
    axes.imshow(
        panel.image, cmap="gray", vmin=window[0], vmax=window[1], aspect="auto", interpolation="bilinear", resample=True
    )
    prediction, reference = panel.masks
    for n, values in enumerate(labels.organ_values.values()):
        if prediction is not None:
            _outline(axes, np.isin(prediction, values), COLORS[n % len(COLORS)], PREDICTION_WIDTH)
    for values in labels.organ_values.values():  # above every prediction
        if reference is not None:
            _outline(axes, np.isin(reference, values), "white", REFERENCE_WIDTH)
    for mark, x, side in zip(panel.marks, (0.01, 0.99), ("left", "right"), strict=True):
        box = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.6, "pad": 1.5}
        axes.text(x, 0.5, mark, transform=axes.transAxes, color=TEXT, fontsize=9, ha=side, va="center", bbox=box)


def _outline(axes: Axes, mask: Array, color: str, width: float) -> None:
    if not mask.any():
        return
    rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
    closed = np.pad(mask, 1).astype(np.uint8)  # so that what touches the border is outlined there
    axes.contour(columns, rows, closed, levels=[0.5], colors=[color], linewidths=[width])
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _write(figure: Figure, title: str, labels: Labels, present: Sequence[int], *, has_reference: bool) -> None:
    from matplotlib.lines import Line2D

    height = figure.get_figheight() * DPI
    figure.text(
        0.5, 1 - TITLE_HEIGHT / 2 / height, title,
        color=TEXT, fontsize=11, ha="center", va="center", parse_math=False,
    )  # fmt: skip
    names = list(labels.organ_values)
    entries = [(COLORS[n % len(COLORS)], PREDICTION_WIDTH, names[n]) for n in present[:MAX_LEGEND]]
    if has_reference:
        entries.append(("white", REFERENCE_WIDTH, "reference"))
    handles = [Line2D([], [], color=color, linewidth=width, label=name) for color, width, name in entries]
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles) or 1, frameon=False, fontsize=9, labelcolor=TEXT,
        borderpad=0.2, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip


def _window(image: Array) -> tuple[float, float]:
    values = np.asarray(image).ravel()
    low, high = np.nanpercentile(values[:: max(1, values.size // WINDOW_VOXELS)], WINDOW_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))
