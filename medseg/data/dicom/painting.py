"""Named structures (segments of a SEG, ROIs of an RTSTRUCT) as one label map.

Refused (`DataError`), for a SEG with the ids below, for an RTSTRUCT with E-RTSTRUCT- in place of E-SEG-:

===================== ==================================================================
E-SEG-LABELS          structures without a label value, or with several that could be meant
E-SEG-OVERLAP         voxels of two structures, and no order that says which lies on top
===================== ==================================================================
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medseg.data.volume_io import LABEL_TYPES
from medseg.errors import DataError
from medseg.geometry import Array, Geometry
from medseg.registry import did_you_mean

Kind = Literal["SEG", "RTSTRUCT"]
"""What the structures come from: part of the error ids."""

Mask = npt.NDArray[np.bool_]

# What people write in many ways: blanks and punctuation. A plus says something: PTV+3.
_SEPARATOR = re.compile(r"(?:[^\w+]|_)+")


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
        values: Name to label value. What is not named so to the letter is matched with the names left
            over, where case, blanks and punctuation do not count, but between digits. 0 leaves a
            structure out. None: the number is the value.
        kind: What the structures come from.
        where: For the message.

    Raises:
        DataError: If structures have no value, or several that could be meant.
    """
    if values is None:
        return {number: number for number in names}
    left_over: dict[str, dict[str, int]] = {}
    for name in values.keys() - set(names.values()):
        left_over.setdefault(_folded(name), {})[name] = values[name]
    found, unknown = {}, []
    for number, name in names.items():
        alike = left_over.get(_folded(name), {})
        if name in values:
            found[number] = values[name]
        elif not alike:
            unknown.append(name)
        elif len(set(alike.values())) == 1:
            found[number] = next(iter(alike.values()))
        else:
            listed = ", ".join(f"{other!r} ({value})" for other, value in sorted(alike.items()))
            raise DataError(
                f"E-{kind}-LABELS", f"structure {name!r} may be {listed}; name one of them just so", where=where
            )
    if unknown:
        raise _without_value(unknown, names, values, kind=kind, where=where)
    return found


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
    array = np.zeros(shape, label_type(values.values()))
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
            f"structures overlap, and a voxel has one label only; add to the manifest, the value on top last, "
            f'"region_order": {sorted({value for pair in overlaps for value in pair})}, or train on regions:{listed}',
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


def label_type(values: Iterable[int]) -> type[np.integer[Any]]:
    """The smallest type of a label map that holds the values."""
    low, high = min(values, default=0), max(values, default=0)
    return next(t for t in LABEL_TYPES if np.iinfo(t).min <= low and high <= np.iinfo(t).max)


def _folded(name: str) -> str:
    """A name without what people write in many ways; between digits a separator stays, as 6.6 is not 66."""

    def kept(match: re.Match[str]) -> str:
        around = name[: match.start()][-1:], name[match.end() :][:1]
        return match[0] if all(letter.isdigit() for letter in around) else ""

    return _SEPARATOR.sub(kept, name).casefold() or name


def _without_value(
    unknown: Sequence[str], names: Mapping[int, str], values: Mapping[str, int], *, kind: Kind, where: str
) -> DataError:
    """Names the structures, and the line that gives them values."""
    listed = "".join(f"\n  {name!r}{did_you_mean(name, values)}" for name in unknown)
    line = {name: _likely_value(name, values, is_only=len(names) == 1) for name in unknown}
    return DataError(
        f"E-{kind}-LABELS",
        f"{len(unknown)} of {len(names)} structures have no label value:{listed}\nAdd to the manifest, with the value "
        f'of each (0 leaves it out): "structures": {json.dumps(line, ensure_ascii=False)}',
        where=where,
    )


def _likely_value(name: str, values: Mapping[str, int], *, is_only: bool) -> int:
    """The label of a name that is close, its numbers the same; of the only structure the only label; else 0."""
    by_folded = {_folded(other): value for other, value in values.items()}
    numbers = re.findall(r"\d+", name)
    close = get_close_matches(_folded(name), [f for f in by_folded if re.findall(r"\d+", f) == numbers], n=1)
    organs = set(values.values()) - {0}
    if close:
        return by_folded[close[0]]
    return organs.pop() if is_only and len(organs) == 1 else 0
