"""Frames of many files → groups of one position each: one group, one volume.

===================== ==================================================================
E-DICOM-DUPLICATE-POSITION  several different images of one position that nothing tells apart
W-DICOM-DUPLICATE     a slice was there twice, with equal pixels
W-DICOM-SPLIT         a series that holds several volumes
W-DICOM-MIXED         slices of one volume that were not made alike
===================== ==================================================================
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from medseg.data.dicom.frame import PHASES, Frame
from medseg.data.dicom.grid import SAME_POSITION_MM, along_normal
from medseg.data.dicom.pixels import read_frame
from medseg.errors import DataError, MedsegError

DIRECTION_TOLERANCE = 1e-3
"""Largest difference between the cosines of slices of one orientation."""

SPACING_TOLERANCE = 1e-4
"""Largest difference between the pixel spacings of slices of one volume, mm."""

_MAX_NAMED = 3
_CONTRAST = (
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "ComplexImageComponent",
    "ConvolutionKernel",
    "KVP",
)


@dataclass(frozen=True, eq=False)
class Group:
    """Frames of one volume.

    Args:
        frames: Ordered along their normal; as they came, where positions are not stated.
        part: Which part of its series, counted from 1; 0 if the series is whole.
        phase: What tells it apart from others of the same positions, e.g. ``"EchoTime 4.9"``.
        notes: What a person should know.
        problem: Why it is no volume.
    """

    frames: tuple[Frame, ...]
    part: int = 0
    phase: str = ""
    notes: tuple[str, ...] = ()
    problem: DataError | None = None


def group_frames(frames: Iterable[Frame], where: str) -> list[Group]:
    """Sort frames into volumes.

    Args:
        frames: Of any files.
        where: For messages.
    """
    by_series: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        by_series[frame.series_uid].append(frame)
    return [group for members in by_series.values() for group in _parts(members, where)]


def _parts(frames: Sequence[Frame], where: str) -> list[Group]:
    """The volumes of one series, in an order that does not hang on file names."""
    groups = [group for plane in _planes(frames) for group in _phases(plane, where)]
    if len(groups) == 1:
        return groups
    return [
        replace(group, part=part, notes=(*group.notes, _split_note(part, len(groups), group.phase)))
        for part, group in enumerate(groups, 1)
    ]


def _split_note(part: int, number: int, phase: str) -> str:
    return f"W-DICOM-SPLIT volume {part} of {number} of the series" + (f": {phase}" if phase else "")


def _planes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Split by what one volume has in common: size, orientation, spacing, frame of reference, stack."""
    planes: dict[Hashable, list[list[Frame]]] = defaultdict(list)
    for frame in frames:
        series = frame.series_uid or str(frame.path.parent)  # without a uid, a folder is a series
        key = (series, frame.modality, frame.size, frame.frame_of_reference_uid, frame.stack, frame.place is None)
        alike = next((plane for plane in planes[key] if _same_plane(plane[0], frame)), None)
        if alike is None:
            planes[key].append([frame])
        else:
            alike.append(frame)
    return [plane for key in sorted(planes, key=repr) for plane in sorted(planes[key], key=_plane_order)]


def _same_plane(a: Frame, b: Frame) -> bool:
    if a.place is None or b.place is None:
        return a.place is b.place
    directions = np.array([[*a.place.row, *a.place.column], [*b.place.row, *b.place.column]])
    spacings = np.array([a.place.spacing_mm, b.place.spacing_mm])
    return bool(
        np.abs(np.diff(directions, axis=0)).max() <= DIRECTION_TOLERANCE
        and np.abs(np.diff(spacings, axis=0)).max() <= SPACING_TOLERANCE
    )


def _plane_order(plane: Sequence[Frame]) -> list[float]:
    place = plane[0].place
    return [] if place is None else [round(x, 2) for x in (*place.row, *place.column, *place.spacing_mm)]


def _phases(frames: Sequence[Frame], where: str) -> list[Group]:
    """Split frames of one plane until no position repeats, or say that it cannot be done."""
    if frames[0].place is None:
        return [Group(tuple(frames))]
    ordered = _ordered(frames)
    ordered, num_copies = _without_copies(ordered, only_same_uid=True)
    groups = _told_apart(ordered)
    if not groups:
        ordered, num_equal = _without_copies(ordered, only_same_uid=False)
        num_copies += num_equal
        groups = _told_apart(ordered)
    notes = [f"W-DICOM-DUPLICATE {num_copies} copies of slices left out"] if num_copies else []
    if not groups:
        return [Group(tuple(ordered), notes=tuple(notes), problem=_duplicates(ordered, where))]
    return [Group(tuple(group), phase=phase, notes=(*notes, *_mixed_note(group))) for phase, group in groups.items()]


def _mixed_note(frames: Sequence[Frame]) -> list[str]:
    differing = _differing(frames, _CONTRAST)
    return [f"W-DICOM-MIXED slices differ in {', '.join(differing)}: is it one scan?"] if differing else []


def _differing(frames: Sequence[Frame], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if len({frame.phase.get(key) for frame in frames}) > 1]


def _ordered(frames: Sequence[Frame]) -> list[Frame]:
    distances = along_normal(frames)
    order = sorted(range(len(frames)), key=lambda i: (distances[i], str(frames[i].path), frames[i].number))
    return [frames[i] for i in order]


def _position_ids(ordered: Sequence[Frame]) -> list[int]:
    """A number for each frame; equal where they lie at one place."""
    positions = np.array([frame.place.position for frame in ordered if frame.place])
    ids = [0]
    for k in range(1, len(ordered)):
        is_same = np.linalg.norm(positions[k] - positions[k - 1]) < SAME_POSITION_MM
        ids.append(ids[-1] if is_same else ids[-1] + 1)
    return ids


def _told_apart(ordered: Sequence[Frame]) -> dict[str, list[Frame]]:
    """The frames by what tells them apart, no position twice in a group; empty if nothing does.

    What differs from slice to slice tells nothing apart: as many groups as there are images of a
    position are expected, and twice as many are taken; none of a single slice, unless all are.
    """
    ids = _position_ids(ordered)
    num_positions, most = len(set(ids)), max(ids.count(i) for i in set(ids))
    if most == 1:
        return {"": list(ordered)}
    varying = _differing(ordered, PHASES)
    for keys in [(key,) for key in varying] + list(combinations(varying, 2)):
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, frame in enumerate(ordered):
            groups[tuple(frame.phase.get(key, "") for key in keys)].append(index)
        is_unique = all(len({ids[i] for i in group}) == len(group) for group in groups.values())
        is_whole = num_positions == 1 or min(map(len, groups.values())) > 1
        if is_unique and is_whole and len(groups) <= 2 * most:
            return {
                ", ".join(f"{key} {value or 'none'}" for key, value in zip(keys, values, strict=True)): [
                    ordered[i] for i in groups[values]
                ]
                for values in sorted(groups, key=_numeric)
            }
    return {}


def _numeric(values: Sequence[str]) -> list[tuple[float, str]]:
    """Sorts numbers as numbers."""
    return [(float(value) if value.replace(".", "", 1).isdigit() else np.inf, value) for value in values]


def _without_copies(ordered: Sequence[Frame], *, only_same_uid: bool) -> tuple[list[Frame], int]:
    """Frames without those whose pixels are there already at the same position."""
    kept: list[Frame] = []
    at_position: dict[int, list[Frame]] = defaultdict(list)
    for index, frame in zip(_position_ids(ordered), ordered, strict=True):
        others = [
            other
            for other in at_position[index]
            if not only_same_uid or (frame.sop_uid and (frame.sop_uid, frame.number) == (other.sop_uid, other.number))
        ]
        if any(_same_pixels(frame, other) for other in others):
            continue
        kept.append(frame)
        at_position[index].append(frame)
    return kept, len(ordered) - len(kept)


def _same_pixels(a: Frame, b: Frame) -> bool:
    if a.problem or b.problem or a.rescale != b.rescale:
        return False
    try:
        return bool(np.array_equal(read_frame(a), read_frame(b)))
    except MedsegError:  # damaged: reading the series will say so
        return False


def _duplicates(ordered: Sequence[Frame], where: str) -> DataError:
    ids = _position_ids(ordered)
    repeated = [i for i in dict.fromkeys(ids) if ids.count(i) > 1]
    examples = [frame for i, frame in zip(ids, ordered, strict=True) if i == repeated[0]]
    files = list(dict.fromkeys(frame.path for frame in examples[:_MAX_NAMED]))
    home = os.path.commonpath([file.parent for file in files])  # files of two folders often share their names
    names = ", ".join(os.path.relpath(file, home) for file in files)
    place = examples[0].place
    position = ", ".join(f"{x:.2f}" for x in place.position) if place else ""
    differing = _differing(examples, PHASES)
    hint = f" (they differ in {', '.join(differing)})" if differing else ""
    return DataError(
        "E-DICOM-DUPLICATE-POSITION",
        f"{len(repeated)} positions hold several different images, e.g. ({position}) mm: {names}{hint}; phases of a "
        "scan, or several scans in one series? Keep one image of each position",
        where=f"{where}#{ordered[0].series_uid}",
    )
