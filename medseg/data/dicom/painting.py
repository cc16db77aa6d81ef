"""Named structures (segments of a SEG, ROIs of an RTSTRUCT) as one label map.

Refused (`DataError`), for a SEG with the ids below, for an RTSTRUCT with E-RTSTRUCT- in place of E-SEG-:

===================== ==================================================================
E-SEG-LABELS          structures without a label value; names of label values that clash
E-SEG-OVERLAP         voxels of two structures, and no order that says which lies on top
===================== ==================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError
from medseg.geometry import Array, Geometry
from medseg.registry import did_you_mean

Kind = Literal["SEG", "RTSTRUCT"]
"""What the structures come from: part of the error ids."""

Mask = npt.NDArray[np.bool_]

_LABEL_TYPES = (np.uint8, np.int16, np.int32)  # the integers that torch can compute with, smallest first


@dataclass(frozen=True, eq=False)
class Piece:
    """The voxels of a structure in a part of the grid.

    Args:
        number: The structure.
        index: The part: a slice or a number for each axis of the grid.
        mask: Its voxels, of the shape that `index` cuts out.
    """

    number: int
    index: tuple[slice | int, ...]
    mask: Mask


def values_of(names: Mapping[int, str], values: Mapping[str, int] | None, *, kind: Kind, where: str) -> dict[int, int]:
    """The label value of each structure.

    Args:
        names: Structure number to name.
        values: Name to label value; case, blanks and punctuation do not count. 0 leaves a structure
            out. None: the number is the value.
        kind: What the structures come from.
        where: For the message.

    Raises:
        DataError: If structures have no value, or two names for values differ in punctuation alone.
    """
    if values is None:
        return {number: number for number in names}
    known: dict[str, int] = {}
    for name, value in values.items():
        if known.setdefault(_folded(name), value) != value:
            raise DataError(
                f"E-{kind}-LABELS",
                f"label {name!r} has the value {value}, and one that differs in case or punctuation alone has "
                f"{known[_folded(name)]}; rename one",
                where=where,
            )
    unknown = [name for name in names.values() if _folded(name) not in known]
    if unknown:
        listed = "".join(f"\n  {name!r}{did_you_mean(name, values)}" for name in unknown)
        raise DataError(
            f"E-{kind}-LABELS",
            f"{len(unknown)} of {len(names)} structures have no label value; give each a value, or 0 to leave it out:"
            f"{listed}",
            where=where,
        )
    return {number: known[_folded(name)] for number, name in names.items()}


def paint(
    shape: Sequence[int],
    pieces: Iterable[Piece],
    *,
    names: Mapping[int, str],
    values: Mapping[int, int],
    paint_order: Sequence[int],
    kind: Kind,
    where: str,
) -> npt.NDArray[np.integer[Any]]:
    """One label map out of the pieces, in any order.

    Args:
        shape: Of the grid.
        pieces: Voxels of the structures.
        names: Structure number to name, for messages.
        values: Structure number to label value; a structure with 0 is left out.
        paint_order: Label values that may overlap: later ones lie on top.
        kind: What the structures come from.
        where: For the message.

    Returns:
        Label values in the smallest of uint8, int16 and int32 that holds them.

    Raises:
        DataError: If structures of different values overlap that are not both in `paint_order`.
    """
    array = np.zeros(shape, _label_type(values.values()))
    rank = {value: place for place, value in enumerate(paint_order)}
    overlaps: Counter[tuple[int, int]] = Counter()
    for piece in pieces:
        value, mask = values[piece.number], piece.mask
        if value == 0:
            continue
        below = array[piece.index]
        covered = below[mask]
        for other in set(np.unique(covered).tolist() if covered.any() else ()) - {0, value}:
            if other in rank and value in rank:
                mask = mask if rank[value] > rank[other] else mask & (below != other)
            else:
                overlaps[min(other, value), max(other, value)] += int((mask & (below == other)).sum())
        below[mask] = value
    if overlaps:
        called = {v: "/".join(names[n] for n in names if values[n] == v) for v in set(values.values())}
        listed = "".join(f"\n  {called[a]!r} and {called[b]!r}: {n:,} voxels" for (a, b), n in sorted(overlaps.items()))
        raise DataError(
            f"E-{kind}-OVERLAP",
            "structures overlap, and a voxel has one label only; give a paint order (the label values, the last "
            f"on top) or train on regions:{listed}",
            where=where,
        )
    return array


def masks_of(shape: Sequence[int], pieces: Iterable[Piece], names: Mapping[int, str]) -> dict[str, Mask]:
    """A mask for each name, overlaps and all; structures of one name are united."""
    masks = {name: np.zeros(shape, np.bool_) for name in names.values()}
    for piece in pieces:
        part = masks[names[piece.number]][piece.index]
        part |= piece.mask
    return masks


def indices_of(points_lps: Array, grid: Geometry) -> Array:
    """Where points of the patient (N, 3), in DICOM's LPS mm, lie on a grid: (i, j, k) as fractions."""
    origin, spacing, direction = grid.lps()
    axes = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    return np.linalg.solve(axes, (points_lps - np.asarray(origin)).T).T


def plane_distances_mm(grid: Geometry) -> Array:
    """Distance between neighbouring planes along each axis; on a sheared grid less than the spacing."""
    return 1 / np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)


def _folded(name: str) -> str:
    """A name without what people write in many ways."""
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def _label_type(values: Iterable[int]) -> type[np.integer[Any]]:
    low, high = min(values, default=0), max(values, default=0)
    return next(t for t in _LABEL_TYPES if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
