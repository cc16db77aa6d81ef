"""Positions of slices → the grid they stand on, with what is missing, irregular or tilted.

===================== ==================================================================
E-DICOM-GEOMETRY      slices that make no stack, or one slice of unknown thickness
E-DICOM-MISSING-SLICE gaps of twice the spacing, three times …
E-DICOM-IRREGULAR     other gaps than multiples of one spacing
E-SPACING             voxels outside `SPACING_RANGE_MM`
W-DICOM-TILT          slices that do not stand at right angles to their stack (a tilted gantry)
W-DICOM-SPACING       the header states another spacing than the positions have
===================== ==================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medseg.data.dicom.frame import Frame, Place
from medseg.data.headers import SPACING_RANGE_MM
from medseg.errors import DataError, GeometryError
from medseg.geometry import Array, Geometry

SAME_POSITION_MM = 0.01
"""Slices closer than this lie at one position."""

POSITION_TOLERANCE_MM = 0.05
POSITION_TOLERANCE = 0.02
"""How far a slice may be from its place on the grid, in mm or as a share of the spacing, whichever is more:
headers round positions, some to 0.1 mm."""

MAX_TILT_DEG = 45.0
"""Gantries tilt by 30° at most; more, and the slices are no stack."""

STRAIGHT_DEG = 0.06
"""Tilt up to here counts as none (`Geometry.is_orthogonal` thinks the same)."""

_MAX_NAMED = 5


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices on a grid.

    Args:
        geometry: The grid; None if there is none.
        at: Where along the last axis each slice lies, in voxels: 0, 1, 2 … where the stack is whole.
        tilt_deg: Between the stack's direction and the slices' normal.
        problems: Why this is no whole volume.
        notes: What a person should know.
    """

    geometry: Geometry | None
    at: tuple[float, ...] = ()
    tilt_deg: float = 0.0
    problems: tuple[DataError, ...] = ()
    notes: tuple[str, ...] = ()


def along_normal(frames: Sequence[Frame]) -> Array:
    """How far each frame (all of one orientation) lies along the normal of the first, mm."""
    places = [_placed(frame) for frame in frames]
    return np.array([place.position for place in places]) @ _normal(places[0])


def fit_stack(frames: Sequence[Frame], where: str) -> Stack:
    """The grid of frames that are ordered along their normal and share orientation, spacing and size.

    Args:
        frames: At least one, each with a place.
        where: For messages.
    """
    place = _placed(frames[0])
    positions = np.array([_placed(frame).position for frame in frames])
    if len(frames) == 1:
        return _one_slice(frames[0], where)
    step, length = positions[-1] - positions[0], float(np.linalg.norm(positions[-1] - positions[0]))
    tilt_deg = _angle_deg(step, _normal(place))
    if not tilt_deg <= MAX_TILT_DEG:  # NaN too
        return _no_stack(f"the slices lie beside each other rather than in a stack ({tilt_deg:.0f}° off)", where)
    direction = step / length
    distances = (positions - positions[0]) @ direction
    aside = np.linalg.norm(positions - positions[0] - distances[:, None] * direction, axis=1)
    gaps = np.diff(distances)
    counts = _counts(distances)
    spacing = length / (sum(counts) if counts else max(1, round(length / float(np.median(gaps)))))
    if aside.max() > _tolerance_mm(spacing):
        worst = int(aside.argmax())
        return _no_stack(f"{frames[worst].path.name} lies {aside[worst]:.3g} mm aside of the line of the others", where)
    at = tuple(np.cumsum([0.0, *counts]).tolist()) if counts else tuple((distances / spacing).tolist())
    num_slices = round(at[-1]) + 1
    geometry = _grid(frames[0], num_slices, step / length * spacing)
    problems = [
        *_gap_problems(frames, positions, counts, gaps, num_slices, spacing, where),
        *_spacing_problem(geometry, where),
    ]
    return Stack(geometry, at, tilt_deg, tuple(problems), (*_tilt_note(tilt_deg), *_spacing_note(frames[0], spacing)))


def _counts(distances: Array) -> tuple[int, ...]:
    """How many spacings wide each gap is; empty if there is no spacing that fits."""
    gaps = np.diff(distances)
    for guess in (float(np.median(gaps)), float(gaps.min())):
        counts = np.rint(gaps / guess).astype(int)
        if guess < SAME_POSITION_MM or counts.min() < 1:
            continue
        spacing = distances[-1] / counts.sum()
        if np.abs(np.cumsum([0, *counts]) * spacing - distances).max() <= _tolerance_mm(spacing):
            return tuple(counts.tolist())
    return ()


def _gap_problems(
    frames: Sequence[Frame],
    positions: Array,
    counts: Sequence[int],
    gaps: Array,
    num_slices: int,
    spacing: float,
    where: str,
) -> list[DataError]:
    if num_slices == len(frames) and counts:
        return []
    if num_slices > 2 * len(frames):
        return [
            DataError(
                "E-DICOM-GEOMETRY",
                f"{len(frames)} slices where {num_slices} would make a whole stack; several scans in one series? "
                "Give them apart",
                where=where,
            )
        ]
    if not counts:
        sizes = Counter(f"{gap:.4g}" for gap in gaps).most_common(_MAX_NAMED)
        listed = ", ".join(f"{number} × {size}" for size, number in sizes)
        return [
            DataError(
                "E-DICOM-IRREGULAR",
                f"gaps between slices of {listed} mm are no multiples of one spacing; export an even series, or set "
                f"allow_missing_slices to interpolate {num_slices} slices {spacing:.4g} mm apart",
                where=where,
            )
        ]
    missing = [
        f"({', '.join(f'{x:.2f}' for x in positions[k] + (positions[k + 1] - positions[k]) * i / count)})"
        for k, count in enumerate(counts)
        for i in range(1, count)
    ]
    listed = ", ".join(missing[:_MAX_NAMED]) + (", …" if len(missing) > _MAX_NAMED else "")
    return [
        DataError(
            "E-DICOM-MISSING-SLICE",
            f"{len(missing)} of {num_slices} slices missing, with ImagePositionPatient {listed} mm; find the files, or "
            "set allow_missing_slices to interpolate them",
            where=where,
        )
    ]


def _one_slice(frame: Frame, where: str) -> Stack:
    step = frame.step_mm or 0.0  # negative where it tells a direction
    spacing = step if step > 0 else frame.thickness_mm or -step
    if spacing <= 0:
        return _no_stack("one slice, and neither SpacingBetweenSlices nor SliceThickness says how thick it is", where)
    geometry = _grid(frame, 1, _normal(_placed(frame)) * spacing)
    return Stack(geometry, (0.0,), problems=tuple(_spacing_problem(geometry, where)))


def _no_stack(message: str, where: str) -> Stack:
    return Stack(
        None, problems=(GeometryError("E-DICOM-GEOMETRY", f"{message}; export the original series", where=where),)
    )


def _grid(frame: Frame, num_slices: int, step: Array) -> Geometry:
    place = _placed(frame)
    spacing = float(np.linalg.norm(step))
    direction = np.column_stack([place.row, place.column, step / spacing])
    return Geometry.from_lps(
        (*frame.size, num_slices),
        origin=place.position,
        spacing=(*place.spacing_mm, spacing),
        direction=direction.ravel().tolist(),
    )


def _spacing_problem(geometry: Geometry, where: str) -> list[DataError]:
    low, high = SPACING_RANGE_MM
    if all(low <= s <= high for s in geometry.spacing_mm):
        return []
    spacing = ", ".join(f"{s:g}" for s in geometry.spacing_mm)
    return [
        GeometryError("E-SPACING", f"spacing ({spacing}) mm; expected {low}-{high} mm along each axis", where=where)
    ]


def _tilt_note(tilt_deg: float) -> list[str]:
    if tilt_deg < STRAIGHT_DEG:
        return []
    return [f"W-DICOM-TILT slices tilted by {tilt_deg:.1f}°: the grid is sheared, preprocessing straightens it"]


def _spacing_note(frame: Frame, spacing: float) -> list[str]:
    if frame.step_mm is None or abs(abs(frame.step_mm) - spacing) <= max(0.01, 0.01 * spacing):
        return []
    return [
        f"W-DICOM-SPACING SpacingBetweenSlices is {frame.step_mm:g} mm, but slices lie {spacing:.4g} mm apart, which counts"
    ]


def _tolerance_mm(spacing: float) -> float:
    return max(POSITION_TOLERANCE_MM, POSITION_TOLERANCE * spacing) + 1e-6


def _placed(frame: Frame) -> Place:
    assert frame.place is not None  # those without are sorted out before
    return frame.place


def _normal(place: Place) -> Array:
    normal = np.cross(place.row, place.column)
    return normal / np.linalg.norm(normal)


def _angle_deg(a: Array, b: Array) -> float:
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b)))
