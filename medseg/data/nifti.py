"""Files ↔ Volume: NIfTI here, others by the module for their kind.

NRRD and MetaImage are read by `itk`, PNG, JPEG and TIFF by `picture`. Beyond what these, `preflight` and
`headers` find, refused (`DataError`, `GeometryError`) or mended (a warning on the logger ``medseg``):

===================== ==================================================================
E-SUFFIX              a kind of file that is not read, or not written
E-SELECT-VOLUME       the file has no such volume
E-NOT-FINITE          more than `MAX_BAD_SHARE` of the voxels are NaN or infinite
E-LABEL-CHANNELS      a label map with several channels
E-LABEL-VALUES        label values that are no integers
E-LABEL-UNDECLARED    label values that the data set does not declare
E-PAIR-SHAPE          image and label of different shapes
E-PAIR-AFFINE         image and label of one shape, at different places
E-CONSTANT            an image that shows nothing
W-NOT-FINITE          a few voxels NaN or infinite, set to the lowest value of their channel
===================== ==================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from medseg.data.headers import NiftiHeader, corner_distance_mm
from medseg.data.preflight import read_nifti, read_nifti_header
from medseg.errors import DataError, GeometryError
from medseg.files import write_atomically
from medseg.geometry import AFFINE_TOLERANCE, Geometry, Volume
from medseg.labels import Labels

Voxels = npt.NDArray[Any]

NIFTI_SUFFIXES = (".nii.gz", ".nii")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha", ".mhd")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
READABLE_SUFFIXES = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES)
WRITABLE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha", ".png")

MAX_BAD_SHARE = 1e-3
"""Share of NaN or infinite voxels that is mended; more means that the scan itself is broken."""

LABEL_TOLERANCE = 1e-4
"""Distance from an integer that floating-point label maps may have."""

_SLAB_BYTES = 2**23  # brought to file order and compressed at once
_GZIP_WINDOW = 31  # zlib's way to ask for a gzip header and checksum
_LABEL_TYPES = (np.uint8, np.int16, np.int32)  # the integers that torch can compute with, smallest first


def read_volume(
    path: Path, *, select_volume: int | None = None, assume_spacing_mm: Sequence[float] | None = None
) -> Volume:
    """Read an image.

    Args:
        path: A file with one of `READABLE_SUFFIXES`.
        select_volume: Which volume of a 4D file, from 0; None: all of them, as channels.
        assume_spacing_mm: Voxel size for a file that states none.

    Returns:
        The voxels (C, I, J, K), or (C, I, J) of a picture, in the file's own axis order, with slope and
        intercept applied; of the file's own type where there is none.

    Raises:
        DataError: If the file cannot be trusted; see the tables of `preflight`, `headers` and this module.
    """
    volume = _read(path, assume_spacing_mm)
    array = volume.array
    if select_volume is not None:
        if not 0 <= select_volume < len(array):
            raise DataError("E-SELECT-VOLUME", f"has volumes 0-{len(array) - 1}, not {select_volume}", where=str(path))
        array = array[select_volume : select_volume + 1]
    return Volume(_fill_bad_voxels(array, str(path)), volume.geometry)


def read_label(path: Path, *, assume_spacing_mm: Sequence[float] | None = None) -> Volume:
    """Read a label map.

    Args:
        path: A file with one of `READABLE_SUFFIXES`; its values may be stored as floats.
        assume_spacing_mm: Voxel size for a file that states none.

    Returns:
        Label values (1, I, J, K), or (1, I, J) of a picture, in the smallest of uint8, int16 and int32
        that holds them.

    Raises:
        DataError: If the file cannot be trusted, has several channels, or holds values that are no integers.
    """
    volume = _read(path, assume_spacing_mm, is_label=True)
    if len(volume.array) != 1:
        raise DataError(
            "E-LABEL-CHANNELS",
            f"{len(volume.array)} channels; expected one label map. Where organs overlap, give a file for each",
            where=str(path),
        )
    return Volume(_as_integers(volume.array, str(path)), volume.geometry)


def read_geometry(path: Path, *, assume_spacing_mm: Sequence[float] | None = None) -> Geometry:
    """The grid of a file, from its header alone.

    Raises:
        DataError: As `read_volume`, for what a header can tell.
    """
    suffix = _suffix(path)
    if suffix in NIFTI_SUFFIXES:
        return read_nifti_header(path, assume_spacing_mm=assume_spacing_mm).geometry
    if suffix in PICTURE_SUFFIXES:
        from medseg.data.picture import read_picture_geometry

        return read_picture_geometry(path, spacing_mm=assume_spacing_mm)
    from medseg.data.itk import read_itk_geometry

    return read_itk_geometry(path)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume; only a complete file is ever visible.

    One channel becomes a 3D (or 2D) file, several a 4D NIfTI or a vector NRRD or MetaImage. Booleans
    become uint8 and float16 becomes float32, for these formats know neither. NIfTI keeps the affine
    in float32, about 7 digits; PNG, which takes pictures alone, keeps none.

    Args:
        path: Name with one of `WRITABLE_SUFFIXES`, in a folder that exists.
        volume: Voxels (C, I, J, K) of any other numeric type.

    Raises:
        DataError: If the suffix is none of these, or a PNG cannot hold the volume.
    """
    stored = {np.dtype(np.bool_): np.uint8, np.dtype(np.float16): np.float32}.get(volume.array.dtype)
    if stored:
        volume = Volume(volume.array.astype(stored), volume.geometry)
    suffix = _suffix(path, WRITABLE_SUFFIXES)
    if suffix == ".nii.gz":
        write_atomically(path, b"".join(_compressed(_nifti_bytes(volume))))
    elif suffix == ".nii":
        write_atomically(path, b"".join(_nifti_bytes(volume)))
    elif suffix in PICTURE_SUFFIXES:
        from medseg.data.picture import write_picture

        write_picture(path, volume)
    else:
        from medseg.data.itk import write_itk

        write_itk(path, volume)


def _suffix(path: Path, known: Sequence[str] = READABLE_SUFFIXES) -> str:
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError("E-SUFFIX", f"unknown kind of file {path.suffix!r}; known: {', '.join(known)}", where=str(path))


def check_pair(image: Volume, label: Volume, where: str) -> None:
    """Refuse an image and a label (or two channels) that do not stand on the same grid.

    Args:
        image: The one that counts.
        label: The one compared with it.
        where: Case or file, for the message.

    Raises:
        GeometryError: If shapes differ, or the affines by more than `AFFINE_TOLERANCE`.
    """
    grid, other = image.geometry, label.geometry
    if grid.shape != other.shape:
        raise GeometryError(
            "E-PAIR-SHAPE",
            f"image {grid.shape} but label {other.shape} voxels; give the label of this image, "
            "or resample it to its grid",
            where=where,
        )
    if not grid.matches(other):
        distance = corner_distance_mm(grid.shape, grid.affine, other.affine)
        raise GeometryError(
            "E-PAIR-AFFINE",
            f"image and label lie up to {distance:.3g} mm apart (image {grid.orientation}, label {other.orientation}); "
            "give the label of this image, or resample it to its grid",
            where=where,
        )


def check_not_constant(image: Volume, where: str) -> None:
    """Refuse an image with a channel that shows nothing.

    Raises:
        DataError: If all voxels of a channel are equal.
    """
    for number, channel in enumerate(image.array):
        if channel.min() == channel.max():
            raise DataError(
                "E-CONSTANT",
                f"every voxel of channel {number} is {channel.flat[0]:g}; export the scan again or remove the case",
                where=where,
            )


def check_label_values(label: Voxels, labels: Labels, where: str | None = None) -> None:
    """Refuse label values that the data set does not declare.

    Args:
        label: Integer label map of any shape.
        labels: What is declared.
        where: Case or file, for the message.

    Raises:
        DataError: If there are others.
    """
    declared = {*labels.names} | ({labels.ignore_label} if labels.ignore_label is not None else set())
    undeclared = sorted({int(value) for value in np.unique(label)} - declared)
    if undeclared:
        raise DataError(
            "E-LABEL-UNDECLARED",
            f"holds label {', '.join(map(str, undeclared))}, but declared are {', '.join(map(str, sorted(declared)))}; "
            "add them to the manifest's labels, or set ignore_label",
            where=where,
        )


def _read(path: Path, assume_spacing_mm: Sequence[float] | None, *, is_label: bool = False) -> Volume:
    suffix = _suffix(path)
    if suffix in NIFTI_SUFFIXES:
        header, content = read_nifti(path, assume_spacing_mm=assume_spacing_mm)
        return Volume(_nifti_voxels(header, content), header.geometry)
    if suffix in PICTURE_SUFFIXES:
        from medseg.data.picture import read_mask, read_picture

        return (read_mask if is_label else read_picture)(path, spacing_mm=assume_spacing_mm)
    from medseg.data.itk import read_itk  # SimpleITK takes a while to import, and few files need it

    return read_itk(path)


def _nifti_voxels(header: NiftiHeader, content: npt.NDArray[np.uint8]) -> Voxels:
    array = content.view(header.dtype).reshape((*header.shape, header.channels), order="F")  # (I, J, K, C)
    array = np.moveaxis(array, -1, 0).astype(header.dtype.newbyteorder("="), copy=False)  # (C, I, J, K)
    if header.scaling is None:
        return array
    slope, inter = header.scaling
    array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    array *= slope
    array += inter
    return array


def _fill_bad_voxels(array: Voxels, where: str) -> Voxels:
    """Replace the few NaN and infinite voxels that resampling at a border leaves; refuse more."""
    if array.dtype.kind != "f" or np.isfinite([array.min(), array.max()]).all():  # both pass NaN on
        return array
    good = np.isfinite(array)
    num_bad = int(array.size - good.sum())
    if num_bad > MAX_BAD_SHARE * array.size:
        raise DataError(
            "E-NOT-FINITE",
            f"{num_bad:,} of {array.size:,} voxels are NaN or infinite, more than {MAX_BAD_SHARE:.1%}; "
            "export the scan again",
            where=where,
        )
    lows = [np.min(channel, where=usable, initial=np.inf) for channel, usable in zip(array, good, strict=True)]
    logging.getLogger("medseg").warning(
        "W-NOT-FINITE %s: %d voxels are NaN or infinite; set to the lowest value", where, num_bad
    )
    return np.where(good, array, np.reshape(lows, (-1, *[1] * (array.ndim - 1))).astype(array.dtype))


def _as_integers(array: Voxels, where: str) -> Voxels:
    """Label values in the smallest integer type; rounded if they are all but integers."""
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        wrong = ~(np.abs(array - rounded) <= LABEL_TOLERANCE) | ~np.isfinite(array)
        if wrong.any():
            examples = ", ".join(f"{value:g}" for value in np.unique(array[wrong])[:5])
            raise DataError(
                "E-LABEL-VALUES",
                f"{int(wrong.sum()):,} voxels are no integers, e.g. {examples}; a probability map, or one "
                "resampled without 'nearest'? Give the label map itself",
                where=where,
            )
        array, low, high = rounded, rounded.min(), rounded.max()
    for dtype in _LABEL_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype, copy=False)
    raise DataError("E-LABEL-VALUES", f"values reach from {low} to {high}; expected small integers", where=where)


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
