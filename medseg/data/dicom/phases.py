"""Frames of one plane → scans: where positions repeat, or slices of several scans alternate, what tells them apart.

Most attributes that differ between two scans also differ within one, so each is tried and the split that leaves
every scan whole is taken. Slices in consecutive blocks (an acquisition continued) are one scan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations, pairwise

import numpy as np

from medseg.data.dicom.frame import PHASES, Frame
from medseg.data.dicom.grid import SAME_POSITION_MM, Stack, fit_stack

Split = dict[str, list[Frame]]
"""Frames of several scans, by what tells each apart, e.g. ``"EchoTime 4.9"``."""

_CONTRAST = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "ImageType",
    "FrameType",
    "ComplexImageComponent",
    "ConvolutionKernel",
    "KVP",
)
"""The same in all slices of one scan."""

_OF_PASSES = (
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "FrameReferenceTime",
)
"""May alternate within one MR scan, whose odd and even slices are often made in two passes."""

_TIMES = (
    ("TriggerTime",),
    ("NominalCardiacTriggerDelayTime",),
    ("FrameReferenceTime",),
    ("FrameAcquisitionDateTime",),
    ("AcquisitionDateTime",),
    ("AcquisitionDate", "AcquisitionTime"),
)
_CREATION = ("ContentDate", "ContentTime")  # a copy may have one of its own

_MAX_MISSING = 0.2
_SAME_SPACING = 0.02  # as a share
_HALF_A_DAY = 120_000  # as DICOM writes it, HHMMSS


def told_apart(ordered: Sequence[Frame], *, by_creation: bool = False) -> Split:
    """The scans of frames that are ordered along their normal, no position twice in one.

    Args:
        ordered: Of one plane, each with a place.
        by_creation: Whether the time at which an image was made up may tell, too.

    Returns:
        Empty where positions repeat and nothing tells the images apart.
    """
    times = (*_TIMES, _CREATION) if by_creation else _TIMES
    return {
        ", ".join(filter(None, (outer, inner))): scan
        for outer, frames in _unrepeated(ordered, times).items()
        for inner, scan in _unwoven(frames).items()
    }


def mixed_note(frames: Sequence[Frame]) -> list[str]:
    """What slices of one scan should have in common and have not."""
    keys = [*differing(frames, _CONTRAST), *_alternating(frames, _OF_PASSES)]
    return [f"W-DICOM-MIXED slices differ in {', '.join(keys)}: is it one scan?"] if keys else []


def differing(frames: Sequence[Frame], keys: Sequence[str]) -> list[str]:
    """Those of the keys of `Frame.phase` that are not the same in all frames."""
    return [key for key in keys if len({frame.phase.get(key) for frame in frames}) > 1]


def position_ids(ordered: Sequence[Frame]) -> list[int]:
    """A number for each frame; equal where they lie at one place."""
    positions = np.array([frame.place.position for frame in ordered if frame.place])
    is_new = np.linalg.norm(np.diff(positions, axis=0), axis=1) >= SAME_POSITION_MM
    return [0, *np.cumsum(is_new).tolist()]


def _unrepeated(ordered: Sequence[Frame], times: Sequence[Sequence[str]]) -> Split:
    """As many scans as there are images of a position, if that can be, and none that mixes contrasts.

    What differs from slice to slice tells nothing apart: twice as many scans are taken at most, and none
    of a single slice, unless all are.
    """
    ids = position_ids(ordered)
    most = max(Counter(ids).values())
    if most == 1:
        return {"": list(ordered)}
    varying = differing(ordered, PHASES)
    splits = [_split(ordered, keys) for keys in [(key,) for key in varying] + list(combinations(varying, 2))]
    splits = [split for split in splits if len(split) <= 2 * most and _is_split(split, is_stack=max(ids) > 0)]
    splits += filter(None, (_ranked(ordered, keys) for keys in times))

    def faults(split: Split) -> tuple[bool, bool, int]:
        scans = split.values()
        is_uneven = any(fit_stack(scan, "").problems for scan in scans)
        return len(split) != most, is_uneven, sum(len(differing(scan, _CONTRAST)) for scan in scans)

    return min(splits, key=faults, default={})


def _unwoven(frames: Sequence[Frame]) -> Split:
    """Scans whose slices alternate along the stack; one if there is one.

    MR is often taken in passes, odd slices after even ones: where all of them are one stack, if need be with
    slices missing, they are one scan.
    """
    is_in_passes = frames[0].modality == "MR" and _is_almost_whole(fit_stack(frames, ""))
    passes = _OF_PASSES if is_in_passes else ()
    for key in _alternating(frames, [key for key in PHASES if key not in passes]):
        return {
            ", ".join(filter(None, (outer, inner))): scan
            for outer, part in _split(frames, (key,)).items()
            for inner, scan in _unwoven(part).items()
        }
    return {"": list(frames)}


def _alternating(frames: Sequence[Frame], keys: Sequence[str]) -> list[str]:
    """Keys whose values change to and fro along the stack, each value on even slices as far apart as the others'."""
    return [key for key in differing(frames, keys) if _is_woven(frames, key)]


def _is_woven(frames: Sequence[Frame], key: str) -> bool:
    scans = list(_split(frames, (key,)).values())
    num_runs = 1 + sum(a.phase.get(key) != b.phase.get(key) for a, b in pairwise(frames))
    if num_runs == len(scans) or min(map(len, scans)) <= 2:  # two slices are evenly spaced in any case
        return False
    stacks = [fit_stack(scan, "") for scan in scans]
    spacings = [stack.geometry.spacing_mm[2] for stack in stacks if stack.geometry]
    is_whole = all(map(_is_almost_whole, stacks))
    return is_whole and max(spacings) - min(spacings) <= _SAME_SPACING * max(spacings)


def _is_almost_whole(stack: Stack) -> bool:
    return stack.geometry is not None and len(stack.at) >= (1 - _MAX_MISSING) * stack.geometry.shape[2]


def _is_split(split: Split, *, is_stack: bool) -> bool:
    is_unique = all(max(Counter(position_ids(scan)).values()) == 1 for scan in split.values())
    return is_unique and not (is_stack and min(map(len, split.values())) == 1)


def _split(ordered: Sequence[Frame], keys: Sequence[str]) -> Split:
    scans: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    for frame in ordered:
        scans[_values(frame, keys)].append(frame)
    return {
        ", ".join(f"{key} {value or 'none'}" for key, value in zip(keys, values, strict=True)): scans[values]
        for values in sorted(scans, key=_numeric)
    }


def _ranked(ordered: Sequence[Frame], keys: Sequence[str]) -> Split:
    """The first image of each position, the second …; empty unless all repeat equally often, each at its own time."""
    at: dict[Hashable, list[Frame]] = defaultdict(list)
    for position, frame in zip(position_ids(ordered), ordered, strict=True):
        at[position].append(frame)
    num_scans = len(at[0])
    for alike in at.values():
        if len(alike) != num_scans or len({_values(frame, keys) for frame in alike}) < num_scans:
            return {}
    if not all(frame.phase.get(keys[-1]) for frame in ordered):
        return {}
    in_time = [sorted(alike, key=lambda frame: _numeric(_values(frame, keys))) for alike in at.values()]
    if len(keys) == 2 and any(
        _hours_of(alike[-1], keys) - _hours_of(alike[0], keys) > _HALF_A_DAY for alike in in_time
    ):
        return {}  # over midnight, and no date says which comes first
    return {  # the rank alone: a time of day is the patient's
        f"number {rank + 1} of {num_scans} of each position by {keys[-1]}": [alike[rank] for alike in in_time]
        for rank in range(num_scans)
    }


def _hours_of(frame: Frame, keys: Sequence[str]) -> float:
    return _number(frame.phase[keys[-1]])


def _values(frame: Frame, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(frame.phase.get(key, "") for key in keys)


def _numeric(values: Sequence[str]) -> list[tuple[float, str]]:
    """Sorts numbers as numbers."""
    return [(_number(value), value) for value in values]


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return np.inf
