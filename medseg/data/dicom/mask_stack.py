"""A folder of PNG pictures, one a slice, as the label map of a DICOM series.

Pictures and slices have no other link than the order of their names: the first mask belongs to the
first file of the series by name, wherever in the patient that file lies. Where files of the series are
missing, masks may be as many as its files, or as the slices of the whole series. How pixels become
labels is told in `picture`; black and white is what the pictures all are, or none. Refused (`DataError`)
or told (a warning on the logger ``medseg``), beside what `picture` finds:

===================== ==================================================================
E-MASKS-COUNT         more or fewer pictures than slices
E-MASKS-ORDER         names that do not say which picture belongs to which slice
E-MASKS-SLICES        a series whose files lie between the slices that are interpolated from them
E-MASKS-SIZE          a picture of another size than the slices
W-MASKS-SLICES        a series that lacks slices: which masks lie where
===================== ==================================================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from medseg.data.dicom.folder import Series
from medseg.data.dicom.painting import label_type
from medseg.data.picture import read_mask
from medseg.errors import DataError
from medseg.geometry import Volume

Labels2D = npt.NDArray[Any]

log = logging.getLogger("medseg")


def read_mask_stack(folder: Path, series: Series) -> Volume:
    """Read the masks of a series.

    Args:
        folder: Holds one PNG a slice: label values, or black and white, or a palette whose indices are
            the values.
        series: What they are drawn on.

    Returns:
        Label values (1, I, J, K) on the series' grid; 1 where black and white pictures are white.

    Raises:
        DataError: If the pictures do not fit the series; see the table above.
    """
    pictures = sorted((path for path in folder.glob("[!.]*") if path.suffix.lower() == ".png"), key=_by_name)
    slices = _slices_of(len(pictures), series, str(folder))
    masks = _read_alike(pictures)  # each (I, J)
    shape = series.geometry.shape
    array = np.zeros(shape, label_type([int(mask.max()) for mask in masks]))
    for k, path, mask in zip(slices, pictures, masks, strict=True):
        if mask.shape != shape[:2]:
            raise DataError(
                "E-MASKS-SIZE",
                f"{mask.shape[1]} rows × {mask.shape[0]} columns; the slices have {shape[1]} × {shape[0]}",
                where=str(path),
            )
        array[:, :, k] = mask
    return Volume(array[None], series.geometry)


def _slices_of(num_pictures: int, series: Series, where: str) -> list[int]:
    """The slice of the grid that each picture belongs to."""
    num_slices = series.geometry.shape[2]
    there = _slices_by_name(series, where)
    num_missing = num_slices - len(there)
    if num_pictures not in (len(there), num_slices):
        whole = f", or for all {num_slices} slices, {num_missing} of which are missing" if num_missing else ""
        raise DataError(
            "E-MASKS-COUNT",
            f"{num_pictures} PNG files for {len(there)} slices{whole}; expected one a slice, paired by the order of "
            "the names",
            where=where,
        )
    if not num_missing:
        return there
    if num_pictures == len(there):
        text = "those have no mask and are background"
        slices = there
    else:
        text = "masks are paired with all slices in their order, the missing ones among them"
        slices = _whole_order(there, num_slices, where)
    log.warning("W-MASKS-SLICES %s: the series lacks %d of %d slices; %s", where, num_missing, num_slices, text)
    return slices


def _slices_by_name(series: Series, where: str) -> list[int]:
    """The slice of the grid that each frame lies on, in the order of the files' names."""
    slice_of = {frame: k for k, frame in enumerate(series.slices) if frame}
    if len(slice_of) < len(series.frames):
        raise DataError(
            "E-MASKS-SLICES",
            f"{len(series.frames) - len(slice_of)} of {len(series.frames)} slices of the series lie at irregular "
            "distances, where its grid has none; give masks of an even series, or a label file on that grid",
            where=where,
        )
    by_path = sorted(series.frames, key=lambda frame: (_by_folder(frame.path), _by_name(frame.path), frame.number))
    by_name = sorted(by_path, key=lambda frame: _by_name(frame.path))
    for one, other in zip(by_path, by_name, strict=True):
        if one is not other:
            raise DataError(
                "E-MASKS-ORDER",
                f"masks go by the order of the files' names, and that of their folders is another ({one.path}, "
                f"{other.path}); put the series into one folder, with names in the order of the masks",
                where=where,
            )
    return [slice_of[frame] for frame in by_name]


def _whole_order(there: Sequence[int], num_slices: int, where: str) -> list[int]:
    """All slices in the order of their names, as those that are there have them: along the series, or against it."""
    upward = sorted(there)
    if list(there) == upward:
        return list(range(num_slices))
    if list(there) == upward[::-1]:
        return list(range(num_slices))[::-1]
    raise DataError(
        "E-MASKS-ORDER",
        f"{num_slices} PNG files, and {len(there)} slices whose names do not follow their places, so that nobody knows "
        "which masks belong to the missing ones; remove those masks, or find the files",
        where=where,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts slice 2 before slice 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _by_folder(path: Path) -> list[list[tuple[int, str]]]:
    return [_natural(part) for part in path.parent.parts]


def _by_name(path: Path) -> tuple[list[tuple[int, str]], str]:
    return _natural(path.name), path.name


def _read_alike(pictures: Sequence[Path]) -> list[Labels2D]:
    """The labels of each picture; white is label 1 only where no picture holds other values than white."""
    masks = [read_mask(path).array[0] for path in pictures]
    whites = [_white_of(path, mask) for path, mask in zip(pictures, masks, strict=True)]
    if any(mask.any() and not white for mask, white in zip(masks, whites, strict=True)):
        masks = [mask * np.int32(white) if white else mask for mask, white in zip(masks, whites, strict=True)]
    return masks


def _white_of(path: Path, mask: Labels2D) -> int:
    """What is stored where a picture's labels 1 are its white; 0 where they are not."""
    if mask.max() != 1:
        return 0
    with Image.open(path) as picture:
        if picture.mode in ("P", "PA"):
            return 0
        high = int(np.ravel(picture.getextrema())[1])  # of the first channel
    return high if high in (255, 65_535) else 0
