from __future__ import annotations

import time
from pathlib import Path

import matplotlib.colors
import numpy as np
import numpy.typing as npt
import pytest

from medseg.labels import Labels
from medseg.reporting.overlay import COLORS, GAP, LEGEND_HEIGHT, TITLE_HEIGHT, contour_picture, informative_slices

LABELS = Labels(names={0: "background", 1: "liver", 2: "spleen"})
SHAPE = (40, 50, 20)
SPACING_MM = (1.0, 1.0, 3.0)
Picture = npt.NDArray[np.uint8]


def box(value: int, *ranges: tuple[int, int]) -> npt.NDArray[np.uint8]:
    label = np.zeros(SHAPE[: len(ranges)], np.uint8)
    label[tuple(slice(*r) for r in ranges)] = value
    return label


def center_of(picture: Picture, color: str, *, columns: slice = slice(None)) -> npt.NDArray[np.float64]:
    """Mean row and column of the pixels of a color, within some columns, legend left out."""
    wanted = np.array(matplotlib.colors.to_rgb(color)) * 255
    near = np.abs(picture[:-LEGEND_HEIGHT].astype(float) - wanted).max(axis=-1) < 40
    rows, cols = np.nonzero(near[:, columns])
    assert len(rows), f"no pixel of {color}"
    return np.array([rows.mean(), cols.mean() + (columns.start or 0)])


def panel_columns(picture: Picture) -> list[slice]:
    """Where the three panels are: an image of ones is white on the dark ground."""
    bright = (picture[TITLE_HEIGHT + 5 : -LEGEND_HEIGHT] > 250).all(axis=-1).any(axis=0)
    edges = np.flatnonzero(np.diff(np.pad(bright.astype(int), 1)))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 20]


WHITE = np.ones(SHAPE, np.float32)


@pytest.mark.parametrize(
    ("ranges", "panel", "side"),
    [
        pytest.param(((30, 38), (20, 30), (8, 12)), 0, "left", id="the patient's right is at the left of the axial"),
        pytest.param(((30, 38), (20, 30), (8, 12)), 1, "left", id="and of the coronal plane"),
        pytest.param(((16, 24), (38, 48), (8, 12)), 0, "top", id="anterior is up in the axial plane"),
        pytest.param(((16, 24), (20, 30), (15, 19)), 1, "top", id="superior is up in the coronal plane"),
        pytest.param(((16, 24), (20, 30), (15, 19)), 2, "top", id="and in the sagittal plane"),
        pytest.param(((16, 24), (38, 48), (8, 12)), 2, "left", id="anterior is at the left of the sagittal plane"),
    ],
)
def test_planes_lie_as_radiologists_look_at_them(ranges: tuple[tuple[int, int], ...], panel: int, side: str) -> None:
    empty = contour_picture(WHITE, None, None, labels=LABELS, spacing_mm=SPACING_MM, window=(0, 1))
    columns = panel_columns(empty)[panel]
    rows = np.flatnonzero((empty[TITLE_HEIGHT:-LEGEND_HEIGHT, columns] > 250).all(axis=-1).any(axis=1)) + TITLE_HEIGHT
    picture = contour_picture(WHITE, None, box(1, *ranges), labels=LABELS, spacing_mm=SPACING_MM, window=(0, 1))
    row, column = center_of(picture, COLORS[0], columns=columns)
    if side == "left":
        assert column < (columns.start + columns.stop) / 2 - 10
    else:
        assert row < rows.mean() - 10


def test_panels_have_one_scale_and_true_proportions() -> None:
    picture = contour_picture(WHITE, None, None, labels=LABELS, spacing_mm=SPACING_MM, window=(0, 1))
    panels = panel_columns(picture)
    widths = [panel.stop - panel.start for panel in panels]
    heights = [int((picture[TITLE_HEIGHT:-LEGEND_HEIGHT, p] > 250).all(axis=-1).any(axis=1).sum()) for p in panels]
    scale = widths[0] / 40
    assert widths == pytest.approx([40 * scale, 40 * scale, 50 * scale], abs=2)
    assert heights == pytest.approx([50 * scale, 60 * scale, 60 * scale], abs=3)
    assert panels[1].start - panels[0].stop == pytest.approx(GAP, abs=2)


def test_the_prediction_has_its_organs_color_and_the_reference_is_white() -> None:
    reference, prediction = box(2, (5, 20), (5, 30), (5, 15)), box(2, (10, 25), (10, 35), (5, 15))
    picture = contour_picture(
        np.zeros(SHAPE, np.float32), reference, prediction, labels=LABELS, spacing_mm=SPACING_MM, window=(0, 1)
    )
    axial = slice(0, picture.shape[1] // 3)
    white, orange = (center_of(picture, color, columns=axial) for color in ("white", COLORS[1]))
    assert orange[1] < white[1] - 20  # further right in the patient, so further left in the picture
    assert orange[0] < white[0] - 20
    with pytest.raises(AssertionError, match="no pixel"):
        center_of(picture, COLORS[0], columns=axial)  # the liver's: there is none


def test_slices_go_through_every_organ_that_one_slice_can_show() -> None:
    large, small = box(1, (0, 40), (0, 50), (2, 14)), box(2, (30, 33), (40, 43), (12, 13))
    slices = informative_slices([np.maximum(large * (small == 0), small)], LABELS)
    assert slices == (30, 40, 12)
    assert informative_slices([np.zeros(SHAPE, np.uint8)], LABELS) is None


def test_an_organ_at_the_border_is_outlined_there_too() -> None:
    picture = contour_picture(
        np.zeros(SHAPE, np.float32), None, box(1, (0, 40), (0, 50), (0, 20)), labels=LABELS, spacing_mm=SPACING_MM
    )
    assert len(panel_colored(picture)) > 1000


def panel_colored(picture: Picture) -> npt.NDArray[np.intp]:
    wanted = np.array(matplotlib.colors.to_rgb(COLORS[0])) * 255
    return np.flatnonzero(np.abs(picture[:-LEGEND_HEIGHT].astype(float) - wanted).max(axis=-1) < 60)


def test_a_picture_is_drawn_even_where_there_is_nothing_to_see() -> None:
    image = np.full(SHAPE, np.nan, np.float32)
    image[0] = 3.0
    nothing = np.zeros(SHAPE, np.uint8)
    picture = contour_picture(image, nothing, nothing, labels=LABELS, spacing_mm=SPACING_MM, title="case_$1_{x}: –")
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_a_2d_image_is_one_panel_with_its_second_axis_downwards() -> None:
    image = np.ones((40, 60), np.float32)
    label = np.zeros((40, 60), np.uint8)
    label[5:15, 45:55] = 1
    picture = contour_picture(image, None, label, labels=LABELS, spacing_mm=(1.0, 1.0), window=(0, 1))
    row, column = center_of(picture, COLORS[0])
    assert row > picture.shape[0] * 0.6
    assert column < picture.shape[1] / 2 - 20


def test_the_same_case_gives_the_same_picture() -> None:
    label = box(1, (10, 30), (10, 30), (5, 15))
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    first, second = (contour_picture(image, label, label, labels=LABELS, spacing_mm=SPACING_MM) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.real_data
def test_a_real_scan_is_drawn_in_half_a_second_of_cpu_time(data_dir: Path) -> None:
    from medseg.data.volume_io import read_label, read_volume

    name = "chaos_ct_03.nii.gz"
    scan = read_volume(data_dir / "liver_ct" / "imagesTr" / name).oriented("RAS")
    label = read_label(data_dir / "liver_ct" / "labelsTr" / name).oriented("RAS").array[0]
    draw = {"labels": LABELS, "spacing_mm": scan.geometry.spacing_mm, "title": "chaos_ct_03: liver 0.95"}
    contour_picture(scan.array[0], label, label, **draw)  # type: ignore[arg-type]  # loads matplotlib
    began = time.process_time()
    picture = contour_picture(scan.array[0], label, np.roll(label, 3, axis=0), **draw)  # type: ignore[arg-type]
    assert time.process_time() - began < 0.5
    assert len(panel_colored(picture)) > 500
