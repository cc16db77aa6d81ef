"""One image of a DICOM series: a file, or a frame of a multi-frame file, as its header tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medseg.errors import DataError

PHASES = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "ImageType",
    "FrameType",
    "ComplexImageComponent",
    "FrameReferenceTime",
    "ConvolutionKernel",
    "KVP",
    "SOPInstanceUID",
)
"""What may tell several images of one position apart, the likeliest first; the last one tells multi-frame files apart."""

TIMES = (
    "FrameAcquisitionDateTime",
    "AcquisitionDateTime",
    "AcquisitionDate",
    "AcquisitionTime",
    "ContentDate",
    "ContentTime",
)
"""When an image was taken, and made up: of phases, the order."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the pixels of a frame lie, in DICOM's LPS mm.

    Args:
        position: Center of the first pixel.
        row: Unit vector along a row, in which the column index grows.
        column: Unit vector along a column.
        spacing_mm: Between pixels along a row, and along a column.
    """

    position: tuple[float, ...]
    row: tuple[float, ...]
    column: tuple[float, ...]
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """One image: a file, or a frame of a multi-frame file.

    Args:
        path: The file.
        number: Index of the frame within it.
        series_uid: Empty where the file names none.
        sop_uid: Of the file; empty where it names none.
        modality: E.g. ``"CT"``.
        frame_of_reference_uid: What positions refer to.
        size: Pixels along a row and along a column.
        place: None if it is not stated, which `problem` then says.
        stack: Which stack of a multi-frame file.
        step_mm: SpacingBetweenSlices, if stated.
        thickness_mm: SliceThickness, if stated.
        rescale: Slope and intercept, if stated; a slope that is missing beside an intercept is None.
        phase: Those of `PHASES` and `TIMES` that are stated, as text.
        shows_text: The file says that the picture itself names the patient.
        problem: Why it cannot be read.
    """

    path: Path
    number: int
    series_uid: str
    sop_uid: str
    modality: str
    frame_of_reference_uid: str | None
    size: tuple[int, int]
    place: Place | None
    stack: str = ""
    step_mm: float | None = None
    thickness_mm: float | None = None
    rescale: tuple[float | None, float] | None = None
    phase: Mapping[str, str] = field(default_factory=dict)
    shows_text: bool = False
    problem: DataError | None = None
