"""What a DICOM RTSTRUCT holds: ROIs and their contours, in the patient's millimetres."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.data.dicom.objects import MAX_COORDINATE_MM, decoding, open_object
from medseg.errors import DataError
from medseg.geometry import Array

if TYPE_CHECKING:
    from pydicom import Dataset

RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
"""RT Structure Set Storage."""

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""Kinds of contours that enclose an area; others are points and open lines."""


@dataclass(frozen=True, eq=False)
class Contour:
    """A closed contour.

    Args:
        roi: Number of its ROI.
        points_lps: (N, 3), DICOM's LPS mm.
        sop_uids: Images that it says it was drawn on.
    """

    roi: int
    points_lps: Array
    sop_uids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class StructureSet:
    """The parts of an RTSTRUCT that matter for masks.

    Args:
        names: Of each ROI number.
        frames: Frame of reference UID of each ROI number.
        items: Contour Sequence of each ROI number that has one.
        where: Case or file, for messages.
    """

    names: dict[int, str]
    frames: dict[int, str | None]
    items: dict[int, list[Dataset]]
    where: str

    @classmethod
    def load(cls, path: Path, where: str) -> StructureSet:
        """Read a file.

        Raises:
            DataError: If it is no RTSTRUCT, or a damaged one.
        """
        data = open_object(path, (RTSTRUCT_CLASS,), kind="RTSTRUCT", where=where)
        with decoding("RTSTRUCT", where):
            rois, drawings = data.get("StructureSetROISequence"), data.get("ROIContourSequence")
            if not rois or drawings is None:
                raise _broken("has no list of ROIs or of contours", where)
            if not all("ROINumber" in item for item in rois):
                raise _broken("an ROI has no number", where)
            referenced = data.get("ReferencedFrameOfReferenceSequence") or []
            only_frame = referenced[0].get("FrameOfReferenceUID") if len(referenced) == 1 else None
            return cls(
                {int(item.ROINumber): str(item.get("ROIName") or f"ROI {item.ROINumber}") for item in rois},
                {int(item.ROINumber): item.get("ReferencedFrameOfReferenceUID") or only_frame for item in rois},
                {int(item.ReferencedROINumber): list(item.get("ContourSequence") or []) for item in drawings},
                where,
            )

    def num_closed(self, number: int) -> int:
        """How many closed contours an ROI has."""
        with decoding("RTSTRUCT", self.where):
            return sum(_is_closed(item) for item in self.items.get(number, ()))

    def contours(self, numbers: Collection[int]) -> list[Contour]:
        """The closed contours of some ROIs.

        Raises:
            DataError: If one has broken points.
        """
        contours = []
        with decoding("RTSTRUCT", self.where):
            for number in numbers:
                for place, item in enumerate(self.items.get(number, ()), 1):
                    where = f"{self.where} ROI {self.names[number]!r} contour {place}"
                    if _is_closed(item) and len(points := _points(item, where)) > 2:
                        images = item.get("ContourImageSequence") or []
                        uids = [str(image.get("ReferencedSOPInstanceUID") or "") for image in images]
                        contours.append(Contour(number, points, tuple(filter(None, uids))))
        return contours


def _is_closed(item: Dataset) -> bool:
    return item.get("ContourGeometricType") in CLOSED


def _points(item: Dataset, where: str) -> Array:
    """The points (N, 3) of a contour, LPS mm."""
    numbers = _numbers(item.get_item("ContourData"), where)
    stated = int(item.get("NumberOfContourPoints") or len(numbers) // 3)
    if len(numbers) != 3 * stated or not (np.abs(numbers) < MAX_COORDINATE_MM).all():
        raise DataError(
            "E-RTSTRUCT-CONTOUR",
            f"{len(numbers)} numbers for {stated} points; expected three finite ones each: export it again",
            where=where,
        )
    return numbers.reshape(-1, 3)


def _numbers(element: Any, where: str) -> Array:
    """Decimal text as floats: straight from the file's bytes, as a contour may hold thousands."""
    value = element.value if element is not None else None
    try:
        if isinstance(value, bytes):
            text = value.rstrip(b"\0 ")
            return np.array(text.split(b"\\") if text else [], dtype=np.float64)
        return np.array([] if value is None else value, dtype=np.float64)
    except ValueError as error:
        raise DataError("E-RTSTRUCT-CONTOUR", "points that are no numbers; export it again", where=where) from error


def _broken(message: str, where: str) -> DataError:
    return DataError("E-RTSTRUCT-FILE", f"{message}; copy or export it again", where=where)
