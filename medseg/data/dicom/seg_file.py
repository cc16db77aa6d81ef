"""What a DICOM segmentation (SEG) holds: segments, their frames, and where these lie in the patient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medseg.data.dicom.objects import MAX_COORDINATE_MM, decoding, open_object
from medseg.data.dicom.painting import Mask
from medseg.errors import DataError, WorkflowError
from medseg.labels import SEG_THRESHOLD

if TYPE_CHECKING:
    from pydicom import Dataset

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage."""

_ROUNDING = 1e-6  # of a product of floats, in stored values


@dataclass(frozen=True)
class Plane:
    """Where the pixels of a frame lie in the patient, LPS mm.

    Args:
        position: Of the first pixel.
        steps: From row to row, and from column to column: 6 numbers.
    """

    position: tuple[float, ...]
    steps: tuple[float, ...]


@dataclass(frozen=True)
class SegFrame:
    """What the header says about a frame.

    Args:
        numbers: Segments that it may hold.
        plane: Where it lies; None if the header does not say.
    """

    numbers: tuple[int, ...]
    plane: Plane | None


@dataclass(frozen=True, eq=False)
class Seg:
    """An opened SEG; the pixels are decoded when they are asked for.

    Args:
        path: The file.
        where: Case or file, for messages.
        labels: Of each segment number.
        frames: In the order of the file.
        size: Rows and columns.
        frame_of_reference_uid: What positions refer to.
        background: Stored values of a labelmap that are no segment; None if frames hold one segment each.
        at_least: Stored value from which on a pixel belongs to the segment of its frame.
    """

    path: Path
    where: str
    labels: dict[int, str]
    frames: tuple[SegFrame, ...]
    size: tuple[int, int]
    frame_of_reference_uid: str | None
    background: frozenset[int] | None
    at_least: int

    @classmethod
    def open(cls, path: Path, where: str, threshold: float = SEG_THRESHOLD) -> Seg:
        """Read all but the pixels.

        Args:
            path: The file.
            where: Case or file, for messages.
            threshold: A fractional segment counts where it is at least this.

        Raises:
            DataError: If the file is no SEG, or a damaged one.
            WorkflowError: If the threshold cannot be one.
        """
        if not 0 < threshold <= 1:
            raise WorkflowError("E-ARGUMENT", f"threshold {threshold}; it must be above 0 and at most 1", where=where)
        header = open_object(path, SEG_CLASSES, kind="SEG", where=where)
        with decoding("SEG", where):
            kind = header.get("SegmentationType")
            if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
                raise _broken(f"segmentation type {kind}; known: BINARY, FRACTIONAL, LABELMAP", where)
            background = frozenset({0, int(header.get("PixelPaddingValue", 0))}) if kind == "LABELMAP" else None
            labels = _labels(header, background or frozenset(), where)
            frames = _frames(header, labels, where, is_labelmap=background is not None)
            largest = int(header.get("MaximumFractionalValue", 255)) if kind == "FRACTIONAL" else 1
            return cls(
                path,
                where,
                labels,
                frames,
                (int(header.Rows), int(header.Columns)),
                header.get("FrameOfReferenceUID"),
                background,
                max(1, math.ceil(threshold * largest - _ROUNDING)),
            )

    def pixels(self, indices: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
        """Stored values (rows, columns) of some frames.

        Raises:
            DataError: If they cannot be decoded, or are fewer than the header says.
        """
        if not indices:
            return
        import highdicom as hd  # takes half a second

        with decoding("SEG", self.where):
            image = hd.seg.segread(self.path)
            self._check_length(image)
        for index in indices:
            with decoding("SEG", self.where):
                pixels = image.get_stored_frame(index, as_index=True)
            yield pixels

    def masks(self, index: int, pixels: npt.NDArray[Any]) -> Iterator[tuple[int, Mask]]:
        """The segments in the pixels of a frame.

        Raises:
            DataError: If a labelmap holds values that no segment describes.
        """
        if self.background is None:
            yield self.frames[index].numbers[0], pixels >= self.at_least
            return
        for value in set(np.unique(pixels).tolist()) - self.background:
            if value not in self.labels:
                raise DataError(
                    "E-SEG-VALUES",
                    f"frame {index + 1} holds the value {value}; described are {sorted(self.labels)}: export it again",
                    where=self.where,
                )
            yield value, pixels == value

    def _check_length(self, image: Dataset) -> None:
        if image.file_meta.TransferSyntaxUID.is_encapsulated:
            return  # its decoder finds out
        bits = len(self.frames) * int(image.Rows) * int(image.Columns) * int(image.BitsAllocated)
        if len(image.PixelData) < -(-bits // 8):
            raise DataError(
                "E-SEG-TRUNCATED",
                f"{len(image.PixelData):,} bytes of pixels; expected {-(-bits // 8):,}: copy the file again",
                where=self.where,
            )


def _labels(header: Dataset, background: frozenset[int], where: str) -> dict[int, str]:
    items = header.get("SegmentSequence")
    if not items or not all("SegmentNumber" in item for item in items):
        raise _broken("describes no segments, or one without a number", where)
    labels = {int(item.SegmentNumber): str(item.get("SegmentLabel") or "") for item in items}
    return {number: label or f"segment {number}" for number, label in labels.items() if number not in background}


def _frames(header: Dataset, labels: Mapping[int, str], where: str, *, is_labelmap: bool) -> tuple[SegFrame, ...]:
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = []
    for index, own in enumerate(header.get("PerFrameFunctionalGroupsSequence") or []):
        numbers = tuple(labels)
        if not is_labelmap:
            numbers = tuple(int(n) for n in _stated(own, shared, "SegmentIdentification", "ReferencedSegmentNumber"))
            if len(numbers) != 1 or numbers[0] not in labels:
                raise _broken(f"frame {index + 1} names no segment that is described", where)
        frames.append(SegFrame(numbers, _plane(own, shared)))
    stated = int(header.get("NumberOfFrames", 1))
    if stated != len(frames):
        raise _broken(f"{stated} frames, but places for {len(frames)}", where)
    return tuple(frames)


def _plane(own: Dataset, shared: Dataset | None) -> Plane | None:
    position = _stated(own, shared, "PlanePosition", "ImagePositionPatient")
    turn = _stated(own, shared, "PlaneOrientation", "ImageOrientationPatient")
    spacing = _stated(own, shared, "PixelMeasures", "PixelSpacing")
    if (len(position), len(turn), len(spacing)) != (3, 6, 2):
        return None
    to_row, to_column = (x * spacing[0] for x in turn[3:]), (x * spacing[1] for x in turn[:3])
    return Plane(position, (*to_row, *to_column))


def _stated(own: Dataset, shared: Dataset | None, group: str, keyword: str) -> tuple[float, ...]:
    """Numbers in a functional group of a frame, be it its own or shared by all; none if they cannot be meant."""
    for groups in (own, shared):
        sequence = groups.get(f"{group}Sequence") if groups is not None else None
        value = sequence[0].get(keyword) if sequence else None
        if value is not None:
            numbers = tuple(float(x) for x in np.atleast_1d(value))
            return numbers if all(abs(x) < MAX_COORDINATE_MM for x in numbers) else ()
    return ()


def _broken(message: str, where: str) -> DataError:
    return DataError("E-SEG-FILE", f"{message}; copy or export it again", where=where)
