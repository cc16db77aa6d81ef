"""Where the contours of an RTSTRUCT lie on an image's slices; told in `rtstruct`, with what is refused."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.data.dicom.contours import Contour, StructureSet
from medseg.data.dicom.painting import indices_of, plane_distances_mm
from medseg.errors import GeometryError
from medseg.geometry import Array, Geometry

PLANE_TOLERANCE = 0.1
"""Share of the slice distance by which a contour may miss a slice that it does not name. Coordinates are
rounded to 0.01 mm or so; contours of another series are a tenth of a slice off, or less, by chance once in
five, and would then be at most that far from their place."""

NAMED_TOLERANCE = 0.5
"""The same where it names the slice: beyond, another slice is closer, so that name and place disagree."""

log = logging.getLogger("medseg")


@dataclass(frozen=True, eq=False)
class ImageSlices:
    """What contours are matched with.

    Args:
        grid: The image's; its last axis runs across the slices.
        sop_uids: SOP instance UID of each slice; empty for a slice that was missing. No UIDs at all:
            the image is a file.
        frame_of_reference_uid: What positions refer to.
    """

    grid: Geometry
    sop_uids: tuple[str, ...]
    frame_of_reference_uid: str | None

    def __post_init__(self) -> None:
        assert len(self.sop_uids) in (0, self.grid.shape[2]), "one SOP instance UID for each slice"

    @property
    def is_file(self) -> bool:
        return not self.sop_uids and self.frame_of_reference_uid is None


@dataclass(frozen=True, eq=False)
class PlacedContour:
    """A contour on the image's grid.

    Args:
        roi: Number of its ROI.
        polygon: (N, 2): i and j of its points.
        k: Its slice.
        miss: Farthest distance of a point from it, in slices.
        is_named: Whether the contour names the slice.
        is_contradicted: Whether it names other images alone, though the slice has a name.
        frame: Frame of reference of the ROI.
    """

    roi: int
    polygon: Array
    k: int
    miss: float
    is_named: bool
    is_contradicted: bool
    frame: str | None

    @property
    def is_on_slice(self) -> bool:
        return self.miss <= (NAMED_TOLERANCE if self.is_named else PLANE_TOLERANCE)


def place_contours(structures: StructureSet, numbers: Sequence[int], image: ImageSlices) -> list[PlacedContour]:
    """The closed contours of some ROIs on the image's slices.

    Raises:
        DataError: If a contour has broken points.
        GeometryError: If contours do not belong to this image.
    """
    slices_of: dict[str, list[int]] = defaultdict(list)
    for k, uid in enumerate(image.sop_uids):
        if uid:
            slices_of[uid].append(k)
    contours = [
        _placed(contour, slices_of, image, structures.frames[contour.roi]) for contour in structures.contours(numbers)
    ]
    _check_matches(contours, image, structures.where)
    _check_extent(contours, image.grid.shape[:2], structures.where)
    return contours


def _placed(
    contour: Contour, slices_of: Mapping[str, Sequence[int]], image: ImageSlices, frame: str | None
) -> PlacedContour:
    # rounded, as points on the very edge of the image lie beyond it by the last bit otherwise
    points = np.round(indices_of(contour.points_lps, image.grid), 6)
    k = float(np.median(points[:, 2]))
    named = [at for uid in contour.sop_uids for at in slices_of.get(uid, ())]
    at = min(named or range(image.grid.shape[2]), key=lambda at: abs(at - k))
    return PlacedContour(
        contour.roi,
        polygon=np.ascontiguousarray(points[:, :2]),
        k=at,
        miss=float(np.abs(points[:, 2] - at).max()),
        is_named=bool(named),
        is_contradicted=bool(contour.sop_uids and not named and image.sop_uids and image.sop_uids[at]),
        frame=frame,
    )


def _check_matches(contours: Sequence[PlacedContour], image: ImageSlices, where: str) -> None:
    """Refuse contours that belong to no slice; tell where only their place says that they belong to one."""
    own = image.frame_of_reference_uid
    foreign = [c for c in contours if not (c.is_named or image.is_file or (own is not None and c.frame == own))]
    missing = [c for c in contours if not c.is_on_slice]
    if foreign or missing:
        raise _reference_error(contours, foreign, missing, image, where)
    num_contradicted = sum(c.is_contradicted for c in contours)
    if num_contradicted:
        log.warning(
            "W-RTSTRUCT-GEOMETRY %s: %d of %d contours name other images than the slices they lie on; placed where "
            "they lie",
            where,
            num_contradicted,
            len(contours),
        )
    if contours and image.is_file:
        log.warning(
            "W-RTSTRUCT-GEOMETRY %s: the image is a file, which says nothing of the series it was made from; contours "
            "are placed where they lie: see that they are of this scan",
            where,
        )


def _reference_error(
    contours: Sequence[PlacedContour],
    foreign: Sequence[PlacedContour],
    missing: Sequence[PlacedContour],
    image: ImageSlices,
    where: str,
) -> GeometryError:
    parts = [f"{sum(c.is_named for c in contours)} of {len(contours)} contours name a slice of the image"]
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
            f"{len(foreign)} name none and have another frame of reference ({frames}; image: "
            f"{image.frame_of_reference_uid}), where a position means nothing"
        ]
    return GeometryError(
        "E-RTSTRUCT-REFERENCE",
        f"{', '.join(parts)}; give the whole image series that the contours were drawn on",
        where=where,
    )


def _check_extent(contours: Sequence[PlacedContour], plane: Sequence[int], where: str) -> None:
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
