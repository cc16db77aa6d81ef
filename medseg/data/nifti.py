"""NIfTI files ↔ Volume, behind the checks of `preflight` and `headers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from medseg.data.headers import NiftiHeader
from medseg.data.preflight import read_nifti
from medseg.files import write_atomically
from medseg.geometry import AFFINE_TOLERANCE, Volume

_SLAB_BYTES = 2**23  # brought to file order and compressed at once
_GZIP_WINDOW = 31  # zlib's way to ask for a gzip header and checksum


def read_nifti_volume(path: Path, *, assume_spacing_mm: Sequence[float] | None = None) -> Volume:
    """The voxels (C, I, J, K) of a file in its own axis order, slope and intercept applied.

    Args:
        path: A .nii or .nii.gz file.
        assume_spacing_mm: Voxel size for a file that states none.

    Raises:
        DataError: See the tables of `preflight` and `headers`.
    """
    header, content = read_nifti(path, assume_spacing_mm=assume_spacing_mm)
    return Volume(_voxels(header, content), header.geometry)


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a volume; compressed if the name ends in .gz. Only a complete file is ever visible."""
    pieces = _nifti_bytes(volume)
    write_atomically(path, _compressed(pieces) if path.name.lower().endswith(".gz") else pieces)


def _voxels(header: NiftiHeader, content: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    array = content.view(header.dtype).reshape((*header.shape, header.channels), order="F")  # (I, J, K, C)
    array = np.moveaxis(array, -1, 0).astype(header.dtype.newbyteorder("="), copy=False)  # (C, I, J, K)
    if header.scaling is None:
        return array
    slope, inter = header.scaling
    array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    array *= slope
    array += inter
    return array


def _nifti_bytes(volume: Volume) -> Iterator[bytes]:
    """Header, then voxels in file order, slab by slab so that no second volume stands in memory."""
    num_channels, *shape = volume.array.shape
    header = nib.Nifti1Header()
    header.set_data_dtype(volume.array.dtype.newbyteorder("<"))
    header.set_data_shape(shape if num_channels == 1 else (*shape, *[1] * (3 - len(shape)), num_channels))
    affine = volume.geometry.affine
    header.set_qform(affine, code="scanner")  # sets the voxel size too
    header.set_sform(affine, code="scanner")
    if np.abs(header.get_qform() - affine).max() > AFFINE_TOLERANCE:  # a quaternion cannot say shear
        header["qform_code"] = 0
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = b"n+1"
    yield header.binaryblock + bytes(4)  # no extensions
    for channel in volume.array:
        planes = max(1, _SLAB_BYTES * channel.shape[-1] // max(1, channel.nbytes))
        for start in range(0, channel.shape[-1], planes):
            yield channel[..., start : start + planes].astype(header.get_data_dtype(), copy=False).tobytes(order="F")


def _compressed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    stream = isal_zlib.compressobj(level=1, wbits=_GZIP_WINDOW)
    for piece in pieces:
        yield stream.compress(piece)
    yield stream.flush()
