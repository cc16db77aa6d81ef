"""Frames of DICOM files → voxels, each with its own rescale.

===================== ==================================================================
E-DICOM-TRUNCATED     pixels that end too early
E-DICOM-PIXELS        pixels that cannot be decoded, or are of another size than the header says
W-DICOM-RESCALE       a CT that does not say how its values become Hounsfield units; an intercept without a slope
W-DICOM-HU            a CT with values that no Hounsfield unit has
W-DICOM-INVERTED      MONOCHROME1, where low is bright: turned round
===================== ==================================================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.tag import Tag
from pydicom.uid import UID, RLELossless, SecondaryCaptureImageStorage, generate_uid

from medseg.data.checks import HU_RANGE
from medseg.data.dicom.frame import Frame
from medseg.data.dicom.syntaxes import BY_GDCM, BY_PYDICOM, END_OF_IMAGE
from medseg.data.dicom.values import tolerant, transfer_syntax
from medseg.errors import DataError

Pixels = npt.NDArray[Any]

_FORMAT = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_READ = """
    SamplesPerPixel PhotometricInterpretation NumberOfFrames PixelData ModalityLUTSequence ExtendedOffsetTable
    ExtendedOffsetTableLengths
"""
_TAGS = [Tag(keyword) for keyword in (*_FORMAT, *_READ.split())]
_OPTIONS: dict[str, Any] = {"correct_unused_bits": False}  # pydicom's correction takes no notice of HighBit; ours does
_MAX_PADDING = 16  # some bytes may follow the end of a stream
_INT16 = np.iinfo(np.int16)
_WITH_UNITS = ("CT", "PT", "NM")  # their numbers mean the same however they are displayed


def read_stack(frames: Sequence[Frame]) -> tuple[Pixels, tuple[str, ...]]:
    """The voxels of frames, in their order.

    Args:
        frames: Of one size.

    Returns:
        (K, J, I), as slices, rows and columns: int16 where no value needs more, else float32. And notes, 'W-…'.

    Raises:
        DataError: If a frame cannot be decoded; see the table above.
    """
    columns, rows = frames[0].size
    voxels: Pixels = np.empty((len(frames), rows, columns), np.int16)
    is_inverted = False
    for k, (frame, header, stored) in enumerate(_stored(frames)):
        if header.get("PhotometricInterpretation") == "MONOCHROME1" and frame.modality not in _WITH_UNITS:
            stored, is_inverted = _inverted(stored, header), True
        values = _rescaled(stored, frame.rescale, header)
        if voxels.dtype == np.int16 and not _fits_int16(values):
            voxels = voxels.astype(np.float32)
        voxels[k] = values
    notes = ["W-DICOM-INVERTED MONOCHROME1 turned round, so that high is bright"] if is_inverted else []
    num_without_slope = sum(frame.rescale is not None and frame.rescale[0] is None for frame in frames)
    if num_without_slope:
        notes.append(f"W-DICOM-RESCALE {num_without_slope} slices state an intercept and no slope; it is taken as 1")
    if frames[0].modality == "CT":
        notes += _ct_notes(frames, voxels)
    return voxels, tuple(notes)


def read_frame(frame: Frame) -> Pixels:
    """The stored values of one frame (J, I), before any rescale.

    Raises:
        DataError: If it cannot be decoded.
    """
    return next(_stored([frame]))[2]


def _stored(frames: Sequence[Frame]) -> Iterator[tuple[Frame, Dataset, Pixels]]:
    """Each frame with its file's header; a multi-frame file is read once."""
    path, header = None, Dataset()
    for frame in frames:
        with _refusing(frame), tolerant():
            if frame.path != path:
                path, header = frame.path, pydicom.dcmread(frame.path, force=True, specific_tags=_TAGS)
            stored = _decoded(header, frame)
        yield frame, header, stored


@contextmanager
def _refusing(frame: Frame) -> Iterator[None]:
    """Whatever fails in a decoder becomes an error that names the file."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError("E-FILE", f"cannot be read: {error.strerror}", where=str(frame.path)) from None
    except Exception as error:  # each decoder fails in ways of its own
        raise _damaged(frame, type(error).__name__) from error


def _damaged(frame: Frame, reason: str) -> DataError:
    return DataError(
        "E-DICOM-PIXELS",
        f"pixels of frame {frame.number} cannot be decoded ({reason}); copy the file again from its source",
        where=str(frame.path),
    )


def _decoded(header: Dataset, frame: Frame) -> Pixels:
    """Stored values (J, I), sign and unused bits put right."""
    syntax = transfer_syntax(header)
    if syntax in BY_GDCM or syntax in BY_PYDICOM:
        header.HighBit = header.BitsStored - 1  # a compressed stream has no bits to leave unused
    if syntax in BY_GDCM:
        stored = _by_gdcm(_stream(header, frame), header, syntax)
    else:
        if syntax in BY_PYDICOM and syntax != RLELossless:
            _stream(header, frame)  # its end
        stored = get_decoder(syntax).as_array(header, index=frame.number, raw=True, **_OPTIONS)[0]
    columns, rows = frame.size
    if stored.squeeze().shape != (rows, columns) and stored.size != rows * columns:
        raise _damaged(frame, f"{stored.shape} pixels, not {rows} × {columns}")
    stored = stored.reshape(rows, columns).astype(stored.dtype.newbyteorder("="), copy=False)
    return _used_bits(stored, header)


def _stream(header: Dataset, frame: Frame) -> bytes:
    """The compressed bytes of a frame, which must have an end: decoders fill up what is missing in silence."""
    offsets = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
    stream = get_frame(
        header.PixelData,
        frame.number,
        extended_offsets=offsets if all(offsets) else None,
        number_of_frames=int(header.get("NumberOfFrames") or 1),
    )
    if END_OF_IMAGE not in stream[-_MAX_PADDING:]:
        raise DataError(
            "E-DICOM-TRUNCATED",
            f"the compressed pixels of frame {frame.number} have no end; copy the file again from its source",
            where=str(frame.path),
        )
    return stream


def _by_gdcm(stream: bytes, header: Dataset, syntax: UID) -> Pixels:
    """Decode one frame through SimpleITK, in a file that states no rescale, so that none is applied."""
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    bare.SOPClassUID = SecondaryCaptureImageStorage
    bare.SOPInstanceUID = generate_uid()
    for keyword in _FORMAT:
        setattr(bare, keyword, header[keyword].value)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.PixelData = encapsulate([stream])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frame.dcm"
        pydicom.dcmwrite(file, bare, enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _used_bits(stored: Pixels, header: Dataset) -> Pixels:
    """Values of the stored bits alone: others may hold anything, and the sign stands in the highest stored one."""
    bits, num_all = int(header.BitsStored), 8 * stored.dtype.itemsize
    is_signed = header.PixelRepresentation == 1
    unsigned = stored.view(f"u{stored.dtype.itemsize}")
    if bits < num_all:
        unsigned = unsigned << (num_all - 1 - int(header.HighBit))
    whole = unsigned.view(f"i{stored.dtype.itemsize}") if is_signed else unsigned
    return whole >> (num_all - bits) if bits < num_all else whole


def _inverted(stored: Pixels, header: Dataset) -> Pixels:
    """Low and high exchanged within what the stored bits can say."""
    ends = -1 if header.PixelRepresentation == 1 else 2 ** int(header.BitsStored) - 1
    return ends - stored.astype(np.int64)


def _rescaled(stored: Pixels, rescale: tuple[float | None, float] | None, header: Dataset) -> Pixels:
    """Integers wherever they are exact."""
    if rescale is None and header.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, header)
    slope, intercept = rescale or (1.0, 0.0)
    slope = 1.0 if slope is None else slope
    if (slope, intercept) == (1, 0):
        return stored
    if slope.is_integer() and intercept.is_integer():
        return stored.astype(np.int64) * int(slope) + int(intercept)
    return stored.astype(np.float64) * slope + intercept


def _fits_int16(values: Pixels) -> bool:
    return values.dtype.kind in "iu" and bool(_INT16.min <= values.min() and values.max() <= _INT16.max)


def _ct_notes(frames: Sequence[Frame], voxels: Pixels) -> list[str]:
    notes = []
    num_bare = sum(frame.rescale is None for frame in frames)
    if num_bare:
        notes.append(
            f"W-DICOM-RESCALE {num_bare} slices of a CT state no usable rescale; values taken as Hounsfield units"
        )
    low, high = float(voxels.min()), float(voxels.max())
    if low < HU_RANGE[0] or high > HU_RANGE[1] or low >= 0:
        notes.append(f"W-DICOM-HU values from {low:g} to {high:g} are no Hounsfield units of a body; check the export")
    return notes
