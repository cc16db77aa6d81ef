"""Any file or folder that holds a scan or a label map ↔ Volume, by the module for its kind.

NIfTI by `nifti`, NRRD and MetaImage by `itk`, PNG, JPEG and TIFF by `picture`, DICOM by `dicom`. Beyond
what these find, refused (`DataError`) or mended (a warning on the logger ``medseg``):

===================== ==================================================================
E-SUFFIX              a kind of file that is not read, or not written
E-MISSING-FILE        no such file or folder
E-DICOM-NO-SERIES     a folder without DICOM
E-SELECT-VOLUME       the file has no such volume
E-NOT-FINITE          more than `MAX_BAD_SHARE` of the voxels are NaN or infinite
E-LABEL-CHANNELS      a label map with several channels
E-LABEL-VALUES        label values that are no integers
E-LABEL-IMAGE         a label drawn on a DICOM series, or a folder of masks, and no such series beside it
W-NOT-FINITE          a few voxels NaN or infinite, set to the lowest value of their channel
===================== ==================================================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.nifti import read_nifti_volume, write_nifti
from medseg.data.preflight import read_nifti_header
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
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

LABEL_TYPES = (np.uint8, np.int16, np.int32)
"""The integers that torch can compute with, smallest first."""

# SimpleITK and pydicom take a while to import, and few commands need them: their modules are imported where used.


def read_volume(
    path: Path,
    *,
    select_volume: int | None = None,
    assume_spacing_mm: Sequence[float] | None = None,
    allow_missing_slices: bool = False,
) -> Volume:
    """Read an image.

    Args:
        path: A file with one of `READABLE_SUFFIXES`; or DICOM: a folder with one series, ``folder#uid`` for one
            of several, or a file.
        select_volume: Which volume of a 4D file, from 0; None: all of them, as channels.
        assume_spacing_mm: Voxel size for a file that states none.
        allow_missing_slices: Whether slices that a DICOM series lacks are interpolated.

    Returns:
        The voxels (C, I, J, K), or (C, I, J) of a picture, in the file's own axis order, with slope and
        intercept applied; of the file's own type where there is none.

    Raises:
        DataError: If the file cannot be trusted; see the tables of this module and of the one for its kind.
    """
    volume = _read(path, assume_spacing_mm, allow_missing_slices=allow_missing_slices)
    array = volume.array
    if select_volume is not None:
        if not 0 <= select_volume < len(array):
            raise DataError("E-SELECT-VOLUME", f"has volumes 0-{len(array) - 1}, not {select_volume}", where=str(path))
        array = array[select_volume : select_volume + 1]
    return replace(volume, array=_fill_bad_voxels(array, str(path)))


def read_label(
    path: Path,
    *,
    image: Path | None = None,
    labels: Labels | None = None,
    assume_spacing_mm: Sequence[float] | None = None,
) -> Volume:
    """Read a label map.

    Args:
        path: A file with one of `READABLE_SUFFIXES`, whose values may be stored as floats; or what is drawn
            on a DICOM series: a SEG, an RTSTRUCT, or a folder of pictures, one a slice.
        image: The scan it belongs to, for what is drawn on a series.
        labels: Says which value each structure of a SEG or an RTSTRUCT gets; None: its number.
        assume_spacing_mm: Voxel size for a file that states none.

    Returns:
        Label values (1, I, J, K), or (1, I, J) of a picture, in the smallest of `LABEL_TYPES` that holds
        them.

    Raises:
        DataError: If the file cannot be trusted, has several channels, or holds values that are no integers.
    """
    if is_drawn(path):
        from medseg.data.dicom.drawn import read_drawn

        if image is None:
            raise DataError("E-LABEL-IMAGE", "is drawn on a series; name that series too (--image)", where=str(path))
        return read_drawn(path, image, read_geometry(image), labels=labels)
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
    if is_series(path):
        from medseg.data.dicom.folder import find_one

        return find_one(path).geometry
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
    if suffix in NIFTI_SUFFIXES:
        write_nifti(path, volume)
    elif suffix in PICTURE_SUFFIXES:
        from medseg.data.picture import write_picture

        write_picture(path, volume)
    else:
        from medseg.data.itk import write_itk

        write_itk(path, volume)


def is_series(path: Path) -> bool:
    """Whether a path means a DICOM series: a folder, ``folder#uid``, or a file without a suffix that is known."""
    if path.name.lower().endswith(READABLE_SUFFIXES):
        return False
    from medseg.data.dicom.folder import is_dicom, split_series_path

    folder, name = split_series_path(path)
    return name is not None or is_dicom(folder)


def is_drawn(path: Path) -> bool:
    """Whether a label is drawn on a series: a folder of pictures, or a DICOM file."""
    return path.is_dir() or is_series(path)


def is_there(path: Path) -> bool:
    """Whether what a path means exists."""
    if os.path.exists(path):  # False, too, where its folder may not be entered
        return True
    from medseg.data.dicom.folder import split_series_path

    return split_series_path(path)[0].exists()


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a path means: itself, those of a DICOM series, or those of a folder."""
    if path.is_file():
        return (path,)
    if path.is_dir() and not is_series(path):
        return tuple(sorted(file for file in path.glob("[!.]*") if file.is_file()))
    from medseg.data.dicom.drawn import only_drawing
    from medseg.data.dicom.folder import find_one, find_series

    if path.is_dir() and not find_series(path).series:
        return (only_drawing(path),)
    return find_one(path).files


def _suffix(path: Path, known: Sequence[str] = READABLE_SUFFIXES) -> str:
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    raise _unknown_kind(path, known)


def _unknown_kind(path: Path, known: Sequence[str]) -> DataError:
    """What is wrong with a path that names no kind of file, and no DICOM."""
    where = str(path)
    if known is WRITABLE_SUFFIXES:
        return DataError("E-SUFFIX", f"unknown kind of file {path.suffix!r}; known: {', '.join(known)}", where=where)
    if not path.exists():
        return DataError("E-MISSING-FILE", "does not exist; check the path", where=where)
    if not path.is_dir():
        return DataError("E-SUFFIX", f"is not DICOM, whatever its name; other files end in {', '.join(known)}", where)
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    if any(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
        message = "holds pictures, no DICOM; if they are masks, one for each slice of a scan, add --image SCAN"
        return DataError("E-LABEL-IMAGE", message, where=where)
    message = f"holds no DICOM {f'among {len(names)} files' if names else '(it is empty)'}; give the folder of a scan"
    return DataError("E-DICOM-NO-SERIES", message, where=where)


def _read(
    path: Path, assume_spacing_mm: Sequence[float] | None, *, is_label: bool = False, allow_missing_slices: bool = False
) -> Volume:
    if is_series(path):
        from medseg.data.dicom.folder import read_dicom

        return read_dicom(path, allow_missing_slices=allow_missing_slices)
    suffix = _suffix(path)
    if suffix in NIFTI_SUFFIXES:
        return read_nifti_volume(path, assume_spacing_mm=assume_spacing_mm)
    if suffix in PICTURE_SUFFIXES:
        from medseg.data.picture import read_mask, read_picture

        return (read_mask if is_label else read_picture)(path, spacing_mm=assume_spacing_mm)
    from medseg.data.itk import read_itk

    return read_itk(path)


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
    for dtype in LABEL_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype, copy=False)
    raise DataError("E-LABEL-VALUES", f"values reach from {low} to {high}; expected small integers", where=where)
