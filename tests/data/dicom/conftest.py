"""DICOM files made for tests, as real as scanners write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SERIES, FRAME = "1.2.826.0.1.1", "1.2.826.0.1.2"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def make_slice(z: float = 0.0, pixels: np.ndarray | None = None, *, modality: str = "MR", **elements: Any) -> Dataset:
    """An axial image at z; `elements` replace what it says, None leaves an element out."""
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4) + int(z) if pixels is None else pixels
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.PatientName, file.PatientID, file.PatientBirthDate = "Secret^Name", "PID-4711", "19010203"
    file.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    file.SOPInstanceUID = generate_uid()
    file.Modality, file.SeriesInstanceUID, file.FrameOfReferenceUID = modality, SERIES, FRAME
    file.ImagePositionPatient, file.ImageOrientationPatient = [-10.0, -20.0, z], list(AXIAL)
    file.PixelSpacing, file.SliceThickness = [0.5, 0.75], 2.0
    file.Rows, file.Columns = stored.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 8 * stored.dtype.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(stored.dtype.kind == "i")
    if modality == "CT":
        file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    for keyword, value in elements.items():
        if value is None:
            delattr(file, keyword)
        else:
            setattr(file, keyword, value)
    return file


def make_enhanced(pixels: np.ndarray, groups: list[dict[str, dict[str, Any]]], **elements: Any) -> Dataset:
    """One file of many frames: pixels (K, J, I), and for each frame what its groups say."""
    file = make_slice(0, pixels[0], **{"ImagePositionPatient": None, "ImageOrientationPatient": None, **elements})
    del file.PixelSpacing, file.SliceThickness
    file.NumberOfFrames, file.PixelData = len(pixels), pixels.tobytes()
    shared = {
        "PlaneOrientationSequence": {"ImageOrientationPatient": list(AXIAL)},
        "PixelMeasuresSequence": {"PixelSpacing": [0.5, 0.75], "SliceThickness": 9.0},
    }
    file.SharedFunctionalGroupsSequence = [_group(shared)]
    file.PerFrameFunctionalGroupsSequence = [_group(group) for group in groups]
    return file


def save(file: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path


@pytest.fixture
def write_slice(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``make_slice(z, …)`` to a name below `tmp_path`."""

    def write(name: str, z: float = 0.0, pixels: np.ndarray | None = None, **elements: Any) -> Path:
        return save(make_slice(z, pixels, **elements), tmp_path / name)

    return write


@pytest.fixture
def write_enhanced(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``make_enhanced(…)`` to a name below `tmp_path`."""

    def write(name: str, pixels: np.ndarray, groups: list[dict[str, dict[str, Any]]], **elements: Any) -> Path:
        return save(make_enhanced(pixels, groups, **elements), tmp_path / name)

    return write


def _group(parts: dict[str, dict[str, Any]]) -> Dataset:
    group = Dataset()
    for keyword, values in parts.items():
        item = Dataset()
        for key, value in values.items():
            setattr(item, key, value)
        setattr(group, keyword, [item])
    return group
