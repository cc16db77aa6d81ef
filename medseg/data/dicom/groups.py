"""Frames of many files → groups of one position each: one group, one volume.

===================== ==================================================================
E-DICOM-DUPLICATE-POSITION  several different images of one position that nothing tells apart
W-DICOM-DUPLICATE     a slice was there twice, with equal pixels
W-DICOM-SPLIT         a series that holds several volumes
W-DICOM-MIXED         slices of one volume that were not made alike
===================== ==================================================================
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medseg.data.dicom.frame import PHASES, TIMES, Frame
from medseg.data.dicom.grid import along_normal
from medseg.data.dicom.phases import differing, mixed_note, position_ids, told_apart
from medseg.data.dicom.pixels import read_frame
from medseg.errors import DataError, MedsegError

DIRECTION_TOLERANCE = 1e-3
"""Largest difference between the cosines of slices of one orientation."""

SPACING_TOLERANCE = 1e-4
"""Largest difference between the pixel spacings of slices of one volume, mm."""

_MAX_NAMED = 3


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
    planes = _planes(frames)
    groups = [group for plane in planes for group in _phases(plane, where)]
    if len(groups) == 1:
        return groups
    apart = _what_differs([plane[0] for plane in planes])
    return [
        replace(group, part=part, notes=(*group.notes, _split_note(part, len(groups), group.phase, apart)))
        for part, group in enumerate(groups, 1)
    ]


def _split_note(part: int, number: int, phase: str, apart: Sequence[str]) -> str:
    why = "; ".join(filter(None, (phase, f"they differ in {', '.join(apart)}" if apart else "")))
    return f"W-DICOM-SPLIT volume {part} of {number} of the series: {why}"


def _what_differs(firsts: Sequence[Frame]) -> list[str]:
    """What keeps planes apart, each told by its first frame."""
    kept: dict[str, list[Hashable]] = {
        "folder": [_home(frame) for frame in firsts],
        "modality": [frame.modality for frame in firsts],
        "image size": [frame.size for frame in firsts],
        "frame of reference": [frame.frame_of_reference_uid for frame in firsts],
        "stack": [frame.stack for frame in firsts],
        "whether a position is stated": [frame.place is None for frame in firsts],
    }
    places = [frame.place for frame in firsts if frame.place]
    directions = np.array([[*place.row, *place.column] for place in places])
    spacings = np.array([place.spacing_mm for place in places])
    differ = [what for what, found in kept.items() if len(set(found)) > 1]
    differ += ["orientation"] if places and np.ptp(directions, axis=0).max() > DIRECTION_TOLERANCE else []
    return differ + (["pixel spacing"] if places and np.ptp(spacings, axis=0).max() > SPACING_TOLERANCE else [])


def _planes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Split by what one volume has in common: size, orientation, spacing, frame of reference, stack."""
    planes: dict[Hashable, list[list[Frame]]] = defaultdict(list)
    for frame in frames:
        key = (_home(frame), frame.modality, frame.size, frame.frame_of_reference_uid, frame.stack, frame.place is None)
        alike = next((plane for plane in planes[key] if _same_plane(plane[0], frame)), None)
        if alike is None:
            planes[key].append([frame])
        else:
            alike.append(frame)
    return [plane for key in sorted(planes, key=repr) for plane in sorted(planes[key], key=_plane_order)]


def _home(frame: Frame) -> str:
    """Without a uid, a folder is a series."""
    return frame.series_uid or str(frame.path.parent)


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
    scans = told_apart(ordered)
    if not scans:
        ordered, num_equal = _without_copies(ordered, only_same_uid=False)
        num_copies += num_equal
        scans = told_apart(ordered, by_creation=True)
    notes = [f"W-DICOM-DUPLICATE {num_copies} copies of slices left out"] if num_copies else []
    if not scans:
        return [Group(tuple(ordered), notes=tuple(notes), problem=_duplicates(ordered, where))]
    return [Group(tuple(scan), phase=phase, notes=(*notes, *mixed_note(scan))) for phase, scan in scans.items()]


def _ordered(frames: Sequence[Frame]) -> list[Frame]:
    distances = along_normal(frames)
    order = sorted(range(len(frames)), key=lambda i: (distances[i], str(frames[i].path), frames[i].number))
    return [frames[i] for i in order]


def _without_copies(ordered: Sequence[Frame], *, only_same_uid: bool) -> tuple[list[Frame], int]:
    """Frames without those whose pixels are there already at the same position."""
    alike: dict[Hashable, list[Frame]] = defaultdict(list)
    for position, frame in zip(position_ids(ordered), ordered, strict=True):
        uid = (frame.sop_uid or str(frame.path), frame.number) if only_same_uid else None
        alike[position, uid].append(frame)
    kept: list[Frame] = []
    for frames in alike.values():
        contents: dict[Hashable, Frame] = {}
        for frame in frames:
            contents.setdefault(_content(frame) if len(frames) > 1 else None, frame)
        kept += contents.values()
    return kept, len(ordered) - len(kept)


def _content(frame: Frame) -> Hashable:
    """The same for equal pixels; for those that cannot be read, the file's own."""
    if not frame.problem:
        try:
            pixels = read_frame(frame).astype(np.int64)  # a compressed copy may come in another type
            return frame.rescale, frame.size, hashlib.sha256(pixels.tobytes()).digest()
        except MedsegError:  # damaged: reading the series will say so
            pass
    return frame.path, frame.number


def _duplicates(ordered: Sequence[Frame], where: str) -> DataError:
    ids = position_ids(ordered)
    repeated = [i for i, number in Counter(ids).items() if number > 1]
    examples = [frame for i, frame in zip(ids, ordered, strict=True) if i == repeated[0]]
    files = list(dict.fromkeys(frame.path for frame in examples[:_MAX_NAMED]))
    home = os.path.commonpath([file.parent for file in files])  # files of two folders often share their names
    names = ", ".join(os.path.relpath(file, home) for file in files)
    place = examples[0].place
    position = ", ".join(f"{x:.2f}" for x in place.position) if place else ""
    keys = differing(examples, (*PHASES, *TIMES))
    hint = f" (they differ in {', '.join(keys)})" if keys else ""
    return DataError(
        "E-DICOM-DUPLICATE-POSITION",
        f"{len(repeated)} positions hold several different images, e.g. ({position}) mm: {names}{hint}; phases of a "
        "scan, or several scans in one series? Keep one image of each position",
        where=f"{where}#{ordered[0].series_uid}",
    )
