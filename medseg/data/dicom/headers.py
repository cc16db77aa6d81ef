"""One DICOM file → the frames of image it holds, from its header alone.

===================== ==================================================================
E-DICOM-TRUNCATED     fewer bytes of pixels than the header promises, or none
E-DICOM-COLOR         colors instead of one number a voxel
E-DICOM-COMPRESSION   a transfer syntax that nothing here decodes
E-DICOM-MOSAIC        many slices tiled into one picture, so that its position is no slice's
E-DICOM-GEOMETRY      nothing says where the pixels lie
===================== ==================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from medseg.data.dicom.frame import PHASES, TIMES, Frame, Place
from medseg.data.dicom.syntaxes import can_decode, missing_pixels
from medseg.data.dicom.values import number_of, numbers_of, text_of, tolerant, transfer_syntax
from medseg.errors import DataError

_SIEMENS_BLOCK = Tag(0x00190010)  # who owns the private elements
_NUM_TILES = Tag(0x0019100A)
_READ = """
    ImageType SOPClassUID SOPInstanceUID Modality SeriesInstanceUID FrameOfReferenceUID Rows Columns NumberOfFrames
    ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices RescaleSlope
    RescaleIntercept SamplesPerPixel PhotometricInterpretation BitsAllocated BurnedInAnnotation
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""
_TAGS = [*(Tag(keyword) for keyword in (*_READ.split(), *PHASES, *TIMES)), _SIEMENS_BLOCK, _NUM_TILES]

_OWN = (*PHASES[:-1], *TIMES)  # of each frame: one uid a file tells files apart, and single images need no telling

_NOT_SCANS = {"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "RWV"}
_NOT_SCAN_CLASSES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{kind}"
    for kind in ("66", "30", "481.2")  # raw data, registrations and segmentations; parametric maps; doses
)
_GRAY = ("MONOCHROME1", "MONOCHROME2")

_AXIS_TOLERANCE = 0.01
"""How far the stated directions may be from unit length and from a right angle: they are rounded text."""


def is_dicom_file(path: Path) -> bool:
    """Whether a file begins as DICOM does, with its preamble or without."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return _begins_as_dicom(file)
    except OSError:
        return False


def read_frames(path: Path) -> tuple[Frame, ...] | str:
    """The frames of a file, or the reason why it has none.

    Args:
        path: Any file.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return "no file: a broken or looping link, a pipe"
        with path.open("rb") as file:
            if not _begins_as_dicom(file):
                return "not DICOM"
            with tolerant():
                return _read(file, path)
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"
    except Exception as error:  # damaged bytes fail anywhere in the parser; its message may quote a patient's name
        return f"damaged DICOM ({type(error).__name__})"


def _begins_as_dicom(file: BinaryIO) -> bool:
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM":
        return True
    for order in ("<u2", ">u2"):  # without the preamble: a first element of group 2 or 8
        group, element = np.frombuffer(head[:4].ljust(4, b"\xff"), order)
        if group in (2, 8) and element <= 0x18 and len(head) == 132:
            return True
    return False


def _read(file: BinaryIO, path: Path) -> tuple[Frame, ...] | str:
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
    reason = _no_scan(header, path)
    if reason:
        return reason
    problem = _pixel_problem(header, file, path)
    if "PerFrameFunctionalGroupsSequence" in header:
        frames = tuple(_enhanced_frames(header, path, problem))
        return frames or "localizer"
    return (_single_frame(header, path, problem),)


def _no_scan(header: Dataset, path: Path) -> str | None:
    sop_class = UID(text_of(header, "SOPClassUID"))
    modality = text_of(header, "Modality")
    media = str(header.file_meta.get("MediaStorageSOPClassUID") or "")
    if path.name.upper() == "DICOMDIR" or media == MediaStorageDirectoryStorage:
        return "DICOMDIR, an index: files are found without it"
    kind = modality if sop_class.name == sop_class else sop_class.name  # a class too new for pydicom has no name
    if modality in _NOT_SCANS or sop_class.startswith(_NOT_SCAN_CLASSES):
        return f"no scan: {kind}"
    if not number_of(header, "Rows") or not number_of(header, "Columns"):
        return f"no image: {kind}" if kind else "no image in it"
    if "LOCALIZER" in text_of(header, "ImageType"):
        return "localizer"
    return None


def _pixel_problem(header: Dataset, file: BinaryIO, path: Path) -> DataError | None:
    where, syntax = str(path), transfer_syntax(header)
    missing = None if syntax == DeflatedExplicitVRLittleEndian else missing_pixels(header, file)
    if missing:
        return DataError("E-DICOM-TRUNCATED", f"{missing}; copy the file again from its source", where=where)
    if not _is_gray(header):
        return DataError(
            "E-DICOM-COLOR",
            f"colors ({_color(header)}); expected one gray value a voxel: give the original scan",
            where=where,
        )
    if not can_decode(syntax):
        return DataError(
            "E-DICOM-COMPRESSION",
            f"transfer syntax {syntax} ({syntax.name}), which cannot be decoded; export the series uncompressed",
            where=where,
        )
    if _is_mosaic(header):
        return DataError(
            "E-DICOM-MOSAIC",
            "a mosaic, all slices of a volume tiled into one picture; convert it, e.g. with dcm2niix",
            where=where,
        )
    return None


def _is_gray(header: Dataset) -> bool:
    if (number_of(header, "SamplesPerPixel") or 1) != 1 or text_of(header, "PhotometricInterpretation") not in (
        *_GRAY,
        "",
    ):
        return False
    types = [
        next(iter(group.get(f"{kind}ImageFrameTypeSequence") or []), Dataset())
        for group in header.get("SharedFunctionalGroupsSequence") or []
        for kind in ("CT", "MR")
    ]
    return not any(text_of(item, "PixelPresentation") == "COLOR" for item in types)


def _color(header: Dataset) -> str:
    """Where the colors come from."""
    num_samples, kind = int(number_of(header, "SamplesPerPixel") or 1), text_of(header, "PhotometricInterpretation")
    if kind not in (*_GRAY, ""):
        return kind
    return "a supplemental palette" if num_samples == 1 else f"{num_samples} samples a pixel"


def _is_mosaic(header: Dataset) -> bool:
    if "MOSAIC" in text_of(header, "ImageType"):
        return True
    is_siemens = _SIEMENS_BLOCK in header and "SIEMENS MR HEADER" in str(header[_SIEMENS_BLOCK].value)
    return is_siemens and _NUM_TILES in header and str(header[_NUM_TILES].value) not in ("", "0", "1")


def _single_frame(header: Dataset, path: Path, problem: DataError | None) -> Frame:
    has_one = (number_of(header, "NumberOfFrames") or 1) == 1  # one position cannot be that of several
    place = _place(header, header, header) if has_one and not _is_mosaic(header) else None
    phase = {key: value for key in _OWN if (value := text_of(header, key))}
    return _frame(header, path, place=place, measures=header, values=header, phase=phase, problem=problem)


def _enhanced_frames(header: Dataset, path: Path, problem: DataError | None) -> Iterator[Frame]:
    """Frames of a file with functional groups: what a frame's own do not say, the shared group says for all."""
    groups: Sequence[Dataset] = header.PerFrameFunctionalGroupsSequence
    shared = next(iter(header.get("SharedFunctionalGroupsSequence") or []), Dataset())
    num_frames = int(number_of(header, "NumberOfFrames") or 1)
    if num_frames != len(groups):
        problem = problem or DataError(
            "E-DICOM-GEOMETRY", f"{num_frames} frames, but groups for {len(groups)}; export it again", where=str(path)
        )
    of_file = {key: value for key in ("AcquisitionNumber", "SOPInstanceUID") if (value := text_of(header, key))}
    for number, group in enumerate(groups[:num_frames]):
        found = _functional_groups(shared) | _functional_groups(group)
        phase = of_file | {key: value for item in found.values() for key in _OWN if (value := text_of(item, key))}
        if "LOCALIZER" in phase.get("FrameType", ""):
            continue
        position, axes, measures, values, content = (
            found.get(f"{name}Sequence", Dataset())
            for name in (
                "PlanePosition",
                "PlaneOrientation",
                "PixelMeasures",
                "PixelValueTransformation",
                "FrameContent",
            )
        )
        yield _frame(
            header,
            path,
            number=number,
            place=_place(position, axes, measures),
            measures=measures,
            values=values,
            phase=phase,
            stack=text_of(content, "StackID"),
            problem=problem,
        )


def _functional_groups(group: Dataset) -> dict[str, Dataset]:
    """The first item of each group; of diffusion, the direction within it too."""
    found = {part.keyword: part.value[0] for part in group if part.VR == "SQ" and part.value}
    directions = found.get("MRDiffusionSequence", Dataset()).get("DiffusionGradientDirectionSequence")
    return found | ({"DiffusionGradientDirectionSequence": directions[0]} if directions else {})


def _frame(
    header: Dataset,
    path: Path,
    *,
    place: Place | None,
    measures: Dataset,
    values: Dataset,
    phase: Mapping[str, str],
    problem: DataError | None,
    number: int = 0,
    stack: str = "",
) -> Frame:
    if place is None:
        problem = problem or DataError(
            "E-DICOM-GEOMETRY",
            "no usable ImagePositionPatient, ImageOrientationPatient and PixelSpacing: where the pixels lie is unknown; "
            "export the original series",
            where=str(path),
        )
    return Frame(
        path,
        number,
        series_uid=text_of(header, "SeriesInstanceUID"),
        sop_uid=text_of(header, "SOPInstanceUID"),
        modality=text_of(header, "Modality"),
        frame_of_reference_uid=text_of(header, "FrameOfReferenceUID") or None,
        size=(int(header.Columns), int(header.Rows)),
        place=place,
        stack=stack,
        step_mm=number_of(measures, "SpacingBetweenSlices") or None,
        thickness_mm=number_of(measures, "SliceThickness") or None,
        rescale=_rescale(values),
        phase=phase,
        shows_text=text_of(header, "BurnedInAnnotation") == "YES",
        problem=problem,
    )


def _rescale(values: Dataset) -> tuple[float | None, float] | None:
    slope, intercept = number_of(values, "RescaleSlope"), number_of(values, "RescaleIntercept")
    if slope == 0 or (slope is None and intercept is None):  # a slope of 0 would make every voxel equal
        return None
    return slope, intercept or 0.0


def _place(position: Dataset, axes: Dataset, measures: Dataset) -> Place | None:
    origin, spacing = numbers_of(position, "ImagePositionPatient", 3), numbers_of(measures, "PixelSpacing", 2)
    directions = numbers_of(axes, "ImageOrientationPatient", 6)
    if origin is None or spacing is None or directions is None or min(spacing) <= 0:
        return None
    row, column = np.array(directions[:3]), np.array(directions[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > _AXIS_TOLERANCE or abs(row @ column) > _AXIS_TOLERANCE:
        return None
    between_rows, between_columns = spacing  # in DICOM's order
    return Place(
        origin,
        tuple((row / lengths[0]).tolist()),
        tuple((column / lengths[1]).tolist()),
        (between_columns, between_rows),
    )
