"""DICOM segmentations (SEG: binary, fractional, labelmap) as a label map on an image's grid.

A frame is placed by its own position and orientation: frames may come in any order, leave slices out,
and run along other axes than the image's. Nothing is resampled. Refused (`DataError`, `GeometryError`)
or told (a warning on the logger ``medseg``), beside what `painting` finds:

===================== ==================================================================
E-SEG-FILE            no SEG, or one that cannot be decoded
E-SEG-TRUNCATED       fewer pixels than the header promises
E-SEG-FRAME           another frame of reference than the image's
E-SEG-GRID            frames that do not lie on voxels of the image, or lie on slices it lacks
E-SEG-VALUES          a labelmap with values that no segment describes
W-SEG-OUTSIDE         voxels beyond the rows and columns of the image, left out
W-SEG-EMPTY           no voxel in any segment that is read
===================== ==================================================================
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.data.dicom.painting import Mask, Piece, masks_of, paint, plane_distances_mm, values_of
from medseg.data.dicom.plane_placement import Placement, place_plane
from medseg.data.dicom.seg_file import Plane, Seg
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume
from medseg.labels import SEG_THRESHOLD

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Segment:
    """What a SEG says about a segment.

    Args:
        number: Segment number; in a labelmap the stored value.
        label: Its name.
        num_frames: Frames that belong to it; in a labelmap all frames, as each may hold any segment.
    """

    number: int
    label: str
    num_frames: int


def segments_of(path: Path) -> tuple[Segment, ...]:
    """The segments of a SEG; the background of a labelmap is none.

    Raises:
        DataError: If the file is no SEG.
    """
    seg = Seg.open(path, str(path))
    counts = Counter(number for frame in seg.frames for number in frame.numbers)
    return tuple(Segment(number, label, counts[number]) for number, label in seg.labels.items())


def read_seg(
    path: Path,
    grid: Geometry,
    *,
    values: Mapping[str, int] | None,
    paint_order: Sequence[int] = (),
    threshold: float = SEG_THRESHOLD,
    frame_of_reference_uid: str | None = None,
    where: str | None = None,
) -> Volume:
    """Read a SEG as the label map of an image.

    Args:
        path: The file.
        grid: The image's.
        values: Segment label to label value, see `painting.values_of`; 0 leaves a segment out. None: the
            segment number is the value.
        paint_order: Label values that may overlap: later ones lie on top.
        threshold: A fractional segment counts where it is at least this; above 0.5, shares of one
            voxel never overlap.
        frame_of_reference_uid: The image's; None: not compared.
        where: Case or file, for messages; None: the file.

    Returns:
        Label values (1, I, J, K); slices without a frame are background.

    Raises:
        DataError: If the file cannot be read, segments have no label value, or they overlap.
        GeometryError: If it does not lie on the grid.
    """
    seg = Seg.open(path, where or str(path), threshold)
    numbers = values_of(seg.labels, values, kind="SEG", where=seg.where)
    _check_frame_of_reference(seg, frame_of_reference_uid)
    pieces = _pieces(seg, grid, {number for number, value in numbers.items() if value})
    array = paint(
        grid.shape,
        pieces,
        names=seg.labels,
        values=numbers,
        paint_order=paint_order,
        kind="SEG",
        where=seg.where,
    )
    return Volume(array[None], grid)


def read_segments(
    path: Path,
    grid: Geometry,
    *,
    threshold: float = SEG_THRESHOLD,
    frame_of_reference_uid: str | None = None,
    where: str | None = None,
) -> dict[str, Mask]:
    """Read a SEG as a mask (I, J, K) for each label; masks may overlap, segments of one label are united.

    Args:
        path: The file.
        grid: The image's.
        threshold: See `read_seg`.
        frame_of_reference_uid: See `read_seg`.
        where: See `read_seg`.

    Raises:
        DataError: If the file cannot be read.
        GeometryError: If it does not lie on the grid.
    """
    seg = Seg.open(path, where or str(path), threshold)
    _check_frame_of_reference(seg, frame_of_reference_uid)
    return masks_of(grid.shape, _pieces(seg, grid, set(seg.labels)), seg.labels)


def _pieces(seg: Seg, grid: Geometry, numbers: set[int]) -> Iterator[Piece]:
    """The voxels of some segments, frame by frame."""
    indices = [index for index, frame in enumerate(seg.frames) if numbers.intersection(frame.numbers)]
    places = _places(seg, indices, grid)
    num_voxels, num_outside = 0, 0
    for index, pixels in zip(indices, seg.pixels(indices), strict=True):
        place = places[index]
        for number, mask in seg.masks(index, pixels):
            if number not in numbers or not mask.any():
                continue
            if not 0 <= place.at < grid.shape[place.normal]:
                raise _missing_slice(seg, index, place, grid)
            num_voxels += int(np.count_nonzero(mask))
            num_outside += int(np.count_nonzero(mask) - np.count_nonzero(mask[place.crop]))
            yield place.piece(number, mask)
    _tell_what_is_outside(num_voxels, num_outside, seg.where)


def _places(seg: Seg, indices: Sequence[int], grid: Geometry) -> dict[int, Placement]:
    """Where frames lie on the grid; all must lie on voxels."""
    found: dict[Plane, Placement | float] = {}
    places: dict[int, Placement] = {}
    misses: dict[int, float] = {}
    for index in indices:
        plane = seg.frames[index].plane
        if plane is None:
            raise DataError(
                "E-SEG-FILE",
                f"frame {index + 1} lacks position, orientation or pixel spacing, so that it has no place in the "
                "patient; give the segmentation of a CT, MR or PET series",
                where=seg.where,
            )
        if plane not in found:  # one for all segments on it
            found[plane] = place_plane(np.array(plane.position), np.reshape(plane.steps, (2, 3)), seg.size, grid)
        place = found[plane]
        if isinstance(place, Placement):
            places[index] = place
        else:
            misses[index] = place
    if misses:
        raise _beside_voxels(seg, misses, len(indices), grid)
    return places


def _beside_voxels(seg: Seg, misses: Mapping[int, float], num_frames: int, grid: Geometry) -> GeometryError:
    worst = max(misses, key=lambda index: misses[index])
    plane = seg.frames[worst].plane
    assert plane is not None
    pixel = " × ".join(f"{s:.4g}" for s in np.linalg.norm(np.reshape(plane.steps, (2, 3))[::-1], axis=1))
    voxel = " × ".join(f"{s:.4g}" for s in grid.spacing_mm)
    return GeometryError(
        "E-SEG-GRID",
        f"{len(misses)} of {num_frames} frames lie beside the image's voxels, frame {worst + 1} by "
        f"{misses[worst]:.3g} mm (its pixels are {pixel} mm, the voxels {voxel} mm); give the image that was "
        "segmented, or resample the segmentation to this one",
        where=seg.where,
    )


def _check_frame_of_reference(seg: Seg, uid: str | None) -> None:
    own = seg.frame_of_reference_uid
    if uid and own and own != uid:
        raise GeometryError(
            "E-SEG-FRAME",
            f"frame of reference {own}, but the image's is {uid}: a position in one means nothing in the other; give "
            "the segmentation of this image",
            where=seg.where,
        )


def _missing_slice(seg: Seg, index: int, place: Placement, grid: Geometry) -> GeometryError:
    size = grid.shape[place.normal]
    planes = max(-place.at, place.at - size + 1)
    distance = planes * float(plane_distances_mm(grid)[place.normal])
    return GeometryError(
        "E-SEG-GRID",
        f"frame {index + 1} has voxels {distance:.4g} mm beyond the {size} slices of the image: some are missing; give "
        "the whole series that was segmented",
        where=seg.where,
    )


def _tell_what_is_outside(num_voxels: int, num_outside: int, where: str) -> None:
    if not num_voxels:
        log.warning("W-SEG-EMPTY %s: no voxel is in any segment", where)
    elif num_voxels == num_outside:
        raise GeometryError(
            "E-SEG-GRID",
            f"all {num_voxels:,} voxels lie beyond the image's rows and columns; give the image that was segmented",
            where=where,
        )
    elif num_outside:
        log.warning(
            "W-SEG-OUTSIDE %s: %d of %d voxels lie beyond the image's rows and columns; left out",
            where,
            num_outside,
            num_voxels,
        )
