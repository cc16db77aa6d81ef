"""A folder of DICOM files → its series → Volume.

Grouped by series uid, then by orientation, spacing, size, frame of reference and, where positions
repeat, by what tells phases apart; ordered by position, never by file name or InstanceNumber.
The modules below it hold the tables of what is refused and noted: `headers` (a file),
`groups` (what is one volume), `grid` (where slices lie), `pixels` (voxels).

===================== ==================================================================
E-MISSING-FILE        no such file or folder
E-DICOM-NO-SERIES     no image in it, or none with that uid
E-DICOM-SEVERAL       several series, and none is named
W-DICOM-INTERPOLATED  slices that were interpolated, as allow_missing_slices allows
W-DICOM-BURNED-IN     the file says that its picture itself names the patient
W-DICOM-NO-UID        files without SeriesInstanceUID, taken together by folder
W-DICOM-ALONE         a file was given, whose folder holds more slices of its series
===================== ==================================================================
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.dicom.frame import Frame
from medseg.data.dicom.grid import Stack, fit_stack
from medseg.data.dicom.groups import Group, group_frames
from medseg.data.dicom.headers import is_dicom_file, read_frames
from medseg.data.dicom.pixels import read_stack
from medseg.data.headers import check_size
from medseg.errors import DataError, Problems
from medseg.geometry import Geometry, Volume

WITHOUT_UID = "no-uid"
"""What a series is called whose files name none."""

_IGNORED_NAMES = (".DS_Store", "Thumbs.db", "desktop.ini")
_MENDED_BY_INTERPOLATION = ("E-DICOM-MISSING-SLICE", "E-DICOM-IRREGULAR")
_NAME = re.compile(r"(?:[0-9.]+|no-uid)(?:-[0-9]+)?")
_ON_GRID = 1e-6  # voxels
_MAX_PROBLEMS = 5
_SLICED = ("CT", "MR", "PT", "NM")
_MAX_LOOKED_AT = 1000  # files; a folder may hold a whole archive

log = logging.getLogger("medseg")


@dataclass(frozen=True, eq=False)
class Series:
    """The images of one volume, ordered along their normal.

    Args:
        source: The folder or file it was found in.
        uid: SeriesInstanceUID; empty where the files name none.
        part: Which volume of the series, from 1, where it holds several; else 0.
        modality: E.g. ``"CT"``.
        frames: Slices that are there, in order.
        at: Where on the grid's last axis each of them lies, in voxels: 0, 1, 2 … unless slices are missing.
        grid: The grid, with what is missing; None if positions tell none.
        frame_of_reference_uid: What positions refer to.
        tilt_deg: Between the direction of the stack and the slices' normal.
        problems: Why it cannot be read as a volume; empty: it can.
        notes: ``"W-… text"``, what a person should know.
    """

    source: Path
    uid: str
    part: int
    modality: str
    frames: tuple[Frame, ...]
    at: tuple[float, ...]
    grid: Geometry | None
    frame_of_reference_uid: str | None
    tilt_deg: float
    problems: tuple[DataError, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its uid, and which part of it."""
        return (self.uid or WITHOUT_UID) + (f"-{self.part}" if self.part else "")

    @property
    def home(self) -> Path:
        """The folder that holds its files."""
        return Path(os.path.commonpath([file.parent for file in self.files]))

    @property
    def path(self) -> Path:
        """What names this series alone: ``folder#uid``."""
        return Path(f"{self.home}#{self.name}")

    @property
    def geometry(self) -> Geometry:
        """The grid.

        Raises:
            DataError: The first problem, if there is no grid.
        """
        if self.grid is None:
            raise self.problems[0]
        return self.grid

    @property
    def files(self) -> tuple[Path, ...]:
        """In the order of the slices; a multi-frame file once."""
        return tuple(dict.fromkeys(frame.path for frame in self.frames))

    @property
    def sop_uids(self) -> tuple[str, ...]:
        """SOPInstanceUID of each slice of the grid; empty where a slice is missing."""
        return tuple(frame.sop_uid if frame else "" for frame in self.slices)

    @property
    def slices(self) -> tuple[Frame | None, ...]:
        """The frame of each slice of the grid; None where it is missing."""
        there = {
            round(at): frame for at, frame in zip(self.at, self.frames, strict=True) if abs(at - round(at)) < _ON_GRID
        }
        return tuple(there.get(k) for k in range(self.geometry.shape[2]))


@dataclass(frozen=True)
class Skipped:
    """A file that belongs to no series, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class DicomFolder:
    """What a folder holds: every file is in a series or skipped."""

    series: tuple[Series, ...]
    skipped: tuple[Skipped, ...]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, or a folder holds a file that is; goes by the first bytes."""
    if not path.is_dir():
        return is_dicom_file(path)
    return any(is_dicom_file(file) for file, reason in _walk(path) if reason is None)


def find_series(folder_or_file: Path) -> DicomFolder:
    """The series of a folder, searched recursively, or of one file.

    Only headers are read, and the pixels of slices that share a position.

    Args:
        folder_or_file: Links to folders are not followed.

    Raises:
        DataError: If it does not exist.
    """
    if not folder_or_file.exists():
        raise DataError("E-MISSING-FILE", "does not exist", where=str(folder_or_file))
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for path, reason in sorted(_walk(folder_or_file), key=lambda entry: entry[0]):
        found = reason or read_frames(path)
        if isinstance(found, str):
            skipped.append(Skipped(path, found))
        else:
            frames += found
    series = [_series(folder_or_file, group) for group in group_frames(frames, str(folder_or_file))]
    if len(frames) == 1 and folder_or_file.is_file():
        series = [replace(series[0], notes=(*series[0].notes, *_alone_note(frames[0])))]
    return DicomFolder(tuple(sorted(series, key=lambda one: (one.uid, one.part))), tuple(skipped))


def split_series_path(path: Path) -> tuple[Path, str | None]:
    """``folder#uid`` as the folder and the name of one of its series; another path as it is, and None."""
    folder, mark, name = str(path).rpartition("#")
    if mark and _NAME.fullmatch(name) and not path.exists():
        return Path(folder), name
    return path, None


def find_one(path: Path) -> Series:
    """The one image series that a path means.

    Args:
        path: A folder with one series, ``folder#uid`` for one of several, of which the end of the uid is
            enough, or a file.

    Raises:
        DataError: If there is no series, or there are several.
    """
    folder, name = split_series_path(path)
    found = find_series(folder)
    chosen = [one for one in found.series if name in (None, one.uid or WITHOUT_UID, one.name)]
    chosen = chosen or [one for one in found.series if name and one.name.endswith(name)]
    if not chosen:
        raise DataError("E-DICOM-NO-SERIES", _why_none(found, name), where=str(path))
    if len(chosen) > 1:
        listed = ", ".join(f"{one.path} ({one.modality}, {len(one.frames)} slices)" for one in chosen)
        raise DataError("E-DICOM-SEVERAL", f"holds {len(chosen)} image series; name one: {listed}", where=str(path))
    return chosen[0]


def read_dicom(path: Path, *, allow_missing_slices: bool = False) -> Volume:
    """Read the one image series that a path means.

    Args:
        path: See `find_one`.
        allow_missing_slices: See `read_series`.

    Raises:
        DataError: If there is no series or there are several, or it cannot be read.
        Problems: If several things hinder it.
    """
    return read_series(find_one(path), allow_missing_slices=allow_missing_slices)


def read_series(series: Series, *, allow_missing_slices: bool = False) -> Volume:
    """The voxels of a series, each slice with its own rescale; notes are logged as warnings.

    Args:
        series: One of `find_series`.
        allow_missing_slices: Interpolate linearly between neighbors what lies between slices that are
            missing or irregular.

    Returns:
        (1, I, J, K): I along a row, J along a column, K along the slices. int16 where no value needs
        more, else float32.

    Raises:
        DataError: If it has a problem.
        Problems: If it has several.
    """
    waived = _MENDED_BY_INTERPOLATION if allow_missing_slices else ()
    problems = [problem for problem in series.problems if problem.error_id not in waived]
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(problems)
    where, shape = str(series.path), series.geometry.shape
    check_size(4 * int(np.prod(shape, dtype=np.int64)), shape, where)  # 4: float32
    voxels, notes = read_stack(series.frames)  # (K, J, I)
    for note in (*series.notes, *notes):
        error_id, _, text = note.partition(" ")
        log.warning("%s %s: %s", error_id, where, text)
    if len(series.frames) < shape[2] or series.problems:
        voxels = _interpolated(voxels, np.array(series.at), shape[2])
        num_there = sum(frame is not None for frame in series.slices)
        log.warning("W-DICOM-INTERPOLATED %s: %d of %d slices are interpolated", where, shape[2] - num_there, shape[2])
    return Volume(
        voxels.transpose()[None],  # (1, I, J, K)
        series.geometry,
        modalities=(series.modality or None,),
        shows_text=any(frame.shows_text for frame in series.frames),
        frame_of_reference_uid=series.frame_of_reference_uid,
    )


def _walk(folder_or_file: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file with the reason to leave it alone, if there is one."""
    if not folder_or_file.is_dir():
        yield folder_or_file, None
        return
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder_or_file, onerror=unreadable.append):
        for name in folders:
            if (Path(parent) / name).is_symlink():
                yield Path(parent) / name, "link to a folder, not followed"
        for name in names:
            is_litter = name.startswith("._") or name in _IGNORED_NAMES
            yield Path(parent) / name, "litter of the operating system" if is_litter else None
    for error in unreadable:
        yield Path(error.filename), f"cannot be read: {error.strerror}"


def _series(source: Path, group: Group) -> Series:
    first, frames = group.frames[0], group.frames
    name = f"{source}#{first.series_uid or WITHOUT_UID}" + (f"-{group.part}" if group.part else "")
    stack = Stack(None)
    if first.place is not None and group.problem is None:
        stack = fit_stack(frames, name)
    return Series(
        source,
        uid=first.series_uid,
        part=group.part,
        modality=first.modality,
        frames=frames,
        at=stack.at,
        grid=stack.geometry,
        frame_of_reference_uid=first.frame_of_reference_uid,
        tilt_deg=stack.tilt_deg,
        problems=(*_frame_problems(frames), *([group.problem] if group.problem else []), *stack.problems),
        notes=(*group.notes, *stack.notes, *_frame_notes(frames)),
    )


def _frame_problems(frames: Sequence[Frame]) -> list[DataError]:
    """What is wrong with single files, the like of it told once."""
    by_kind: dict[str, list[DataError]] = {}
    for frame in frames:
        if frame.problem is not None:
            by_kind.setdefault(frame.problem.error_id, []).append(frame.problem)
    problems = []
    for error_id, alike in by_kind.items():
        files = list(dict.fromkeys(problem.where for problem in alike))
        more = f" (and {len(files) - 1} more files)" if len(files) > 1 else ""
        problems.append(type(alike[0])(error_id, alike[0].message + more, where=alike[0].where))
    return problems


def _frame_notes(frames: Sequence[Frame]) -> list[str]:
    notes = []
    if any(frame.shows_text for frame in frames):
        notes.append("W-DICOM-BURNED-IN the picture itself may name the patient; share nothing made of it")
    if not frames[0].series_uid:
        notes.append("W-DICOM-NO-UID files without SeriesInstanceUID, taken together by folder")
    return notes


def _alone_note(frame: Frame) -> list[str]:
    """Whether a slice was given where its scan was meant; single radiographs of one folder are no slices."""
    if frame.modality not in _SLICED or not frame.series_uid:
        return []
    files = [path for path, reason in islice(_walk(frame.path.parent), _MAX_LOOKED_AT) if reason is None]
    found = [read_frames(path) for path in files if path.parent == frame.path.parent]
    number = sum(not isinstance(one, str) and one[0].series_uid == frame.series_uid for one in found)
    if number < 2:
        return []
    return [f"W-DICOM-ALONE 1 of {number} slices of this series that lie in its folder; give the folder for the scan"]


def _interpolated(voxels: npt.NDArray[Any], at: npt.NDArray[np.float64], num_slices: int) -> npt.NDArray[Any]:
    """Slices (K, J, I) at 0, 1, 2 … from slices at any places, linearly between neighbors."""
    whole = np.empty((num_slices, *voxels.shape[1:]), voxels.dtype)
    for k in range(num_slices):
        above = min(max(int(np.searchsorted(at, k - _ON_GRID)), 1), len(at) - 1)
        share = min(max((k - at[above - 1]) / (at[above] - at[above - 1]), 0.0), 1.0)
        mixed = voxels[above - 1] * np.float32(1 - share) + voxels[above] * np.float32(share)
        whole[k] = np.rint(mixed) if voxels.dtype.kind == "i" else mixed
    return whole


def _why_none(found: DicomFolder, name: str | None) -> str:
    if name is not None and found.series:
        return f"no series {name}; there are {', '.join(one.name for one in found.series)}"
    reasons = Counter(skipped.reason for skipped in found.skipped).most_common(_MAX_PROBLEMS)
    listed = ", ".join(f"{number} × {reason}" for reason, number in reasons)
    return f"holds no image series ({listed or 'no files'}); give the folder with the scan's own files"
