"""Contours of a DICOM RTSTRUCT as a label map on an image's grid.

A contour belongs to the slice whose SOP instance UID it names; if it names none of the image's slices,
to the one it lies on, provided that it shares the image's frame of reference. An image that is a file has
neither: there contours belong where they lie, which is told. A voxel is inside where
its centre is, by even-odd over all contours of an ROI on a slice (`polygons`): inner contours are holes.
Refused (`DataError`, `GeometryError`) or told (a warning on the logger ``medseg``), beside what
`painting` finds:

===================== ==================================================================
E-RTSTRUCT-FILE       no RTSTRUCT, or one that cannot be read
E-RTSTRUCT-CONTOUR    a contour whose points are no numbers, or fewer than it says
E-RTSTRUCT-REFERENCE  contours that lie on no slice of the image, or beyond its rows and columns
W-RTSTRUCT-GEOMETRY   contours that name other images than the slices they lie on, or an image that names no slices
W-RTSTRUCT-OPEN       points and open lines, which enclose nothing: skipped
W-RTSTRUCT-REPEATED   a contour drawn twice, used once: even-odd would make a hole of it
W-RTSTRUCT-GAPS       slices without a contour between contoured ones: background
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
from itertools import pairwise
from pathlib import Path

from medseg.data.dicom.contour_placement import ImageSlices, place_contours
from medseg.data.dicom.contours import StructureSet
from medseg.data.dicom.painting import Mask, Piece, masks_of, paint, values_of
from medseg.data.dicom.polygons import Window, crossing_voxels, fill, share_voxels, without_repeats
from medseg.geometry import Array, Geometry, Volume

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
            No UIDs at all: the image is a file.
        frame_of_reference_uid: The image's; None: it states none.
        values: ROI name to label value, see `painting.values_of`; 0 leaves an ROI out. None: the ROI
            number is the value.
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
    image = ImageSlices(grid, tuple(sop_uids), frame_of_reference_uid)
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
    image = ImageSlices(grid, tuple(sop_uids), frame_of_reference_uid)
    return masks_of(grid.shape, _pieces(structures, list(structures.names), image), structures.names)


def _pieces(structures: StructureSet, numbers: Sequence[int], image: ImageSlices) -> Iterator[Piece]:
    """The voxels of some ROIs, slice by slice."""
    plane = image.grid.shape[:2]
    contours = place_contours(structures, numbers, image)
    drawn: dict[tuple[int, int], list[Array]] = defaultdict(list)
    for contour in contours:
        drawn[contour.roi, contour.k].append(contour.polygon)
    once = {place: without_repeats(polygons, plane) for place, polygons in drawn.items()}
    _tell_of_repeats_and_crossings(once, len(contours), plane, structures.where)
    windows: dict[int, dict[int, Window]] = defaultdict(dict)
    found: set[int] = set()
    for (number, k), polygons in once.items():
        windows[number][k], mask = fill(polygons, plane)
        if mask.any():
            found.add(number)
            yield Piece(number, (*windows[number][k], k), mask)
    _tell_of_gaps(structures, windows)
    _tell_what_is_missing(structures, numbers, len(contours), found)


def _tell_of_repeats_and_crossings(
    once: Mapping[tuple[int, int], Sequence[Array]], num_drawn: int, plane: Sequence[int], where: str
) -> None:
    num_repeated = num_drawn - sum(len(polygons) for polygons in once.values())
    if num_repeated:
        log.warning("W-RTSTRUCT-REPEATED %s: %d contours are drawn twice; used once", where, num_repeated)
    num_crossing = sum(crossing_voxels(polygons, plane) for polygons in once.values() if len(polygons) > 1)
    if num_crossing:
        log.warning(
            "W-RTSTRUCT-CROSSING %s: %d voxels lie in two contours of one ROI that cross; taken as outside",
            where,
            num_crossing,
        )


def _tell_of_gaps(structures: StructureSet, windows: Mapping[int, Mapping[int, Window]]) -> None:
    """Between two contours that lie one above the other; those of several lesions may well be apart."""
    gaps = {
        number: sum(b - a - 1 for a, b in pairwise(sorted(on)) if share_voxels(on[a], on[b]))
        for number, on in windows.items()
    }
    if any(gaps.values()):
        log.warning(
            "W-RTSTRUCT-GAPS %s: slices without a contour between contoured ones, background there: %s; where only "
            "some slices were contoured, interpolate in the program that drew them",
            structures.where,
            ", ".join(f"{num} of {structures.names[number]!r}" for number, num in gaps.items() if num),
        )


def _tell_what_is_missing(structures: StructureSet, numbers: Sequence[int], num_used: int, found: set[int]) -> None:
    where = structures.where
    num_skipped = sum(len(structures.items.get(number, ())) for number in numbers) - num_used
    if num_skipped:
        log.warning("W-RTSTRUCT-OPEN %s: %d contours are points or lines, without an area; skipped", where, num_skipped)
    empty = [f"{structures.names[n]!r} ({structures.num_closed(n)} contours)" for n in numbers if n not in found]
    if empty:
        log.warning("W-RTSTRUCT-EMPTY %s: no voxel is in %s", where, ", ".join(empty))
