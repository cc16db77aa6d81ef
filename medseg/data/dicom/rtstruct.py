"""Contours of a DICOM RTSTRUCT as a label map on an image's grid.

A contour belongs to the slice whose SOP instance UID it names; if it names none of the image's slices,
to the one it lies on, provided that it shares the image's frame of reference. A voxel is inside where
its centre is, by even-odd over all contours of an ROI on a slice (`polygons`): inner contours are holes.
Refused (`DataError`, `GeometryError`) or told (a warning on the logger ``medseg``), beside what
`painting` finds:

===================== ==================================================================
E-RTSTRUCT-FILE       no RTSTRUCT, or one that cannot be read
E-RTSTRUCT-CONTOUR    a contour whose points are no numbers, or fewer than it says
E-RTSTRUCT-REFERENCE  contours that lie on no slice of the image, or beyond its rows and columns
W-RTSTRUCT-GEOMETRY   contours that name no slice of the image and were placed by where they lie
W-RTSTRUCT-OPEN       points and open lines, which enclose nothing: skipped
W-RTSTRUCT-REPEATED   a contour drawn twice, used once: even-odd would make a hole of it
W-RTSTRUCT-CROSSING   contours of an ROI that cross: where both are, is outside
W-RTSTRUCT-OUTSIDE    contours that reach beyond the rows and columns, cut off there
W-RTSTRUCT-EMPTY      an ROI with no voxel: no contours, or too small ones
===================== ==================================================================
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.data.dicom.contours import Contour, StructureSet
from medseg.data.dicom.painting import Mask, Piece, indices_of, masks_of, paint, plane_distances_mm, values_of
from medseg.data.dicom.polygons import crossing_voxels, fill
from medseg.errors import GeometryError
from medseg.geometry import Array, Geometry, Volume

PLANE_TOLERANCE = 0.1
"""Share of the slice distance by which a contour may miss a slice that it does not name. Coordinates are
rounded to 0.01 mm or so; contours of another series are a tenth of a slice off, or less, by chance once in
five, and would then be at most that far from their place."""

NAMED_TOLERANCE = 0.5
"""The same where it names the slice: beyond, another slice is closer, so that name and place disagree."""

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Roi:
    """What an RTSTRUCT says about a region of interest.

    Args:
        number: ROI number.
        name: Its name.
        num_contours: Closed contours that it has.
    """

    number: int
    name: str
    num_contours: int


def rois_of(path: Path) -> tuple[Roi, ...]:
    """The ROIs of an RTSTRUCT.

    Raises:
        DataError: If the file is no RTSTRUCT.
    """
    structures = StructureSet.load(path, str(path))
    return tuple(Roi(number, name, structures.num_closed(number)) for number, name in structures.names.items())


def read_rtstruct(
    path: Path,
    grid: Geometry,
    *,
    sop_uids: Sequence[str],
    frame_of_reference_uid: str | None,
    values: Mapping[str, int] | None,
    paint_order: Sequence[int] = (),
    where: str | None = None,
) -> Volume:
    """Read an RTSTRUCT as the label map of an image.

    Args:
        path: The file.
        grid: The image's; its last axis runs across the slices.
        sop_uids: SOP instance UID of each slice, in the order of the last axis; empty for a slice that was missing.
        frame_of_reference_uid: The image's.
        values: ROI name to label value; case, blanks and punctuation do not count, 0 leaves an ROI
            out. None: the ROI number is the value.
        paint_order: Label values that may overlap: later ones lie on top.
        where: Case or file, for messages; None: the file.

    Returns:
        Label values (1, I, J, K).

    Raises:
        DataError: If the file cannot be read, ROIs have no label value, or they overlap.
        GeometryError: If contours do not belong to this image.
    """
    structures = StructureSet.load(path, where or str(path))
    numbers = values_of(structures.names, values, kind="RTSTRUCT", where=structures.where)
    image = _Image(grid, tuple(sop_uids), frame_of_reference_uid)
    array = paint(
        grid.shape,
        _pieces(structures, [number for number, value in numbers.items() if value], image),
        names=structures.names,
        values=numbers,
        paint_order=paint_order,
        kind="RTSTRUCT",
        where=structures.where,
    )
    return Volume(array[None], grid)


def read_rois(
    path: Path,
    grid: Geometry,
    *,
    sop_uids: Sequence[str],
    frame_of_reference_uid: str | None,
    where: str | None = None,
) -> dict[str, Mask]:
    """Read an RTSTRUCT as a mask (I, J, K) for each name; masks may overlap, ROIs of one name are united.

    Args:
        path: The file.
        grid: See `read_rtstruct`.
        sop_uids: See `read_rtstruct`.
        frame_of_reference_uid: See `read_rtstruct`.
        where: See `read_rtstruct`.

    Raises:
        DataError: If the file cannot be read.
        GeometryError: If contours do not belong to this image.
    """
    structures = StructureSet.load(path, where or str(path))
    image = _Image(grid, tuple(sop_uids), frame_of_reference_uid)
    return masks_of(grid.shape, _pieces(structures, list(structures.names), image), structures.names)


@dataclass(frozen=True, eq=False)
class _Image:
    """What contours are matched with."""

    grid: Geometry
    sop_uids: tuple[str, ...]
    frame_of_reference_uid: str | None

    def __post_init__(self) -> None:
        assert len(self.sop_uids) in (0, self.grid.shape[2]), "one SOP instance UID for each slice"


@dataclass(frozen=True, eq=False)
class _Placed:
    """A contour on the image's grid."""

    roi: int
    polygon: Array  # (N, 2): (i, j)
    k: int  # its slice
    miss: float  # farthest distance of a point from it, in slices
    is_named: bool  # whether the contour names the slice
    frame: str | None  # frame of reference of the ROI

    @property
    def is_on_slice(self) -> bool:
        return self.miss <= (NAMED_TOLERANCE if self.is_named else PLANE_TOLERANCE)


def _pieces(structures: StructureSet, numbers: Sequence[int], image: _Image) -> Iterator[Piece]:
    """The voxels of some ROIs, slice by slice."""
    where, plane = structures.where, image.grid.shape[:2]
    slices_of: dict[str, list[int]] = defaultdict(list)
    for k, uid in enumerate(image.sop_uids):
        if uid:
            slices_of[uid].append(k)
    contours = [
        _placed(contour, slices_of, image.grid, structures.frames[contour.roi])
        for contour in structures.contours(numbers)
    ]
    _check_matches(contours, image, where)
    _check_extent(contours, plane, where)
    polygons: dict[tuple[int, int], list[Array]] = defaultdict(list)
    for contour in contours:
        polygons[contour.roi, contour.k].append(contour.polygon)
    found: set[int] = set()
    num_repeated, num_crossing = 0, 0
    for (number, k), drawn in polygons.items():
        once = list({polygon.tobytes(): polygon for polygon in drawn}.values())
        num_repeated += len(drawn) - len(once)
        num_crossing += crossing_voxels(once, plane) if len(once) > 1 else 0
        window, mask = fill(once, plane)
        if mask.any():
            found.add(number)
            yield Piece(number, (*window, k), mask)
    if num_repeated:
        log.warning("W-RTSTRUCT-REPEATED %s: %d contours are drawn twice; used once", where, num_repeated)
    if num_crossing:
        log.warning(
            "W-RTSTRUCT-CROSSING %s: %d voxels lie in two contours of one ROI that cross; taken as outside",
            where,
            num_crossing,
        )
    _tell_what_is_missing(structures, numbers, len(contours), found)


def _placed(contour: Contour, slices_of: Mapping[str, Sequence[int]], grid: Geometry, frame: str | None) -> _Placed:
    # rounded, so that a contour drawn twice stays equal to the last bit
    points = np.round(indices_of(contour.points_lps, grid), 6)
    k = float(np.median(points[:, 2]))
    named = [at for uid in contour.sop_uids for at in slices_of.get(uid, ())]
    at = min(named or range(grid.shape[2]), key=lambda at: abs(at - k))
    miss = float(np.abs(points[:, 2] - at).max())
    return _Placed(contour.roi, np.ascontiguousarray(points[:, :2]), at, miss, bool(named), frame)


def _check_matches(contours: Sequence[_Placed], image: _Image, where: str) -> None:
    """Refuse contours that belong to no slice; tell how many were placed without being named."""
    own = image.frame_of_reference_uid
    foreign = [c for c in contours if not c.is_named and (own is None or c.frame != own)]
    missing = [c for c in contours if not c.is_on_slice]
    num_named = sum(c.is_named for c in contours)
    if not foreign and not missing:
        if num_named < len(contours):
            log.warning(
                "W-RTSTRUCT-GEOMETRY %s: %d of %d contours name no slice of the image; placed where they lie",
                where,
                len(contours) - num_named,
                len(contours),
            )
        return
    parts = [f"{num_named} of {len(contours)} contours name a slice of the image"]
    parts += [f"{len(contours) - len(missing)} lie on one"]
    if missing:
        slice_mm = float(plane_distances_mm(image.grid)[2])
        parts += [
            f"{len(missing)} are up to {max(c.miss for c in missing) * slice_mm:.3g} mm off (slices are {slice_mm:.4g} "
            f"mm apart; {PLANE_TOLERANCE:g} of it is allowed, {NAMED_TOLERANCE:g} from a slice that is named)"
        ]
    if foreign:
        frames = ", ".join(sorted({str(c.frame) for c in foreign}))
        parts += [
            f"{len(foreign)} name none and have another frame of reference ({frames}; image: {own}), where a position "
            "means nothing"
        ]
    raise GeometryError(
        "E-RTSTRUCT-REFERENCE",
        f"{', '.join(parts)}; give the whole image series that the contours were drawn on",
        where=where,
    )


def _check_extent(contours: Sequence[_Placed], plane: Sequence[int], where: str) -> None:
    """Tell of contours that reach beyond rows and columns; refuse if none is within."""
    last = np.array(plane) - 0.5
    beyond = sum(bool((c.polygon < -0.5).any() or (c.polygon > last).any()) for c in contours)
    gone = sum(bool((c.polygon.max(0) < -0.5).any() or (c.polygon.min(0) > last).any()) for c in contours)
    if gone and gone == len(contours):
        raise GeometryError(
            "E-RTSTRUCT-REFERENCE",
            f"all {gone} contours lie beyond the image's rows and columns; give the image that they were drawn on",
            where=where,
        )
    if beyond:
        log.warning(
            "W-RTSTRUCT-OUTSIDE %s: %d of %d contours reach beyond the image's rows and columns (%d wholly); cut off",
            where,
            beyond,
            len(contours),
            gone,
        )


def _tell_what_is_missing(structures: StructureSet, numbers: Sequence[int], num_used: int, found: set[int]) -> None:
    where = structures.where
    num_skipped = sum(len(structures.items.get(number, ())) for number in numbers) - num_used
    if num_skipped:
        log.warning("W-RTSTRUCT-OPEN %s: %d contours are points or lines, without an area; skipped", where, num_skipped)
    empty = [f"{structures.names[n]!r} ({structures.num_closed(n)} contours)" for n in numbers if n not in found]
    if empty:
        log.warning("W-RTSTRUCT-EMPTY %s: no voxel is in %s", where, ", ".join(empty))
