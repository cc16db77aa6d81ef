"""Do an image and its label belong together, and are they what was expected?

===================== ==================================================================
E-PAIR-SHAPE          image and label of different shapes
E-PAIR-AFFINE         image and label of one shape, at different places
E-CHANNEL-GRID        a channel that shows another part of the patient than the first one
W-CHANNEL-GRID        a channel on a grid of its own: it is resampled to the first one's
E-CONSTANT            an image that shows nothing
E-LABEL-UNDECLARED    label values that the data set does not declare
E-MODALITY            a scan of another modality than its channel is to be
W-HU                  a CT whose values are no Hounsfield units
===================== ==================================================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.headers import corner_distance_mm
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels

HU_RANGE = (-9000.0, 32000.0)
"""CT values beyond are a wrong slope or a wrong sign; scanners pad with -1024 to -8192 and metal ends at 30,000."""

MIN_COVERED = 0.5
"""Share of the first channel's field of view that another must cover; with less, they are hardly one examination."""

CHANNEL_NAMES = {
    "CT": ("ct", "cta", "cbct"),
    "MR": ("mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "flair", "adc", "dwi", "pd", "pdw"),
    "PT": ("pt", "pet", "suv"),
    "US": ("us", "ultrasound"),
}
"""DICOM's modality, and the words that name it in a manifest's channels."""

_ADVICE = (
    "give the label of this image, or put it on the image's grid: "
    "medseg data convert LABEL NEW_LABEL --image IMAGE --resample"
)


def check_pair(image: Volume, label: Volume, where: str) -> None:
    """Refuse an image and a label that do not stand on the same grid.

    Args:
        image: The one that counts.
        label: The one compared with it.
        where: Case or file, for the message.

    Raises:
        GeometryError: If shapes differ, or the affines by more than `AFFINE_TOLERANCE`.
    """
    grid, other = image.geometry, label.geometry
    if grid.shape != other.shape:
        raise GeometryError(
            "E-PAIR-SHAPE",
            f"image {grid.shape} but label {other.shape} voxels; {_ADVICE}",
            where=where,
        )
    if not grid.matches(other):
        distance = corner_distance_mm(grid.shape, grid.affine, other.affine)
        raise GeometryError(
            "E-PAIR-AFFINE",
            f"image and label lie up to {distance:.3g} mm apart (image {grid.orientation}, label {other.orientation}); "
            f"{_ADVICE}",
            where=where,
        )


def check_channel_grid(first: Geometry, other: Geometry, where: str) -> bool:
    """Whether a channel stands on the first one's grid; told where it must be resampled to it.

    Raises:
        GeometryError: If it shows another part of the patient.
    """
    if other.matches(first):
        return True
    covered = first.share_covered_by(other)
    if covered < MIN_COVERED:
        raise GeometryError(
            "E-CHANNEL-GRID",
            f"a channel of {other.shape} voxels covers {covered:.0%} of the first one's field of view "
            f"{first.shape}; give channels of one examination, or resample them first",
            where=where,
        )
    logging.getLogger("medseg").warning(
        "W-CHANNEL-GRID %s: a channel is resampled to the first one's grid (%.0f%% covered)", where, 100 * covered
    )
    return False


def check_channel_frames(uids: Iterable[str | None], where: str) -> None:
    """Warn where channels refer to different frames: equal coordinates are then different places.

    Args:
        uids: FrameOfReferenceUID of each channel, None where its file states none.
        where: Case or files, for the message.
    """
    if len({uid for uid in uids if uid}) > 1:
        logging.getLogger("medseg").warning(
            "W-CHANNEL-FRAME %s: channels of different frames of reference, so the same coordinates need not be the "
            "same place; unless they were registered, register them first",
            where,
        )


def value_ranges(image: Volume) -> tuple[tuple[float, float], ...]:
    """Lowest and highest value of each channel."""
    return tuple((float(channel.min()), float(channel.max())) for channel in image.array)


def check_not_constant(ranges: Sequence[tuple[float, float]], where: str, *, is_picture: bool) -> None:
    """Refuse a scan with a channel that shows nothing, and a picture that shows nothing in any of its colors.

    Args:
        ranges: See `value_ranges`.
        where: Case or file, for the message.
        is_picture: Whether the channels are colors: stains and fluorescence leave some out.

    Raises:
        DataError: If all voxels of a channel, or of all channels of a picture, are equal.
    """
    constant = [number for number, (low, high) in enumerate(ranges) if low == high]
    if constant and not (is_picture and len(constant) < len(ranges)):
        number, (value, _) = constant[0], ranges[constant[0]]
        raise DataError(
            "E-CONSTANT",
            f"every voxel of channel {number} is {value:g}; export the scan again or remove the case",
            where=where,
        )


def check_label_values(
    label: npt.NDArray[Any],
    labels: Labels,
    where: str | None = None,
    *,
    remedy: str = "add them to the manifest's labels, or set ignore_label",
) -> None:
    """Refuse label values that the data set does not declare.

    Args:
        label: Integer label map of any shape.
        labels: What is declared.
        where: Case or file, for the message.
        remedy: What to do, for the message.

    Raises:
        DataError: If there are others.
    """
    declared = {*labels.names} | ({labels.ignore_label} if labels.ignore_label is not None else set())
    undeclared = sorted({int(value) for value in np.unique(label)} - declared)
    if undeclared:
        raise DataError(
            "E-LABEL-UNDECLARED",
            f"holds label {', '.join(map(str, undeclared))}, but declared are {', '.join(map(str, sorted(declared)))}; "
            f"{remedy}",
            where=where,
        )


def check_modalities(found: Sequence[str | None], channels: Sequence[str], where: str) -> None:
    """Refuse a scan of another modality than is expected; what says nothing of its modality passes.

    Args:
        found: What made each channel, in DICOM's words; None where the file does not say it.
        channels: What each channel is to be, in a manifest's words, e.g. ``("CT",)``.
        where: Case or file, for the message.

    Raises:
        DataError: If they differ.
    """
    for modality, channel in zip(found, channels, strict=False):
        expected = expected_modality(channel)
        if modality and expected and modality != expected:
            raise DataError(
                "E-MODALITY",
                f"is a scan of modality {modality}; expected {expected}, as channel {channel!r} says",
                where=where,
            )


def expected_modality(channel: str) -> str | None:
    """DICOM's modality for a channel's name; None for names that tell none, e.g. ``"image"``."""
    words = re.findall(r"[a-z0-9]+", channel.lower())
    return next((modality for modality, names in CHANNEL_NAMES.items() if not {*names}.isdisjoint(words)), None)


def hounsfield_fault(channel: str, low: float, high: float) -> str | None:
    """What is odd about the values of a CT; None if nothing is, or if it is no CT."""
    if expected_modality(channel) != "CT" or low == high or (HU_RANGE[0] <= low < 0 and high <= HU_RANGE[1]):
        return None
    return (
        f"CT values run from {low:g} to {high:g}: these are no Hounsfield units (air is -1000, fat -100); was the slope "
        "or intercept lost, or is it another modality?"
    )
