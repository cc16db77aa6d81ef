"""A folder of pictures, one a slice, as the label map of a DICOM series.

Pictures and slices have no other link than the order of their names: the first mask belongs to the
first file of the series by name, wherever in the patient that file lies. Refused (`DataError`):

===================== ==================================================================
E-MASKS-COUNT         more or fewer pictures than slices
E-MASKS-SIZE          a picture of another size than the slices
E-MASKS-PICTURE       a picture that cannot be read, or that has colours
===================== ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from medseg.errors import DataError
from medseg.geometry import Geometry, Volume


def read_mask_stack(folder: Path, files: Sequence[Path], *, grid: Geometry) -> Volume:
    """Read the masks of a series.

    Args:
        folder: Holds one PNG a slice: label values, or black and white, or a palette whose indices are
            the values.
        files: The DICOM file of each slice, in the order of the grid's last axis.
        grid: The series': columns, rows, slices.

    Returns:
        Label values (1, I, J, K), uint8; 1 where black and white pictures are white.

    Raises:
        DataError: If the pictures do not fit the series; see the table above.
    """
    pictures = [path for path in folder.glob("[!.]*") if path.suffix.lower() == ".png"]
    if len(pictures) != len(files):
        raise DataError(
            "E-MASKS-COUNT",
            f"{len(pictures)} PNG files for {len(files)} slices; expected one a slice, paired by the order of the names",
            where=str(folder),
        )
    array = np.zeros(grid.shape, np.uint8)
    order = sorted(range(len(files)), key=lambda k: _natural(files[k]))
    for k, path in zip(order, sorted(pictures, key=_natural), strict=True):
        mask = _read_picture(path)  # (rows, columns)
        if mask.shape[::-1] != grid.shape[:2]:
            raise DataError(
                "E-MASKS-SIZE",
                f"{mask.shape[0]} rows × {mask.shape[1]} columns; the slices have {grid.shape[1]} × {grid.shape[0]}",
                where=str(path),
            )
        array[:, :, k] = mask.T
    if np.isin(array, (0, 255)).all():
        array //= 255
    return Volume(array[None], grid)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts slice 2 before slice 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_picture(path: Path) -> npt.NDArray[Any]:
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError("E-MASKS-PICTURE", "is no picture that can be read; copy it again", where=str(path)) from error
    if array.ndim == 3 and (array[..., 3:] == 255).all() and (array[..., :1] == array[..., :3]).all():
        array = array[..., 0]  # grey, stored as colours
    if array.ndim != 2 or array.max() > 255:
        raise DataError(
            "E-MASKS-PICTURE",
            f"{picture.mode} picture of shape {array.shape}, values up to {array.max()}; expected one label value from "
            "0 to 255 a pixel",
            where=str(path),
        )
    return array
