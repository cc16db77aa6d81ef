"""NRRD and MetaImage files ↔ Volume, through SimpleITK.

===================== ==================================================================
E-UNREADABLE          damaged, truncated or something else than its name says
E-DTYPE               complex voxels
===================== ==================================================================
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk
from isal import isal_zlib

from medseg.data.headers import check_geometry, check_size
from medseg.data.preflight import open_checked
from medseg.errors import DataError, GeometryError
from medseg.files import temporary_path
from medseg.geometry import Geometry, Volume

_CHUNK = 2**20
_DAMAGED: tuple[Any, ...] = (isal_zlib.error,)


def read_itk(path: Path) -> Volume:
    """The voxels (C, I, J, K) of a file, in its own axis order and type.

    Raises:
        DataError: See the table above and those of `headers`.
    """
    reader = _reader(path)
    geometry = _geometry(reader, str(path))
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_compressed(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    array = sitk.GetArrayViewFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:  # (K, J, I, C)
        array = array.transpose()  # (C, I, J, K)
    elif image.GetDimension() > geometry.spatial_dims:  # (C, K, J, I)
        array = np.moveaxis(array.transpose(), -1, 0)  # (C, I, J, K)
    else:
        array = array.transpose()[None]  # (1, I, J, K)
    return Volume(array.copy(order="A"), geometry)  # the view dies with ITK's image


def read_itk_geometry(path: Path) -> Geometry:
    """The grid of a file, from its header alone.

    Raises:
        DataError: See the table above and those of `headers`.
    """
    return _geometry(_reader(path), str(path))


def write_itk(path: Path, volume: Volume) -> None:
    """Write a volume, compressed; only a complete file is ever visible."""
    num_channels = len(volume.array)
    array = np.moveaxis(volume.array, 0, -1) if num_channels > 1 else volume.array[0]  # (I, J, K[, C])
    order = (*reversed(range(volume.geometry.spatial_dims)), *([array.ndim - 1] if num_channels > 1 else []))
    image = sitk.GetImageFromArray(array.transpose(order), isVector=num_channels > 1)  # (K, J, I[, C])
    origin, spacing, direction = volume.geometry.lps()
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    folder = temporary_path(path)  # ITK goes by the suffix, so the name within is the real one
    try:
        folder.mkdir()
        sitk.WriteImage(image, str(folder / path.name), useCompression=True)
        with (folder / path.name).open("rb") as written:
            os.fsync(written.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reader(path: Path) -> sitk.ImageFileReader:
    """A reader whose header is read."""
    open_checked(path).close()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()):
        raise DataError("E-DTYPE", "voxels are complex; expected plain numbers: convert them", where=str(path))
    return reader


def _geometry(reader: sitk.ImageFileReader, where: str) -> Geometry:
    size = reader.GetSize()
    check_size(8 * math.prod(size) * reader.GetNumberOfComponents(), size, where)  # 8: no voxel is larger
    num_axes = len(size)
    if num_axes > 4:
        raise DataError("E-DIMS", f"shape {size}: expected space and one axis of channels; split the file", where=where)
    n = min(num_axes, 3)
    try:
        stated = Geometry.from_lps(
            size[:n],
            origin=reader.GetOrigin()[:n],
            spacing=reader.GetSpacing()[:n],
            direction=np.reshape(reader.GetDirection(), (num_axes, num_axes))[:n, :n].ravel().tolist(),
        )
    except GeometryError as error:
        raise GeometryError(error.error_id, error.message, where=where) from None
    return check_geometry(stated.shape, stated.affine, where)


def _check_compressed(path: Path) -> None:
    """Refuse damaged voxels of a MetaImage, which ITK would fill with noise and say nothing."""
    with path.open("rb") as file:
        header = {}
        for line in iter(file.readline, b""):
            key, _, value = line.decode("latin-1").partition("=")
            header[key.strip().lower()] = value.strip()
            if key.strip().lower() == "elementdatafile":
                break
        if header.get("compresseddata", "").lower() != "true":
            return
        stored = header.get("elementdatafile", "")
        if stored.upper() == "LOCAL":
            _inflate(file, path)
            return
    if (path.parent / stored).is_file():  # a missing one, or a list of files, is ITK's to judge
        with (path.parent / stored).open("rb") as file:
            _inflate(file, path)


def _inflate(file: BinaryIO, path: Path) -> None:
    """Decompress to the end, where the checksum is, and keep nothing."""
    stream = isal_zlib.decompressobj()
    try:
        while chunk := file.read(_CHUNK):
            stream.decompress(chunk)
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
    if not stream.eof:
        raise _unreadable(path, "its compressed voxels end too early")


def _unreadable(path: Path, error: Exception | str) -> DataError:
    reason = str(error).strip().splitlines()[-1]
    return DataError(
        "E-UNREADABLE", f"is not a whole {path.suffix} file ({reason}); copy it again from its source", where=str(path)
    )
