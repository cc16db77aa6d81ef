"""What the files of one case hold: read once, every problem noted, nothing kept but numbers.

What the readers refuse or warn of becomes a row; beyond that:

===================== ==================================================================
E-MISSING-FILE        a file of the manifest that is not there
E-MISSING-LABEL       a training case without a label
E-CHANNELS            more or fewer channels than the manifest names
E-CONSTANT            a training image that shows nothing (W-CONSTANT where nothing is learned from it)
E-LABEL-UNDECLARED    label values that the data set does not declare
E-MODALITY            a scan of another modality than its channel is to be
W-LABEL-EMPTY         a label map without any label
W-LABEL-FLOAT         a label map stored as floating-point numbers
W-HU                  a CT whose values are no Hounsfield units
===================== ==================================================================
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medseg.data.checks import (
    check_channel_frames,
    check_channel_grid,
    check_modalities,
    check_not_constant,
    check_pair,
    hounsfield_fault,
    value_ranges,
)
from medseg.data.lint.rows import Row, WarningLog, row_of
from medseg.data.lint.voxels import centers_mm, count_values, digest, exchanged
from medseg.data.manifest import Case
from medseg.data.preflight import read_nifti_header
from medseg.data.volume_io import NIFTI_SUFFIXES, is_drawn, is_series, is_there, read_label, read_volume
from medseg.errors import DataError, MedsegError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels

MASK_VALUE = 255
"""What drawing programs write for "inside" in a mask of one organ."""


@dataclass(frozen=True)
class Expected:
    """What a data set says of every one of its cases.

    Args:
        values: Declared label values, the ignore label among them; None: scans that belong to no data set.
        channels: What each channel is, e.g. ``("CT",)``; None: any.
        ignore_label: Value of voxels that nobody annotated.
        select_volume: Which volume of a 4D file is the image.
        assume_spacing_mm: For files that state no spacing.
        allow_missing_slices: Whether slices that a DICOM series lacks are interpolated.
        sided: Label values whose centers are wanted, to tell left from right.
        labels: Says what SEGs and RTSTRUCTs call which label.
        numbers: Of each value of `labels` that is another one in the label files: that one.
        key: Hides which patients the cases are; forgotten with the process.
    """

    values: frozenset[int] | None = None
    channels: tuple[str, ...] | None = None
    ignore_label: int | None = None
    select_volume: int | None = None
    assume_spacing_mm: tuple[float, ...] | None = None
    allow_missing_slices: bool = False
    sided: frozenset[int] = frozenset()
    labels: Labels | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)


@dataclass(frozen=True, eq=False)
class LabelFacts:
    """What a label map holds.

    Args:
        geometry: Its grid.
        voxels: Number of voxels of each value, the background too.
        centers_mm: Center of each of the `Expected.sided` values that it has, in RAS.
        digest: Hash of values and shape.
        is_float: Whether the file stores floating-point numbers.
    """

    geometry: Geometry
    voxels: Mapping[int, int]
    centers_mm: Mapping[int, tuple[float, float, float]]
    digest: str
    is_float: bool


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """A case after its files were read.

    Args:
        case: The case.
        is_training: Whether a network would learn from it.
        geometry: Grid of its first image; None where that cannot be read.
        digest: Hash of all channels' voxels and shape, brought to RAS; None where there is none, or
            where the image shows nothing.
        label: None where there is none, or none that can be read.
        person: Keyed hash of the PatientID of its DICOM files; None where they name none, or are no DICOM.
        rows: Its problems.
    """

    case: Case
    is_training: bool
    geometry: Geometry | None = None
    digest: str | None = None
    label: LabelFacts | None = None
    person: str | None = field(default=None, repr=False)
    rows: tuple[Row, ...] = field(default=())

    @property
    def is_usable(self) -> bool:
        """Whether nothing stands against it but what a correction would mend."""
        return not any(row.severity == "error" and not row.fixable for row in self.rows)


def examine(case: Case, warned: WarningLog, *, expected: Expected, is_training: bool) -> CaseFacts:
    """Read a case's files, one after the other, and note everything that is wrong with them.

    Args:
        case: The case.
        warned: Where the readers' warnings arrive.
        expected: What the data set says of its cases.
        is_training: Whether a network would learn from it.

    Returns:
        Numbers and problems, no voxels.
    """
    rows: list[Row] = []
    warned.take()
    images = [_image(case, file, rows, expected, is_training=is_training) for file in case.images]
    read = [image for image in images if image]
    label = None
    if case.label and (images[0] or not is_drawn(case.label)):  # what is drawn on a scan cannot be read without it
        label = _label(case, case.label, rows, expected)
    elif is_training and not case.label and expected.values is not None:
        rows.append(Row("E-MISSING-LABEL", "a training case needs a label; move it to test", case.id))
    if len(read) == len(images):
        rows += _channel_rows(case, read, expected)
    if images[0]:
        _check_grids(case, images[0].geometry, images[1:], label, rows)
    check_channel_frames((image.frame_of_reference_uid for image in read), str(case.images[0]))
    rows += [row_of(message, case) for message in warned.take()]
    shows = len(read) == len(images) and all(image.digests for image in read)
    of_all = hashlib.sha256("".join(d for image in read for d in image.digests).encode()).hexdigest()
    return CaseFacts(
        case,
        is_training,
        geometry=images[0].geometry if images[0] else None,
        digest=of_all if shows else None,
        label=label,
        person=_person(case, expected.key),
        rows=tuple(rows),
    )


@dataclass(frozen=True, eq=False)
class _Image:
    """What an image file holds: its grid and one hash a channel, none where a channel shows nothing."""

    geometry: Geometry
    num_channels: int
    digests: tuple[str, ...]
    frame_of_reference_uid: str | None


def _image(case: Case, file: Path, rows: list[Row], expected: Expected, *, is_training: bool) -> _Image | None:
    with _noted(case, file, rows):
        _check_exists(file)
        volume = read_volume(
            file,
            select_volume=expected.select_volume,
            assume_spacing_mm=expected.assume_spacing_mm,
            allow_missing_slices=expected.allow_missing_slices,
        )
        ranges = value_ranges(volume)
        is_constant = any(low == high for low, high in ranges)
        try:
            check_not_constant(ranges, str(file), is_picture=volume.geometry.spatial_dims == 2)
        except DataError as error:
            kind = "E-CONSTANT" if is_training else "W-CONSTANT"
            rows.append(Row(kind, error.message, case.id, str(file)))
        first = case.images.index(file)
        kinds = (expected.channels or ())[first:] if len(case.images) > 1 else expected.channels or ()
        for kind, (low, high) in zip(kinds, ranges, strict=False):
            if fault := hounsfield_fault(kind, low, high):
                rows.append(Row("W-HU", fault, case.id, str(file)))
        with _noted(case, file, rows):
            check_modalities(volume.modalities, kinds, str(file))
        oriented = volume.oriented("RAS")
        digests = () if is_constant else tuple(digest(channel) for channel in oriented.array)
        return _Image(volume.geometry, len(volume.array), digests, volume.frame_of_reference_uid)
    return None


def _label(case: Case, file: Path, rows: list[Row], expected: Expected) -> LabelFacts | None:
    with _noted(case, file, rows):
        _check_exists(file)
        assumed = expected.assume_spacing_mm
        volume = read_label(file, image=case.images[0], labels=expected.labels, assume_spacing_mm=assumed)
        if is_series(file) and expected.numbers:  # drawn structures have names, and so no number of their own
            volume = replace(volume, array=exchanged(volume.array, expected.numbers))
        array = volume.array[0]
        facts = LabelFacts(
            volume.geometry,
            voxels=count_values(array),
            centers_mm=centers_mm(array, volume.geometry, expected.sided),
            digest=digest(volume.oriented("RAS").array[0]),
            is_float=_stores_floats(file, expected),
        )
        rows += _label_rows(case, file, facts, expected)
        return facts
    return None


def _label_rows(case: Case, file: Path, facts: LabelFacts, expected: Expected) -> Iterator[Row]:
    if facts.is_float:
        message = "is stored as floating-point numbers; its whole numbers are read as labels"
        yield Row("W-LABEL-FLOAT", message, case.id, str(file), fixable=True)
    if set(facts.voxels) <= {0, expected.ignore_label}:
        message = "holds no label: its metrics will be empty, and it teaches background alone"
        yield Row("W-LABEL-EMPTY", message, case.id, str(file))
    undeclared = sorted(set(facts.voxels) - expected.values) if expected.values is not None else []
    if not undeclared:
        return
    assert expected.values is not None
    found = ", ".join(f"{value} ({facts.voxels[value]:,} voxels)" for value in undeclared[:8])
    more = f" and {len(undeclared) - 8} more" if len(undeclared) > 8 else ""
    declared = ", ".join(map(str, sorted(expected.values)))
    is_mask = mask_mapping(facts, expected) is not None
    advice = "255 is the organ of a mask; map it to 1" if is_mask else "add them to the manifest, or set ignore_label"
    message = f"holds label {found}{more}, but declared are {declared}; {advice}"
    yield Row("E-LABEL-UNDECLARED", message, case.id, str(file), fixable=is_mask)


def mask_mapping(facts: LabelFacts, expected: Expected) -> dict[int, int] | None:
    """``{255: 1}`` for the 0/255 mask of a data set with one organ, where it can mean nothing else."""
    is_mask = (
        expected.values == frozenset((0, 1)) and MASK_VALUE in facts.voxels and set(facts.voxels) <= {0, MASK_VALUE}
    )
    return {MASK_VALUE: 1} if is_mask else None


@contextmanager
def _noted(case: Case, file: Path, rows: list[Row]) -> Iterator[None]:
    """Turn what is raised inside into a row."""
    try:
        yield
    except MedsegError as error:
        rows.append(Row(error.error_id, error.message, case.id, str(file)))
    except OSError as error:
        rows.append(Row("E-FILE", f"cannot be read: {error.strerror}; check path and rights", case.id, str(file)))
    except MemoryError:
        rows.append(Row("E-MEMORY", "does not fit into this machine's memory; crop it", case.id, str(file)))


def _check_exists(file: Path) -> None:
    if not is_there(file):
        raise DataError("E-MISSING-FILE", "does not exist; check root and paths")


def _channel_rows(case: Case, images: Sequence[_Image], expected: Expected) -> Iterator[Row]:
    if expected.channels is None:
        return
    num_channels = sum(image.num_channels for image in images)
    if num_channels != len(expected.channels):
        is_series = all(image.geometry.spatial_dims == 3 for image in images)
        advice = "of a 4D file, select_volume takes one" if is_series else "correct it, or convert the pictures"
        message = (
            f"{num_channels} channels; expected {len(expected.channels)} ({', '.join(expected.channels)}) as the "
            f"manifest's modality says; {advice}"
        )
        yield Row("E-CHANNELS", message, case.id, str(case.images[0]))


def _check_grids(
    case: Case, grid: Geometry, others: Sequence[_Image | None], label: LabelFacts | None, rows: list[Row]
) -> None:
    """Channels and label against the grid of the first image, as training does."""
    for file, image in zip(case.images[1:], others, strict=True):
        if image:
            with _noted(case, file, rows):
                check_channel_grid(grid, image.geometry, str(file))
    if case.label and label:
        with _noted(case, case.label, rows):
            check_pair(_outline(grid), _outline(label.geometry), str(case.label))


def _person(case: Case, key: bytes) -> str | None:
    """Whose scan it is, as far as its files say."""
    for file in case.images:
        if is_there(file) and is_series(file):
            from medseg.data.dicom.patient import patient_digest  # pydicom takes a while to import

            return patient_digest(file, key)
    return None


def _outline(geometry: Geometry) -> Volume:
    """A volume that takes no memory, for checks that look at grids alone."""
    return Volume(np.broadcast_to(np.uint8(0), (1, *geometry.shape)), geometry)


def _stores_floats(file: Path, expected: Expected) -> bool:
    """Whether a NIfTI label is floating-point; the other formats keep their type from reading to writing."""
    if not file.name.lower().endswith(NIFTI_SUFFIXES):
        return False
    header = read_nifti_header(file, assume_spacing_mm=expected.assume_spacing_mm)
    return header.dtype.kind == "f"
